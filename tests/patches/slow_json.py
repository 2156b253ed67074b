"""Let json.dumps() take 0.4 s, as if there were very many users."""

import json
import time
from typing import Any

dumps = json.dumps


def slow_dumps(value: Any, **settings: Any) -> str:
    time.sleep(0.4)
    return dumps(value, **settings)


json.dumps = slow_dumps  # type: ignore[assignment]

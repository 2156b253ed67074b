"""Have poll() and committed() fail while the file FAIL_WHILE exists; append a byte to it each time.

The file is named by an environment variable. Its size tells a test that the script has tried.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, errors

FAIL_WHILE = Path(os.environ["FAIL_WHILE"])


def failing(call: Callable[..., Any]) -> Callable[..., Any]:
    def failing_call(*arguments: Any, **settings: Any) -> Any:
        try:
            with FAIL_WHILE.open("r+") as file:
                file.seek(0, os.SEEK_END)
                file.write(".")
        except FileNotFoundError:
            return call(*arguments, **settings)
        raise errors.KafkaTimeoutError

    return failing_call


KafkaConsumer.poll = failing(KafkaConsumer.poll)
KafkaConsumer.committed = failing(KafkaConsumer.committed)

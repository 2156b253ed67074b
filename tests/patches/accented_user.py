"""Have the producer choose the user ID and action "Zoë", which not every encoding can print."""

import random
from collections.abc import Sequence
from typing import Any

choice = random.choice


def choose_accented(values: Sequence[Any]) -> Any:
    return "Zoë" if isinstance(values[0], str) else choice(values)


random.choice = choose_accented  # type: ignore[assignment]

"""Patches that concern all three scripts; run.py applies them."""

import random
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from kafka import KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors import cooperative_sticky  # noqa: F401 - see stop_clock()


def divide_timeouts(divisors: dict[str, int]) -> None:
    """Divide settings of the script's client, its own or kafka-python's default, by these numbers.

    A test then sees in 3 s what takes 30 s otherwise.
    """
    for client in (KafkaConsumer, KafkaProducer):
        create, defaults = client.__init__, client.DEFAULT_CONFIG

        def create_with_short_timeouts(
            self: Any,
            *topics: str,
            create: Any = create,
            defaults: Any = defaults,
            **settings: Any,
        ) -> None:
            for name, divisor in divisors.items():
                settings[name] = settings.get(name, defaults[name]) // divisor
            create(self, *topics, **settings)

        client.__init__ = create_with_short_timeouts


def stop_clock(at: float) -> None:
    """Stop the script's clock, and no other.

    kafka-python has imported `time` above. Only the script, which imports it afterwards, is given
    a module whose clock stands still. A test sees what the script does without waiting for a time.
    """
    stand_in = ModuleType("time")
    vars(stand_in).update(vars(time), monotonic=lambda: at)
    sys.modules["time"] = stand_in


def connect_first_to(port: int) -> None:
    """Make the client connect to this port first, of those that it is given.

    kafka-python's choice is random, so a test could not rely on it to meet a certain broker.
    """
    choice = random.choice
    first = [port]

    def choose(values: Sequence[Any]) -> Any:
        for value in values:
            if getattr(value, "port", None) in first:
                first.clear()
                return value
        return choice(values)

    mock.patch("random.choice", choose).start()

"""Patches for producer.py; run.py applies them."""

import random
from collections.abc import Sequence
from typing import Any
from unittest import mock

from kafka import KafkaProducer


def choose_user_ids(user_ids: list[Any]) -> None:
    """Make producer.py choose these user IDs, one after the other, instead of random ones.

    A test sees how an ID is printed that producer.py itself does not have.
    """
    choice = random.choice

    def choose(values: Sequence[Any]) -> Any:
        return user_ids.pop(0) if "alice" in values else choice(values)

    mock.patch("random.choice", choose).start()


def fail_send(number: int) -> None:
    """Make the send() with this number, from 1, raise as if the topic had just been deleted.

    No test could delete it at the right moment.
    """
    send = KafkaProducer.send
    numbers = iter(range(1, number + 1))

    def send_or_fail(self: Any, *arguments: Any, **settings: Any) -> Any:
        if next(numbers, None) == number:
            raise ValueError("Partitioner did not assign a partition for topic events!")
        return send(self, *arguments, **settings)

    KafkaProducer.send = send_or_fail

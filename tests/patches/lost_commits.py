"""Lose the first three commits, as if the coordinator did not answer."""

from typing import Any

from kafka import KafkaConsumer, errors

commit = KafkaConsumer.commit
to_lose = [1, 2, 3]


def losing_commit(consumer: Any, **settings: Any) -> None:
    if to_lose:
        to_lose.pop()
        raise errors.KafkaTimeoutError
    commit(consumer, **settings)


KafkaConsumer.commit = losing_commit

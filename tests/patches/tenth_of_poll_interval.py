"""Divide the script's max_poll_interval_ms by ten, so that a test need not wait for 30 s."""

from typing import Any

from kafka import KafkaConsumer

create = KafkaConsumer.__init__


def create_with_tenth(consumer: Any, *topics: str, **configs: Any) -> None:
    interval = configs.get(
        "max_poll_interval_ms", KafkaConsumer.DEFAULT_CONFIG["max_poll_interval_ms"]
    )
    create(consumer, *topics, **configs | {"max_poll_interval_ms": interval // 10})


KafkaConsumer.__init__ = create_with_tenth

"""Poll at most 100 messages, every 50 ms: it takes a while to read what a test has written."""

import time
from typing import Any

from kafka import KafkaConsumer

poll = KafkaConsumer.poll


def slow_poll(consumer: Any, **_: Any) -> Any:
    time.sleep(0.05)
    return poll(consumer, 100, max_records=100)


KafkaConsumer.poll = slow_poll

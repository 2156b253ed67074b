"""Press Ctrl-C when poll() has just taken the event of the user "last"."""

import os
import signal
from typing import Any

from kafka import KafkaConsumer

poll = KafkaConsumer.poll


def last_poll(consumer: Any, **settings: Any) -> Any:
    batches = poll(consumer, **settings)
    if any(b'"last"' in message.value for messages in batches.values() for message in messages):
        os.kill(os.getpid(), signal.SIGINT)
    return batches


KafkaConsumer.poll = last_poll

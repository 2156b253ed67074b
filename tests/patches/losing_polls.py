"""Have poll() raise when it has taken messages, the first and the third time that it does.

This happens if the client does not know a partition's new leader yet. Unless the script rewinds,
these messages are lost.
"""

from typing import Any

from kafka import KafkaConsumer, errors

poll = KafkaConsumer.poll
polls_with_messages = 0


def losing_poll(consumer: Any, **settings: Any) -> Any:
    global polls_with_messages
    batches = poll(consumer, **settings)
    polls_with_messages += bool(batches)
    if batches and polls_with_messages in (1, 3):
        raise errors.UnknownBrokerIdError(2)
    return batches


KafkaConsumer.poll = losing_poll

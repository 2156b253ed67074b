"""Have the 50th send() raise ValueError, as it may if the topic has just been deleted."""

from typing import Any

from kafka import KafkaProducer

send = KafkaProducer.send
calls = 0


def failing_send(producer: Any, *arguments: Any, **settings: Any) -> Any:
    global calls
    calls += 1
    if calls == 50:
        raise ValueError("Partitioner did not assign a partition for topic events!")
    return send(producer, *arguments, **settings)


KafkaProducer.send = failing_send

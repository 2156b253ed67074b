"""The fastest plain kafka-python loops that do what the scripts do, for benchmark.py.

They do not report, commit, handle errors or stop at a signal. Their client settings are the fastest
that were found, with none that a slow line or a transaction would need.
"""

import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

import producer as script

SERVERS = os.environ["KAFKA_BOOTSTRAP_SERVERS"]


def produce(number: int) -> None:
    producer = KafkaProducer(bootstrap_servers=SERVERS, linger_ms=20, batch_size=128 * 1024)
    for _ in range(number):
        event = script.random_event()
        key, value = event["user_id"].encode(), json.dumps(event).encode()
        producer.send(script.TOPIC, key=key, value=value)
    producer.flush()


def batches(number: int) -> Iterator[list[Any]]:
    start = {"group_id": str(uuid.uuid4()), "auto_offset_reset": "earliest"}
    fast = {"max_partition_fetch_bytes": 4 * 1024 * 1024, "max_poll_records": 5_000}
    settings = {"bootstrap_servers": SERVERS, "enable_auto_commit": False, **start, **fast}
    consumer = KafkaConsumer(script.TOPIC, **settings)
    while number > 0:
        for messages in consumer.poll(timeout_ms=500).values():
            yield messages
            number -= len(messages)


def consume(number: int) -> None:
    for messages in batches(number):
        for message in messages:
            position = f"partition={message.partition} offset={message.offset}"
            print(f"{position} key={message.key.decode()} {message.value.decode()}")


def process(number: int) -> None:
    counts = Counter[tuple[str, str]]()
    for messages in batches(number):
        for message in messages:
            event = json.loads(message.value)
            counts[event["user_id"], event["action"]] += 1


if __name__ == "__main__":
    {"produce": produce, "consume": consume, "process": process}[sys.argv[1]](int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # leaving the group is not part of the work

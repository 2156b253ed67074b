"""The witness: a broker as librdkafka sees it, which shares no code with the client under test."""

import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import ConsumerGroupTopicPartitions as GroupRequest
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from events import Message
from scripts import GROUP_ID, TIMEOUT, TOPIC, wait_until

Data = bytes | None  # a key or a value


class Witness:
    """Look into a broker and write to it, independently of kafka-python."""

    def __init__(self, address: str) -> None:
        self.address = address
        # librdkafka tries IPv6 as well, and reports connections that a test breaks.
        self.settings = {"bootstrap.servers": address, "broker.address.family": "v4"}
        self.admin = AdminClient({**self.settings, "log_level": 0})

    def topics(self) -> dict[str, Any]:
        return self.admin.list_topics(timeout=TIMEOUT).topics

    def partitions(self) -> list[int]:
        """Return the topic's partitions, none if it is missing. This does not create it."""
        topics = self.topics()
        return sorted(topics[TOPIC].partitions) if TOPIC in topics else []

    def in_sync_replicas(self) -> list[int]:
        """Return how many in-sync replicas each partition of the topic has."""
        return [len(p.isrs) for _, p in sorted(self.topics()[TOPIC].partitions.items())]

    def create_topic(self, partitions: int) -> None:
        topic = NewTopic(TOPIC, partitions, 1)
        self.request(self.admin.create_topics, topic, KafkaError.TOPIC_ALREADY_EXISTS)
        wait_until(lambda: len(self.partitions()) == partitions, "the topic is there")

    def delete_topics(self, *names: str) -> None:
        for name in names:
            self.request(self.admin.delete_topics, name, KafkaError.UNKNOWN_TOPIC_OR_PART)
        wait_until(lambda: not self.topics().keys() & {*names}, "the topics are deleted")

    def add_partitions(self, total: int) -> None:
        new = NewPartitions(TOPIC, total)
        self.request(self.admin.create_partitions, new, KafkaError.INVALID_PARTITIONS)
        wait_until(lambda: len(self.partitions()) == total, "the partitions are added")

    def delete_events_before(self, offset: int) -> None:
        """Delete the first events of partition 0, as retention does in time."""
        [future] = self.admin.delete_records([TopicPartition(TOPIC, 0, offset)]).values()
        future.result()

    def request(self, call: Callable[..., Any], what: object, already_done: int) -> None:
        """Send the controller a request. If it is repeated, it may fail as it is `already_done`.

        Repeat it if need be: a busy librdkafka may not notice that it knows the controller by now.
        """

        def is_answered() -> bool:
            [future] = call([what], request_timeout=5).values()
            error = future.exception()
            code = error.args[0].code() if error else None
            assert code in (None, already_done, KafkaError._TIMED_OUT)
            return code != KafkaError._TIMED_OUT

        wait_until(is_answered, "the controller answers")

    def groups(self) -> list[str]:
        listed = self.admin.list_consumer_groups(request_timeout=TIMEOUT).result()
        return [group.group_id for group in listed.valid or []]

    def assignments(self, group: str = GROUP_ID) -> list[list[int]]:
        """Return each member's partitions; [[-1]] while the coordinator does not answer."""
        # Not describe_consumer_groups(): if it is not answered, librdkafka 2.x aborts Python.
        try:
            found = self.admin.list_groups(group, timeout=5)
        except KafkaException:
            return [[-1]]
        members: list[Any] = [member for listed in found for member in listed.members]
        return [assigned_partitions(member.assignment) for member in members]

    def group_is_balanced(self, members: int) -> bool:
        """Return whether this many members share the topic's partitions evenly."""
        partitions, assigned = self.partitions(), self.assignments()
        sizes = {len(member) for member in assigned} or {0}
        is_even = len(assigned) == members and max(sizes) - min(sizes) <= 1
        all_assigned = sorted(number for member in assigned for number in member)
        return is_even and all_assigned == partitions != []

    def committed(self) -> dict[int, int]:
        """Return the group's committed offset of each partition that has one."""
        requests = [GroupRequest(GROUP_ID)]
        [future] = self.admin.list_consumer_group_offsets(requests).values()
        found = future.result(TIMEOUT).topic_partitions
        return {partition.partition: partition.offset for partition in found}

    def messages(self) -> list[Message]:
        """Return all messages of the topic, by partition and offset."""
        settings = {"group.id": "witness", "enable.auto.commit": False, "fetch.wait.max.ms": 10}
        settings |= {"auto.offset.reset": "earliest", "enable.partition.eof": True}
        consumer = Consumer({**self.settings, **settings})
        unread = set(self.partitions())
        consumer.assign([TopicPartition(TOPIC, number, 0) for number in unread])
        messages = []
        message: Any  # its type hints make everything optional
        deadline = time.monotonic() + TIMEOUT
        while unread:
            assert time.monotonic() < deadline, f"the log end of {unread} is not reached"
            for message in consumer.consume(1_000, timeout=0.05):
                partition, offset, error = message.partition(), message.offset(), message.error()
                if error is None:
                    messages.append(Message(partition, offset, message.key(), message.value()))
                else:
                    assert error.name() == "_PARTITION_EOF", error
                    unread.discard(partition)
        consumer.close()
        return sorted(messages, key=lambda message: (message.partition, message.offset))

    def write(self, messages: Iterable[tuple[int, Data, Data]], compression: str = "none") -> None:
        """Write messages, given as partition, key and value."""
        errors: set[object] = set()
        producer = Producer({**self.settings, "linger.ms": 5, "compression.type": compression})
        for partition, key, value in messages:  # at most 100,000, which its buffer takes
            producer.produce(TOPIC, value, key, partition, on_delivery=lambda e, _: errors.add(e))
        assert producer.flush(TIMEOUT) == 0
        assert errors <= {None}

    def delete_everything(self) -> None:
        """Delete all topics and groups."""
        self.delete_topics(*(name for name in self.topics() if not name.startswith("_")))
        for group in self.groups():
            wait_until(lambda: not self.assignments(group), f"{group} has no members")
            self.admin.delete_consumer_groups([group])[group].result()


def assigned_partitions(assignment: bytes) -> list[int]:
    """Return the partitions in a member's assignment, which names one topic at most."""
    # In Kafka's consumer protocol: version, number of topics; topic, number of partitions; these.
    if len(assignment) < 12:  # the member is just joining, or has none
        return []
    [length] = struct.unpack_from(">h", assignment, 6)
    [number] = struct.unpack_from(">i", assignment, 8 + length)
    return sorted(struct.unpack_from(f">{number}i", assignment, 12 + length))

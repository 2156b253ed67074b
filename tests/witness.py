"""The witness: what librdkafka, which shares no code with kafka-python, finds on a broker."""

import contextlib
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from events import Message, counts_of, event_lines
from scripts import TIMEOUT, Script, Start, printed_lines, send_events, wait_until

TOPIC = "events"
GROUP_ID = "event-watchers"


class Witness:
    """A view of a broker, its topic `events` and its groups, and a way to change them."""

    def __init__(self, address: str) -> None:
        self.address = address
        # librdkafka would try IPv6 as well, and log each lost connection.
        self.settings = {"bootstrap.servers": address, "broker.address.family": "v4"}
        self.admin = AdminClient({**self.settings, "log_level": 0})

    def partitions(self) -> list[int]:
        """Return the partitions of the topic, none if it does not exist; do not create it."""
        topics = self.admin.list_topics(timeout=TIMEOUT).topics
        return sorted(topics[TOPIC].partitions) if TOPIC in topics else []

    def replicas(self) -> list[int]:
        """Return how many replicas each partition of the topic has."""
        partitions = self.admin.list_topics(timeout=TIMEOUT).topics[TOPIC].partitions
        return [len(partition.replicas) for _, partition in sorted(partitions.items())]

    def in_sync_replicas(self) -> list[int]:
        """Return how many in-sync replicas each partition of the topic has."""
        partitions = self.admin.list_topics(timeout=TIMEOUT).topics[TOPIC].partitions
        return [len(partition.isrs) for _, partition in sorted(partitions.items())]

    def request(
        self, send: Callable[..., dict[Any, Any]], what: list[Any], harmless_error: int = 0
    ) -> bool:
        """Send a request to the controller; return False if it answers with that error code.

        A request that times out is sent again: librdkafka may miss that the controller is known.
        """
        codes: set[int] = set()

        def answered() -> bool:
            codes.clear()
            for future in send(what, request_timeout=5).values():
                if error := future.exception():
                    codes.add(error.args[0].code())
            return KafkaError._TIMED_OUT not in codes

        wait_until(answered, "the controller answers")
        assert codes <= {harmless_error}, codes
        return not codes

    def create_topic(self, partitions: int) -> None:
        """Create the topic; replace it if a client has just created it by asking for it."""

        def created() -> bool:
            self.delete_topics(TOPIC)
            return self.request(self.admin.create_topics, [topic], KafkaError.TOPIC_ALREADY_EXISTS)

        topic = NewTopic(TOPIC, partitions, 1)
        wait_until(created, "the topic is created")
        wait_until(lambda: len(self.partitions()) == partitions, "the topic exists")

    def delete_topics(self, *topics: str) -> None:
        def deleted() -> bool:
            existing = self.admin.list_topics(timeout=TIMEOUT).topics
            if found := [name for name in topics if name in existing]:
                self.request(self.admin.delete_topics, found, KafkaError.UNKNOWN_TOPIC_OR_PART)
            return not found

        wait_until(deleted, "the topics are deleted")

    def add_partitions(self, total: int) -> None:
        new = NewPartitions(TOPIC, total)
        self.request(self.admin.create_partitions, [new], KafkaError.INVALID_PARTITIONS)
        wait_until(lambda: len(self.partitions()) == total, "the topic has more partitions")

    def delete_events_before(self, offsets: dict[int, int]) -> None:
        """Delete the events before the offset of each partition, as retention does in time."""
        wanted = [TopicPartition(TOPIC, number, offset) for number, offset in offsets.items()]
        for future in self.admin.delete_records(wanted).values():
            future.result()

    def groups(self) -> list[str]:
        listed = self.admin.list_consumer_groups(request_timeout=TIMEOUT).result()
        return [group.group_id for group in listed.valid or []]

    def delete_everything(self) -> None:
        """Delete all topics and, once they have no members, all groups."""
        topics = self.admin.list_topics(timeout=TIMEOUT).topics
        self.delete_topics(*(name for name in topics if not name.startswith("_")))
        for group in self.groups():
            wait_until(lambda: not self.assignments(group), f"{group} has no members")
            self.admin.delete_consumer_groups([group])[group].result()

    def assignments(self, group: str = GROUP_ID) -> list[list[int]]:
        """Return the assigned partitions of each member; [[-1]] if the coordinator cannot tell."""
        # Not describe_consumer_groups(): if that is not answered, librdkafka 2.x aborts Python.
        try:
            found = self.admin.list_groups(group, timeout=5)
        except KafkaException:
            return [[-1]]
        members: list[Any] = [member for state in found for member in state.members]
        return [assigned_partitions(member.assignment) for member in members]

    def committed(self) -> dict[int, int]:
        """Return the group's committed offset in each partition that has one."""
        consumer = Consumer({**self.settings, "group.id": GROUP_ID})
        asked = [TopicPartition(TOPIC, number) for number in self.partitions()]

        def answer() -> list[TopicPartition] | None:
            with contextlib.suppress(KafkaException):  # the coordinator is not ready yet
                return consumer.committed(asked, timeout=TIMEOUT)
            return None

        answered = wait_until(answer, "the coordinator answers") if asked else []
        consumer.close()
        return {entry.partition: entry.offset for entry in answered if entry.offset >= 0}

    def messages(self) -> list[Message]:
        """Return all messages of the topic, sorted by partition and offset."""
        consumer = Consumer(
            {**self.settings, "group.id": "witness", "enable.partition.eof": True}
            | {"enable.auto.commit": False, "auto.offset.reset": "earliest"}
            | {"fetch.wait.max.ms": 10}  # before the broker answers that there are no more
        )
        unread = set(self.partitions())
        consumer.assign([TopicPartition(TOPIC, number, 0) for number in unread])
        messages = []
        message: Any  # declared to return None for everything it is asked for below
        deadline = time.monotonic() + TIMEOUT
        while unread:
            assert time.monotonic() < deadline, f"partitions {unread} have no end"
            for message in consumer.consume(1_000, timeout=0.05):
                partition, offset, error = message.partition(), message.offset(), message.error()
                if error is None:
                    messages.append(Message(partition, offset, message.key(), message.value()))
                else:
                    assert error.name() == "_PARTITION_EOF", error
                    unread.discard(partition)
        consumer.close()
        return sorted(messages, key=lambda message: message[:2])

    def write(
        self, messages: Iterable[tuple[int, bytes | None, bytes | None]], compression: str = "none"
    ) -> None:
        """Write a message for each (partition, key, value)."""
        errors: set[object] = set()
        producer = Producer({**self.settings, "linger.ms": 5, "compression.type": compression})
        for number, (partition, key, value) in enumerate(messages):
            if number % 50_000 == 0:  # half of what the buffer of librdkafka takes
                producer.flush(TIMEOUT)
            producer.produce(TOPIC, value, key, partition, on_delivery=lambda e, _: errors.add(e))
        assert producer.flush(TIMEOUT) == 0
        assert errors <= {None}


def assigned_partitions(assignment: bytes) -> list[int]:
    """Parse a member's assignment of at most one topic (ConsumerProtocolAssignment in Kafka)."""
    if len(assignment) < 12:  # a member that is joining, or is assigned none
        return []
    [length] = struct.unpack_from(">h", assignment, 6)
    [number] = struct.unpack_from(">i", assignment, 8 + length)
    return sorted(struct.unpack_from(f">{number}i", assignment, 12 + length))


def evenly_assigned(witness: Witness, members: int) -> Callable[[], bool]:
    """Return the condition that all partitions are assigned, evenly, to that many members."""

    def condition() -> bool:
        assignments = witness.assignments()
        partitions = witness.partitions()
        few, more = divmod(len(partitions), members)
        sizes = [few] * (members - more) + [few + 1] * more
        assigned = [partition for assignment in assignments for partition in assignment]
        return sorted(assigned) == partitions and sorted(map(len, assignments)) == sizes

    return condition


def run_pipeline(start: Start, witness: Witness, **where: Any) -> list[Script]:
    """Send a hundred events, print them, count them; return the three scripts."""
    producer = send_events(start, 100, **where)
    messages = witness.messages()
    assert printed_lines(producer) == event_lines(messages)
    assert witness.partitions() == [0, 1, 2]
    consumer = start("consumer.py", **where)
    wait_until(lambda: len(consumer.lines) >= 100, "all events are printed")
    assert consumer.stop() == 0
    assert printed_lines(consumer) == printed_lines(producer)
    processor = start("processor.py", "--once", "--group", "counting", **where)
    assert processor.wait() == 0
    assert processor.snapshots == [counts_of(messages)]
    return [producer, consumer, processor]

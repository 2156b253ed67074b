"""Topics that are missing, deleted or changed, on a cluster that does not create them."""

import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Broker
from conftest import CHEAP_BROKER
from events import counts_of, event, event_lines, sum_of_counts
from scripts import (
    MISSING_TOPIC,
    NO_PARTITIONS,
    Script,
    Start,
    assert_few_plain_lines,
    frozen,
    printed_lines,
    send_events,
    wait_until,
)
from witness import TOPIC, Witness

pytestmark = pytest.mark.xdist_group("topics")  # one process, and so one broker


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    environment = CHEAP_BROKER | {"KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false"}
    with Broker(tmp_path_factory.mktemp("broker"), environment=environment) as broker:
        yield broker


def running_readers(start: Start, witness: Witness) -> tuple[Script, Script]:
    """Return a consumer and a processor, each alone in its group, that have read everything."""
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    expected = len(witness.messages())
    wait_until(lambda: len(consumer.lines) == expected, "the consumer has printed everything")
    wait_until(lambda: processor.snapshots, "the processor has counted everything")
    return consumer, processor


def test_readers_notice_added_partitions(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    send_events(start, 100)
    consumer, processor = running_readers(start, witness)
    witness.add_partitions(5)
    witness.write((number % 5, None, event(f"user {number}")) for number in range(50))
    send_events(start, 100)  # by a producer that knows all five
    messages = witness.messages()
    assert {message.partition for message in messages} == {0, 1, 2, 3, 4}
    # It may take 10 s (metadata_max_age_ms).
    wait_until(lambda: processor.snapshots[-1] == counts_of(messages), "everything is counted", 30)
    wait_until(
        lambda: printed_lines(consumer) == event_lines(messages), "everything is printed", 30
    )
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "0, 1, 2, 3, 4" in script.err


def test_readers_continue_after_deleted_events(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    send_events(start, 200)
    before = witness.messages()
    consumer, processor = running_readers(start, witness)
    with frozen(consumer, processor):  # or they might read the events that are deleted
        time.sleep(1)  # a fetch that has been sent returns without events
        witness.write((number % 3, b"k", event("deleted")) for number in range(300))
        witness.delete_events_before({m.partition: m.offset + 1 for m in witness.messages()})
        witness.write((number % 3, b"k", event("kept")) for number in range(30))
        after = witness.messages()
        assert len(after) == 30
    expected = sum_of_counts(counts_of(before), counts_of(after))
    wait_until(lambda: processor.snapshots[-1] == expected, "it counts what is kept")
    wait_until(lambda: {*event_lines(after)} <= {*consumer.lines}, "what is kept is printed")
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "Traceback" not in script.err


def test_readers_wait_for_a_missing_topic_and_the_producer_exits(
    start: Start, witness: Witness
) -> None:
    readers = [start("consumer.py"), start("processor.py", "--group", "counting")]
    producer = start("producer.py")
    assert producer.wait(30) == 1
    assert producer.out == ""
    match = re.fullmatch(MISSING_TOPIC, producer.err)
    assert match
    for reader in readers:
        wait_until(lambda: NO_PARTITIONS in reader.err, "it reports why it waits")
    command = shlex.split(match[1])
    assert command[0] == "python"
    admin = start(command=[sys.executable, *command[1:]])
    assert admin.wait() == 0, admin.err
    assert witness.partitions() == [0, 1, 2]
    sent = send_events(start, 50)
    consumer, processor = readers
    wait_until(lambda: sorted(consumer.lines) == sorted(sent.lines), "all events are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    for reader in readers:
        assert reader.stop() == 0
        assert_few_plain_lines(reader)
        assert reader.err.count(NO_PARTITIONS) == 1


def test_a_signal_stops_a_producer_that_waits_for_the_topic(start: Start, broker: Broker) -> None:
    producer = start("producer.py")
    wait_until(producer.is_connected, "it is connected")
    assert producer.stop(timeout=9) == -2  # at once, not with status 1 after 15 s
    assert "Traceback" not in producer.err


def test_ctrl_c_stops_the_producer_of_a_deleted_topic(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    producer = start("producer.py", "--interval", "0.01")
    wait_until(lambda: len(producer.lines) > 20, "it is running")
    witness.delete_topics(TOPIC)

    def is_stuck() -> bool:
        lines = len(producer.lines)
        time.sleep(1)
        return len(producer.lines) == lines

    wait_until(is_stuck, "nothing is acknowledged any more")
    assert producer.stop(timeout=20) == 1
    assert_few_plain_lines(producer)
    assert re.fullmatch(r"--- \d+ delivered, \d+ failed", producer.err.splitlines()[-1])


def test_ctrl_c_stops_readers_without_a_topic_and_with_a_frozen_broker(
    start: Start, broker: Broker, witness: Witness
) -> None:
    readers = [start("consumer.py"), start("processor.py", "--group", "counting")]
    wait_until(
        lambda: witness.assignments() and witness.assignments("counting"),
        "both have joined their groups",
    )
    with frozen(broker):
        time.sleep(3)
        for reader in readers:
            reader.process.send_signal(signal.SIGINT)
        for reader in readers:
            assert reader.wait(15) == 0
            assert_few_plain_lines(reader)


def test_readers_report_that_the_group_has_no_coordinator(start: Start, tmp_path: Path) -> None:
    """Kafka's default is three replicas of the committed offsets; there is one broker."""
    environment = {"KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "3"}
    with Broker(tmp_path, environment=environment) as broker:
        readers = [start(name, address=broker.address) for name in ("consumer.py", "processor.py")]
        for reader in readers:
            wait_until(lambda: NO_PARTITIONS in reader.err, "it reports why it waits", 20)
            assert reader.stop(timeout=15) == 0
            assert_few_plain_lines(reader)

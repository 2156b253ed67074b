"""A topic that is missing or changes, on a cluster that does not create topics by itself."""

import shlex
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import reports
from broker import Broker
from broker_settings import WITHOUT_TOPIC_CREATION
from events import counts_of, event, event_lines, sum_of_counts
from proxy import Proxy, add_proxy
from scripts import (
    Script,
    Start,
    assert_clean_stop,
    assert_plain_stderr,
    frozen,
    printed_lines,
    send_events,
    wait_until,
)
from witness import Witness


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Proxy]]:
    """A broker that does not create topics, instead of the usual one."""
    folder = tmp_path_factory.mktemp("broker")
    broker = Broker(folder, environment=WITHOUT_TOPIC_CREATION)
    proxy = add_proxy(broker)
    with broker:
        yield broker, proxy


def start_readers(start: Start) -> tuple[Script, Script]:
    """Start a consumer and a processor in separate groups."""
    return start("consumer.py"), start("processor.py", "--group", "counting")


def test_a_missing_topic_is_reported_and_waited_for(start: Start, witness: Witness) -> None:
    consumer, processor = readers = start_readers(start)
    producer = start("producer.py")
    assert producer.wait(30) == 1
    assert producer.out == ""
    [command] = producer.find(reports.NO_TOPIC)
    for reader in readers:
        wait_until(lambda: reader.find(reports.NO_PARTITIONS), "it reports why it waits")
    python, *arguments = shlex.split(command)
    assert python == "python"
    admin = start(command=[sys.executable, *arguments])
    assert admin.wait() == 0, admin.err
    assert witness.partitions() == [0, 1, 2]
    sent = printed_lines(send_events(start, 50))
    wait_until(lambda: printed_lines(consumer) == sent, "all events are printed")
    wait_until(lambda: processor.snapshots, "they are counted")
    assert_clean_stop(*readers)
    assert all(len(reader.find(reports.NO_PARTITIONS)) == 1 for reader in readers)


def test_ctrl_c_without_a_topic_and_with_an_unresponsive_broker(
    start: Start, broker: Broker, witness: Witness
) -> None:
    readers = start_readers(start)
    wait_until(
        lambda: witness.assignments() and witness.assignments("counting"), "they have joined"
    )
    with frozen(broker):
        time.sleep(3)  # so that they notice
        for reader in readers:
            reader.process.send_signal(signal.SIGINT)
        for reader in readers:
            assert reader.wait(15) == 0
            assert_plain_stderr(reader)


def test_events_that_are_deleted_while_scripts_run_are_skipped(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    send_events(start, 200)
    before = witness.messages()
    consumer, processor = readers = start_readers(start)
    wait_until(lambda: len(consumer.lines) == 200 and processor.snapshots, "they have read it all")
    with frozen(*readers):  # so they cannot read the next events before those are deleted
        time.sleep(1)  # a fetch that is waiting comes back empty
        witness.write((number % 3, b"key", event("deleted")) for number in range(300))
        log_ends = {message.partition: message.offset + 1 for message in witness.messages()}
        witness.delete_events_before(log_ends)
        witness.write((number % 3, b"key", event("left")) for number in range(30))
        after = witness.messages()
        assert len(after) == 30
    expected = sum_of_counts(counts_of(before), counts_of(after))
    wait_until(lambda: processor.snapshots[-1] == expected, "what is left is counted")
    wait_until(lambda: {*event_lines(after)} <= {*consumer.lines}, "what is left is printed")
    assert_clean_stop(*readers)

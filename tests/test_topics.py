"""A topic that is missing or changes, on a cluster that does not create topics by itself."""

import time
from collections.abc import Iterator

import pytest
import stderr_lines
from broker import Broker
from broker_settings import LIGHT
from events import event, event_lines
from scripts import Start, assert_clean_stop, frozen, send_events, start_readers, wait_until
from witness import Witness


@pytest.fixture(scope="module")
def broker(kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that does not create topics, instead of the usual one."""
    settings = LIGHT | {"KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false"}
    with Broker(tmp_path_factory.mktemp("broker"), environment=settings) as broker:
        yield broker


def test_a_missing_topic_is_waited_for(start: Start, witness: Witness) -> None:
    witness.delete_everything()
    consumer, processor = readers = start_readers(start)
    producer = start("producer.py")
    assert producer.wait(30) == 1  # after 10 s
    [reason] = producer.find(stderr_lines.STOPPED)
    assert "events" in reason
    assert producer.find(stderr_lines.DELIVERED) == [("0", "1")]
    for reader in readers:
        assert reader.err == "--- assigned partitions of events: none yet\n"
    witness.create_topic(3)
    sent = sorted(send_events(start, 50).lines)
    wait_until(lambda: sorted(consumer.lines) == sent, "all events are printed")
    wait_until(lambda: processor.snapshots, "they are counted")
    assert_clean_stop(*readers)


def test_deleted_events_are_skipped(start: Start, witness: Witness) -> None:
    witness.delete_everything()
    witness.create_topic(1)
    witness.write([(0, b"key", event("deleted"))] * 10)
    witness.delete_events_before({0: 10})
    witness.write([(0, b"key", event("left"))] * 5)
    consumer, processor = readers = start_readers(start)
    wait_until(lambda: processor.snapshots == [{"left": {"view": 5}}], "what is left is counted")
    wait_until(lambda: consumer.lines == event_lines(witness.messages()), "and printed")
    with frozen(*readers):  # so they cannot read the next events before those are deleted
        time.sleep(1)  # a fetch that is waiting comes back empty
        witness.write([(0, b"key", event("deleted"))] * 10)
        witness.delete_events_before({0: 25})
        witness.write([(0, b"key", event("left"))] * 5)
    wait_until(lambda: processor.snapshots[1:] == [{"left": {"view": 10}}], "the rest is counted")
    wait_until(lambda: len(consumer.lines) == 10, "and printed")
    assert_clean_stop(*readers)

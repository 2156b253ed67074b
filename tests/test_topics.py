"""A topic that the first script creates, that is missing, or whose first events are deleted."""

import re
from pathlib import Path

import pytest
import stderr_lines
from broker import Broker
from broker_settings import LIGHT
from events import event, event_lines
from scripts import SCRIPTS, Start, assert_clean_stop, send_events, start_readers, wait_until
from witness import Witness


@pytest.mark.parametrize("first", SCRIPTS)
def test_the_first_script_creates_the_topic(first: str, start: Start, witness: Witness) -> None:
    assert witness.partitions() == []
    script = start(first)
    wait_until(lambda: witness.partitions() == [0, 1, 2], "the topic has three partitions")
    wait_until(lambda: script.lines or script.assigned == [0, 1, 2], "the script is at work")
    assert_clean_stop(script)
    assert not re.search("error|not found|missing|retrying", script.err, re.IGNORECASE)


def test_a_missing_topic_is_waited_for(kafka: None, start: Start, tmp_path: Path) -> None:
    settings = LIGHT | {"KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false"}
    with Broker(tmp_path / "broker", environment=settings) as broker:
        consumer, processor = readers = start_readers(start, address=broker.address)
        producer = start("producer.py", address=broker.address)
        assert producer.wait(30) == 1  # after 10 s
        [reason] = producer.find(stderr_lines.STOPPED)
        assert "events" in reason
        assert producer.find(stderr_lines.DELIVERED) == [("0", "1")]
        for reader in readers:
            assert reader.err == "--- assigned partitions of events: none yet\n"
        Witness(broker.address).create_topic(3)
        sent = sorted(send_events(start, 50, address=broker.address).lines)
        wait_until(lambda: sorted(consumer.lines) == sent, "all events are printed")
        wait_until(lambda: processor.snapshots, "they are counted")
        assert_clean_stop(*readers)


def test_deleted_events_are_skipped(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("deleted"))] * 10)
    witness.delete_events_before(10)
    witness.write([(0, b"key", event("left"))] * 5)
    consumer, processor = readers = start_readers(start)
    wait_until(lambda: processor.snapshots == [{"left": {"view": 5}}], "what is left is counted")
    wait_until(lambda: consumer.lines == event_lines(witness.messages()), "and printed")
    assert_clean_stop(*readers)

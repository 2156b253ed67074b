"""The main job: what the producer sends, the consumers print and the processor counts."""

import itertools
import json
import re
import sys
import uuid
from datetime import datetime, timedelta

import pytest
from broker import ROOT
from confluent_kafka import Producer
from events import counts_of, event, event_lines
from scripts import (
    FULL_ASSIGNMENT,
    PARTIAL_ASSIGNMENT,
    SCRIPTS,
    TIMEOUT,
    Start,
    printed_lines,
    python,
    send_events,
    wait_until,
)
from witness import TOPIC, Witness, evenly_assigned

# Run a command on a terminal of its own, and pass on what it prints there.
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
ODD_USER_IDS = ("sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234")


def test_recurring_parts_are_the_same_in_all_scripts() -> None:
    """The settings and what follows the lesson, so that a reader has to read them only once."""

    def parts(first: str, last: str, *scripts: str) -> set[str]:
        """Return what is from the first line up to the last one, which is not included."""
        pattern = re.compile(rf"^{first}.*?(?=^{last})", re.MULTILINE | re.DOTALL)
        return {pattern.findall((ROOT / script).read_text())[0] for script in scripts}

    [settings] = parts("BOOTSTRAP_SERVERS = ", "log = ", *SCRIPTS)
    assert 'TOPIC = "events"' in settings
    [shared] = parts("class BrokerStatus", "def main", *SCRIPTS)
    assert "def connect(" in shared
    [generator] = parts("def polls", "class BrokerStatus", "consumer.py", "processor.py")
    assert "yield" in generator


@pytest.mark.parametrize("first", SCRIPTS)
def test_the_first_script_creates_the_topic_with_three_partitions(
    first: str, start: Start, witness: Witness
) -> None:
    assert witness.partitions() == []
    script = start(first)
    wait_until(lambda: witness.partitions() == [0, 1, 2], "the topic has three partitions")
    if first == "producer.py":
        wait_until(lambda: script.lines, "an event is printed")
    else:
        wait_until(lambda: "0, 1, 2" in script.err, "it is assigned all partitions")
    assert script.stop() == 0
    assert not re.search("error|not found|Traceback", script.err, re.IGNORECASE)


def test_producer_sends_json_events_keyed_by_user_id(start: Start, witness: Witness) -> None:
    send_events(start, 500)
    messages = witness.messages()
    events = [json.loads(message.value or b"") for message in messages]
    for fields in events:
        assert list(fields) == ["event_id", "user_id", "action", "timestamp"]
        assert str(uuid.UUID(fields["event_id"])) == fields["event_id"]
        assert datetime.fromisoformat(fields["timestamp"]).utcoffset() == timedelta(0)
    assert len({fields["event_id"] for fields in events}) == len(events) == 500
    assert {fields["action"] for fields in events} == {"view", "click", "add_to_cart", "purchase"}
    assert [message.key for message in messages] == [
        fields["user_id"].encode() for fields in events
    ]
    partitions = {message.key: message.partition for message in messages}
    assert [partitions[user_id.encode()] for user_id in ODD_USER_IDS] == [0, 1, 2]
    assert len(partitions) == 6
    for key in partitions:
        times = [e["timestamp"] for e in events if e["user_id"].encode() == key]
        assert times == sorted(times)  # one partition, so the events are in order
    other_client = Producer({**witness.settings, "partitioner": "murmur2_random"})
    for key in partitions:
        other_client.produce(TOPIC, b"another client's", key)
    assert other_client.flush(TIMEOUT) == 0
    # It chooses the same partitions.
    assert {(m.key, m.partition) for m in witness.messages()} == {*partitions.items()}


def test_producer_keeps_its_interval(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--count", "12", "--interval", "0.2")
    assert producer.wait() == 0
    times = sorted(json.loads(m.value or b"")["timestamp"] for m in witness.messages())
    moments = [datetime.fromisoformat(time).timestamp() for time in times]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(moments))
    assert gaps[0] >= 0.19
    assert gaps[len(gaps) // 2] < 0.4  # the median: some gaps are longer on a busy machine


def test_an_event_is_printed_as_soon_as_it_is_acknowledged(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "3600")
    wait_until(lambda: producer.lines, "the first event is printed, long before the second is due")
    assert producer.lines == event_lines(witness.messages())
    assert producer.stop() == 0
    assert producer.err == "--- 1 delivered, 0 failed\n"


def test_two_consumers_share_the_partitions(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py")]
    wait_until(
        lambda: "events: 0, 1, 2\n" in consumers[0].err, "the first is assigned all partitions"
    )
    consumers.append(start("consumer.py"))
    wait_until(evenly_assigned(witness, 2), "both are assigned partitions")
    for consumer, number in zip(consumers, (2, 1), strict=True):
        numbers = ", ".join(number * [r"\d"])
        report = rf"^--- assigned partitions of events: {numbers}\n\Z"
        wait_until(lambda: re.search(report, consumer.err, re.MULTILINE), "it reports them")
    producer = send_events(start, 600)
    wait_until(lambda: len(printed_lines(*consumers)) >= 600, "all events are printed")
    for consumer in consumers:
        assert consumer.stop() == 0
        assert len(consumer.lines) > 0
    assert printed_lines(*consumers) == printed_lines(producer)
    partitions = [{line.split()[0] for line in consumer.lines} for consumer in consumers]
    assert partitions[0].isdisjoint(partitions[1])


def test_processor_counts_what_was_sent(start: Start, witness: Witness) -> None:
    send_events(start, 1997)
    witness.write((number, None, event("alice", "click")) for number in range(3))
    expected = counts_of(witness.messages())  # alice has events in each partition
    for _ in range(2):  # a restart changes nothing
        processor = start("processor.py")
        wait_until(lambda: processor.snapshots, "counts are printed")
        assert processor.stop() == 0
        assert processor.snapshots == [expected]  # whole, and printed only once
        assert processor.err.endswith(f"{FULL_ASSIGNMENT}--- leaving the group\n")  # no progress
    assert processor.out == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert witness.committed() == {}


def test_processor_prints_changes_at_most_once_a_second(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--count", "300", "--interval", "0.01")
    wait_until(lambda: producer.lines, "the first event is sent")
    processor = start("processor.py")
    assert producer.wait() == 0
    expected = counts_of(witness.messages())
    wait_until(
        lambda: processor.snapshots and processor.snapshots[-1] == expected, "all is counted"
    )
    assert processor.stop() == 0
    *regular, last = processor.snapshots
    assert last == expected
    assert all(one != two for one, two in itertools.pairwise(regular))
    # 300 events take about 3 s (more on a slow machine, where there is time for more snapshots).
    times = [json.loads(m.value or b"")["timestamp"] for m in witness.messages()]
    span = datetime.fromisoformat(max(times)) - datetime.fromisoformat(min(times))
    assert len(regular) <= span.total_seconds() + 3


def test_processor_counts_its_partitions_and_takes_no_events_from_consumers(
    start: Start, witness: Witness
) -> None:
    consumers = [start("consumer.py"), start("consumer.py")]
    wait_until(evenly_assigned(witness, 2), "the consumers share the partitions")
    processor = start("processor.py")
    wait_until(evenly_assigned(witness, 3), "and the processor is assigned one")
    producer = send_events(start, 900)
    [number] = wait_until(
        lambda: re.findall(PARTIAL_ASSIGNMENT, processor.err), "it reports what it counts"
    )
    expected = counts_of(m for m in witness.messages() if m.partition == int(number))
    wait_until(
        lambda: processor.snapshots and processor.snapshots[-1] == expected,
        "it counts its partition",
    )
    another_group = start("processor.py", "--group", "all")
    wait_until(lambda: another_group.snapshots, "counts are printed")
    assert another_group.snapshots[0] == counts_of(witness.messages())

    assert processor.stop() == 0
    assert processor.snapshots[-1] == expected
    wait_until(
        lambda: len(printed_lines(*consumers)) >= 900, "the consumers print what it has read"
    )
    for consumer in consumers:
        assert consumer.stop() == 0
    assert printed_lines(*consumers) == printed_lines(producer)


def test_on_a_terminal_each_partial_snapshot_is_followed_by_the_assignment(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    consumers = [start("consumer.py"), start("consumer.py")]
    wait_until(evenly_assigned(witness, 2), "the consumers share the partitions")
    processor = start(command=[*TERMINAL, *python("processor.py")])
    for number in range(1, 4):
        wait_until(
            lambda: len(re.findall(r"^\}\r$", processor.out, re.MULTILINE)) >= number, "counts"
        )
        witness.write((partition, b"key", event(f"user {partition}")) for partition in range(3))
    for consumer in consumers:
        assert consumer.stop() == 0
    wait_until(lambda: FULL_ASSIGNMENT.strip() in processor.out, "it is assigned all partitions")
    partial, _, full = processor.out.replace("\r", "").partition(FULL_ASSIGNMENT)
    first, *snapshots = re.split(r"^\{$", partial, flags=re.MULTILINE)
    assert re.search(rf"{PARTIAL_ASSIGNMENT}\n\Z", first)  # before the first snapshot
    assert len(snapshots) >= 3
    for snapshot in snapshots:
        assert re.search(
            rf"^\}}\n{PARTIAL_ASSIGNMENT}\n$", snapshot, re.MULTILINE
        )  # and below each
    wait_until(lambda: processor.out.endswith("}\r\n"), "everything is counted")
    assert "counting" not in full

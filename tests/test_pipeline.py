"""The main job, on a real broker: what is sent is shown and counted, once."""

import itertools
import json
import re
import sys
import uuid
from datetime import datetime, timedelta

import pytest
from broker import ROOT
from confluent_kafka import Producer
from harness import (
    NONE_YET,
    PART,
    PATIENCE,
    SCRIPTS,
    TOPIC,
    Start,
    Witness,
    choosing,
    count,
    event,
    line,
    patched,
    produce,
    python,
    settled,
    shown,
    until,
)

COUNTS_ALL = "--- counting partitions of events: 0, 1, 2: all\n"
# Runs a command on a terminal of its own, and passes on what that shows.
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
USERS = ("sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234")


def test_what_recurs_is_the_same_in_all_scripts() -> None:
    settings, armour = set(), set()
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        [found] = re.findall(r"^BOOTSTRAP_SERVERS = .*?^SECURITY = .*?$", text, re.M | re.S)
        settings.add(found)
        [found] = re.findall(r"^# From here to main.*?(?=^def main)", text, re.M | re.S)
        armour.add(found.strip())
    assert len(settings) == len(armour) == 1
    assert 'TOPIC = "events"' in settings.pop()
    assert len(armour.pop().splitlines()) <= 35


@pytest.mark.parametrize("first", SCRIPTS)
def test_whoever_comes_first_creates_the_topic(first: str, start: Start, witness: Witness) -> None:
    assert witness.partitions() == []
    script = start(first)
    until(lambda: witness.partitions() == [0, 1, 2], "the topic has three partitions")
    if first == "producer.py":
        until(lambda: script.lines, "an event is shown")
    else:
        until(lambda: "0, 1, 2" in script.err, "it has all partitions")
    assert script.stop() == 0
    assert not re.search("error|not found|Traceback", script.err, re.IGNORECASE)


def test_what_the_producer_writes(start: Start, witness: Witness) -> None:
    produce(start, 500)
    log = witness.log()
    events = [json.loads(message.value or b"") for message in log]
    for fields in events:
        assert list(fields) == ["event_id", "user_id", "action", "timestamp"]
        assert str(uuid.UUID(fields["event_id"])) == fields["event_id"]
        assert datetime.fromisoformat(fields["timestamp"]).utcoffset() == timedelta(0)
    assert len({fields["event_id"] for fields in events}) == len(events) == 500
    assert {fields["action"] for fields in events} == {"view", "click", "add_to_cart", "purchase"}
    assert [message.key for message in log] == [fields["user_id"].encode() for fields in events]
    homes = {message.key: message.partition for message in log}
    assert [homes[user.encode()] for user in USERS] == [0, 1, 2]
    assert len(homes) == 6
    for user in homes:
        times = [f["timestamp"] for f in events if f["user_id"].encode() == user]
        assert times == sorted(times)  # in order, for they are on one partition,
    client = Producer({**witness.settings, "partitioner": "murmur2_random"})
    for key in homes:
        client.produce(TOPIC, b"theirs", key)
    assert client.flush(PATIENCE) == 0
    places = {(message.key, message.partition) for message in witness.log()}
    assert places == {*homes.items()}  # and on that where another client puts them


def test_producer_keeps_its_interval(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--count", "12", "--interval", "0.2")
    assert producer.wait() == 0
    times = sorted(json.loads(m.value or b"")["timestamp"] for m in witness.log())
    moments = [datetime.fromisoformat(time).timestamp() for time in times]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(moments))
    assert gaps[0] >= 0.19
    assert gaps[len(gaps) // 2] < 0.4  # the median, for a machine that stumbles


def test_an_event_is_shown_as_soon_as_it_is_confirmed(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "3600")
    until(lambda: producer.lines, "the first event is shown, long before the second is due")
    assert shown(producer) == [line(message) for message in witness.log()]
    assert producer.stop() == 0
    assert producer.err == "--- 1 delivered, 0 failed\n"


def test_a_key_may_be_a_number(start: Start, witness: Witness) -> None:
    arguments = ("producer.py", "--count", "3", "--interval", "0")
    producer = start(command=patched(choosing("7"), *arguments))
    assert producer.wait() == 0
    log = witness.log()
    assert [message.key for message in log] == [b"7"] * 3
    assert shown(producer) == sorted(map(line, log))


def test_a_mistake_in_an_event_is_a_traceback_and_a_tally(start: Start, witness: Witness) -> None:
    producer = start(command=patched(choosing("left.pop()"), "producer.py", "--interval", "0"))
    assert producer.wait() == 1
    assert "--- 2 delivered, 0 failed\nTraceback" in producer.err
    assert "IndexError: pop from empty list" in producer.err
    assert shown(producer) == [line(message) for message in witness.log()]


def test_two_consumers_share_the_partitions(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py")]
    until(lambda: "events: 0, 1, 2\n" in consumers[0].err, "the first has all partitions")
    consumers.append(start("consumer.py"))
    until(settled(witness, 2), "both have partitions")
    for consumer, number in zip(consumers, (2, 1), strict=True):
        share = ", ".join(number * [r"\d"])
        said = rf"^--- partitions of events: {share}\n\Z"
        until(lambda: re.search(said, consumer.err, re.MULTILINE), "it says what it has")
    producer = produce(start, 600)
    until(lambda: len(shown(*consumers)) >= 600, "all events are shown")
    for consumer in consumers:
        assert consumer.stop() == 0
        assert len(consumer.lines) > 0
    assert shown(*consumers) == shown(producer)
    owners = [{text.split()[0] for text in consumer.lines} for consumer in consumers]
    assert owners[0].isdisjoint(owners[1])


def test_a_restarted_consumer_neither_repeats_nor_misses(start: Start, witness: Witness) -> None:
    """It commits what it has shown, and nothing more."""
    producers, consumers = [], []
    for _ in range(2):
        producers.append(produce(start, 300))
        ends = {message.partition: message.offset + 1 for message in witness.log()}
        consumers.append(start("consumer.py"))
        until(lambda: len(shown(*consumers)) >= 300 * len(producers), "the new events are shown")
        until(lambda: witness.committed() == ends, "they are committed")
        producers.append(produce(start, 300))
        until(lambda: len(shown(*consumers)) >= 300 * len(producers), "and those that come then")
        assert consumers[-1].stop() == 0
    assert shown(*consumers) == shown(*producers)


def test_consumers_coming_and_leaving_show_each_event_once(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumers = [start("consumer.py")]
    for _ in range(3):
        seen = len(shown(*consumers))
        until(lambda: len(shown(*consumers)) > seen + 50, "events are shown")
        consumers.append(start("consumer.py"))
        until(lambda: consumers[-1].lines, "the new one shows some")
        assert consumers[-2].stop() == 0
    assert producer.stop() == 0
    until(lambda: len(shown(*consumers)) >= len(producer.lines), "all events are shown")
    assert consumers[-1].stop() == 0
    assert shown(*consumers) == shown(producer)


def test_processor_counts_what_was_sent(start: Start, witness: Witness) -> None:
    produce(start, 1997)
    witness.write((number, None, event("alice", "click")) for number in range(3))
    expected = count(witness.log())  # of which alice has some on each partition
    for _ in range(2):  # a restart counts the same
        processor = start("processor.py")
        until(lambda: processor.snapshots, "counts are shown")
        assert processor.stop() == 0
        assert processor.snapshots == [expected]  # whole at once, and only once
        assert processor.err.endswith(f"{COUNTS_ALL}--- leaving the group\n")  # not of progress
    assert processor.out == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert witness.committed() == {}


def test_processor_prints_when_something_changed_and_at_most_once_a_second(
    start: Start, witness: Witness
) -> None:
    producer = start("producer.py", "--count", "300", "--interval", "0.01")
    until(lambda: producer.lines, "the first event is sent")
    processor = start("processor.py")
    assert producer.wait() == 0
    expected = count(witness.log())
    until(lambda: processor.snapshots and processor.snapshots[-1] == expected, "all is counted")
    assert processor.stop() == 0
    *before_the_end, last = processor.snapshots
    assert last == expected
    assert all(one != two for one, two in itertools.pairwise(before_the_end))
    # 300 events take about 3 s (more on a slow machine, where there is time for more snapshots).
    times = [json.loads(m.value or b"")["timestamp"] for m in witness.log()]
    span = datetime.fromisoformat(max(times)) - datetime.fromisoformat(min(times))
    assert len(before_the_end) <= span.total_seconds() + 3


def test_processor_beside_two_consumers_counts_its_share(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py"), start("consumer.py")]
    until(settled(witness, 2), "the consumers share the partitions")
    processor = start("processor.py")
    until(settled(witness, 3), "and the processor has one")
    producer = produce(start, 900)
    [mine] = until(lambda: re.findall(PART, processor.err), "it says what it counts")
    expected = count(m for m in witness.log() if m.partition == int(mine))
    until(lambda: processor.snapshots and processor.snapshots[-1] == expected, "its share")
    everything = start("processor.py", "--group", "all")
    until(lambda: everything.snapshots, "counts are shown")
    assert everything.snapshots[0] == count(witness.log())

    assert processor.stop() == 0
    assert processor.snapshots[-1] == expected
    until(lambda: len(shown(*consumers)) >= 900, "what it had read is still the consumers' to show")
    for consumer in consumers:
        assert consumer.stop() == 0
    assert shown(*consumers) == shown(producer)


def test_a_fourth_member_holds_nothing_until_another_leaves(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py") for _ in range(3)]
    until(settled(witness, 3), "each consumer has a partition")
    fourth, processor = start("consumer.py"), start("processor.py")
    until(lambda: fourth.err.startswith(f"--- {NONE_YET}"), "it says why it has none")
    said = f"--- counting {NONE_YET} (all: --group NAME)\n"
    until(lambda: processor.err.endswith(said), "it says that it holds nothing")
    assert processor.err.startswith(said)
    assert processor.stop() == 0
    assert processor.snapshots == []
    assert consumers[0].stop() == 0
    taken = r"^--- partitions of events: \d$"
    until(lambda: re.search(taken, fourth.err, re.MULTILINE), "it takes over")


def test_a_part_says_under_every_snapshot_that_it_is_one(start: Start, witness: Witness) -> None:
    witness.create(3)
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    consumers = [start("consumer.py"), start("consumer.py")]
    until(settled(witness, 2), "the consumers share the partitions")
    processor = start(command=[*TERMINAL, *python("processor.py")])
    for number in range(1, 4):
        until(lambda: len(re.findall(r"^\}\r$", processor.out, re.MULTILINE)) >= number, "counts")
        witness.write((partition, b"key", event(f"user {partition}")) for partition in range(3))
    for consumer in consumers:
        assert consumer.stop() == 0
    until(lambda: COUNTS_ALL.strip() in processor.out, "it has everything")
    seen = processor.out.replace("\r", "")
    part, _, everything = seen.partition(COUNTS_ALL)
    first, *snapshots = re.split(r"^\{$", part, flags=re.MULTILINE)
    assert re.search(rf"{PART}\n\Z", first)  # before the first snapshot
    assert len(snapshots) >= 3
    for snapshot in snapshots:
        assert re.search(rf"^\}}\n{PART}\n$", snapshot, re.MULTILINE)  # and under each
    until(lambda: processor.out.endswith("}\r\n"), "everything is counted")
    assert "counting" not in everything

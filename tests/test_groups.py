"""Consumer groups: which partitions a member is assigned, when it joins, is stuck, or leaves."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
from broker import Broker
from confluent_kafka import Consumer
from conftest import CHEAP_BROKER
from events import counts_of, event, event_lines, sum_of_counts
from proxy import HEARTBEAT, SYNC_GROUP, Proxy
from scripts import (
    NO_PARTITIONS,
    PARTIAL_ASSIGNMENT,
    Pipe,
    Script,
    Start,
    assert_few_plain_lines,
    patched,
    printed_lines,
    wait_until,
)
from witness import GROUP_ID, TOPIC, Witness, evenly_assigned


def test_a_fourth_member_is_assigned_nothing_until_another_leaves(
    start: Start, witness: Witness
) -> None:
    consumers = [start("consumer.py") for _ in range(3)]
    wait_until(evenly_assigned(witness, 3), "each consumer is assigned a partition")
    fourth, processor = start("consumer.py"), start("processor.py")
    report = f"--- assigned partitions of events: {NO_PARTITIONS}\n"
    wait_until(lambda: fourth.err == report, "it reports that it is assigned none")
    report = f"--- counting partitions of events: {NO_PARTITIONS} (--group NAME counts all)\n"
    wait_until(lambda: processor.err == report, "it reports that it counts nothing")
    assert processor.stop() == 0
    assert processor.snapshots == []
    assert consumers[0].stop() == 0
    report = r"^--- assigned partitions of events: \d$"
    wait_until(lambda: re.search(report, fourth.err, re.MULTILINE), "a partition is assigned to it")


def test_nothing_is_lost_while_members_join_leave_and_crash_at_random(
    start: Start, witness: Witness
) -> None:
    rng = random.Random(20261123)
    producer = start("producer.py", "--interval", "0.02")
    members = [start("consumer.py"), start("processor.py")]
    stopped: list[Script] = []
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if len(members) < 2 or (len(members) < 6 and rng.random() < 0.6):
            members.append(start(rng.choice(["consumer.py", "processor.py"])))
        else:
            member = members.pop(rng.randrange(len(members)))
            signum = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            wait_until(member.is_connected, "it is connected")
            # A signal that arrives before it has connected stops it like any program.
            assert member.stop(signum) in ((-signum,) if signum == signal.SIGKILL else (0, -signum))
            stopped.append(member)
        time.sleep(rng.uniform(0.2, 2))
    assert producer.stop() == 0
    messages = witness.messages()
    processors = [member for member in members if "processor.py" in member.command[1]]
    processors.append(start("processor.py"))
    consumers = [m for m in (*members, *stopped) if "consumer.py" in m.command[1]]
    for consumer in consumers:
        if consumer in members:
            wait_until(lambda: consumer.err, "it has joined the group")
            assert consumer.stop() == 0
    wait_until(
        evenly_assigned(witness, len(processors)), "all partitions are assigned to the processors"
    )
    wait_until(
        lambda: (
            sum_of_counts(*(p.snapshots[-1] for p in processors if p.snapshots))
            == counts_of(messages)
        ),
        "their counts add up",
    )
    for processor in processors:
        assert processor.stop() == 0
    consumers.append(start("consumer.py"))
    everything = {*event_lines(messages)}
    wait_until(lambda: {*printed_lines(*consumers)} == everything, "every event is printed")
    for member in (*members, *stopped):
        assert_few_plain_lines(member)


def test_a_member_with_blocked_output_does_not_stop_the_group(
    start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event()) for number in range(3000))
    start(command=pipe.as_stdout_of(patched("tenth_of_poll_interval", "consumer.py")))
    wait_until(pipe.is_full, "the pipe is full")
    consumer = start("consumer.py")
    # The script's 30 s are 3 s here; kafka-python's default of 5 minutes would be 30 s.
    wait_until(lambda: "events: 0, 1, 2\n" in consumer.err, "it is assigned everything", timeout=20)
    wait_until(lambda: len(consumer.lines) == 3000, "it prints what the other has not committed")
    assert consumer.stop() == 0


@pytest.mark.parametrize("script", ["consumer.py", "processor.py"])
def test_a_removed_member_rejoins_and_reports_its_assignment_again(
    script: str, start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    member = start(command=pipe.as_stdout_of(patched("tenth_of_poll_interval", script)))
    wait_until(pipe.is_full, "the pipe is full")
    wait_until(lambda: witness.assignments() == [], "the member is removed from the group")
    # The same partition as before.
    wait_until(lambda: pipe.read() and member.err.count("events: 0") == 2, "it reports it again")
    if script == "consumer.py":
        assert "--- removed from the group; the last events may be printed again\n" in member.err
        wait_until(lambda: pipe.read().count(b"\n") >= 6000, "the events are printed again")
        wait_until(lambda: witness.committed() == {0: 3000}, "they are committed")
    assert member.stop() == 0


def test_the_first_member_reports_its_partitions_first(start: Start, tmp_path: Path) -> None:
    """Also on a broker with the default settings, where it is assigned them after 3 s."""
    environment = CHEAP_BROKER | {"KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "3000"}
    with Broker(tmp_path, environment=environment) as broker:
        consumer = start("consumer.py", address=broker.address)
        processor = start("processor.py", "--group", "counting", address=broker.address)
        for reader, report in ((consumer, "assigned"), (processor, "counting")):
            wait_until(lambda: reader.err, "it reports something")
            assert reader.err.startswith(f"--- {report} partitions of events: 0, 1, 2")
            assert reader.stop() == 0


@pytest.mark.xdist_group("proxy")
def test_members_send_a_heartbeat_twice_a_second(start: Start, proxy: Proxy) -> None:
    """So that they notice soon when the group rebalances."""
    heartbeats: list[float] = []

    def note_heartbeats(api_key: int) -> bool:
        if api_key == HEARTBEAT:
            heartbeats.append(time.monotonic())
        return True

    proxy.lets_pass = note_heartbeats
    for script in ("consumer.py", "processor.py"):
        Witness(proxy.address).create_topic(3)
        reader = start(script, address=proxy.address)
        wait_until(lambda: "0, 1, 2" in reader.err, "it is assigned all partitions")
        heartbeats.clear()
        wait_until(lambda: len(heartbeats) == 8, "there are some heartbeats")
        assert heartbeats[-1] - heartbeats[0] < 12  # 3.5 s; 21 s with kafka-python's default of 3 s
        assert reader.stop() == 0


def test_consumer_waits_for_a_group_with_another_assignor(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write([(0, b"key", event())])
    other = Consumer(
        {**witness.settings, "group.id": GROUP_ID, "partition.assignment.strategy": "range"}
    )
    other.subscribe([TOPIC])
    wait_until(lambda: other.poll(0.1) or other.assignment(), "the other member has joined")
    consumer = start("consumer.py")
    wait_until(
        lambda: "InconsistentGroupProtocolError" in consumer.err, "it reports why it has to wait"
    )
    other.close()
    wait_until(lambda: consumer.lines, "it continues when the other member has left")
    assert consumer.stop() == 0
    assert_few_plain_lines(consumer)


def test_processor_shares_a_group_with_a_member_of_the_new_protocol(
    start: Start, witness: Witness
) -> None:
    """librdkafka's group.protocol=consumer (KIP-848) is supported in the same group."""
    witness.create_topic(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(30))
    other = Consumer({**witness.settings, "group.id": GROUP_ID, "group.protocol": "consumer"})
    other.subscribe([TOPIC])
    wait_until(
        lambda: other.poll(0.1) or len(other.assignment()) == 3, "all partitions are assigned to it"
    )
    processor = start("processor.py")

    def is_counting() -> bool:
        other.poll(0.1)
        return bool(re.search(PARTIAL_ASSIGNMENT, processor.err) and processor.snapshots)

    wait_until(is_counting, "it reports what it counts, and prints counts")
    assigned = re.findall(PARTIAL_ASSIGNMENT, processor.err)[-1].split(", ")
    assert processor.snapshots[-1].keys() == {f"user {partition}" for partition in assigned}
    other.close()
    wait_until(
        lambda: processor.err.endswith("0, 1, 2 (all)\n"), "it counts all when the other has left"
    )
    assert processor.stop() == 0


@pytest.mark.xdist_group("proxy")
@pytest.mark.parametrize("script", ["consumer.py", "processor.py"])
def test_a_join_that_takes_longer_than_a_poll_is_completed(
    script: str, start: Start, proxy: Proxy
) -> None:
    def delay_join(api_key: int) -> bool:
        if api_key == SYNC_GROUP:  # the last step of a join; poll() returns earlier
            time.sleep(2)
        return True

    witness = Witness(proxy.address)
    reader = start(script, address=proxy.address)
    wait_until(lambda: witness.assignments() == [[]], "it leads the group; there is no topic yet")
    proxy.lets_pass = delay_join
    witness.create_topic(3)
    witness.write([(2, b"key", event())])
    wait_until(lambda: reader.lines, "it reads its partitions", timeout=30)
    assert reader.stop() == 0


def test_a_signal_stops_all_scripts_and_they_leave_the_group(
    start: Start, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumer, processor = start("consumer.py"), start("processor.py")
    wait_until(lambda: consumer.lines and processor.snapshots, "all are running")
    for script in (producer, consumer, processor):
        assert script.stop(signal.SIGTERM, timeout=20) == 0
        assert "Traceback" not in script.err
    assert witness.assignments() == []
    # The last line is the script's own, so that the shell's prompt does not follow ^C.
    assert re.fullmatch(r"--- \d+ delivered, 0 failed", producer.err.splitlines()[-1])
    for reader in (consumer, processor):
        assert reader.err.splitlines()[-1] == "--- leaving the group"

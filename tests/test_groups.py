"""Consumer groups: members share the partitions, and report what is assigned to them."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
import reports
from broker import Broker
from broker_settings import LIGHT
from events import event
from proxy import HEARTBEAT, SYNC_GROUP, Proxy
from scripts import (
    Pipe,
    Start,
    assert_clean_stop,
    assert_plain_stderr,
    printed_lines,
    script_command,
    send_events,
    wait_until,
)
from witness import Witness

# A member is removed after 3 s without a poll(), not after 30 s.
SHORT_POLL_INTERVAL = {"clients.divide_timeouts": {"max_poll_interval_ms": 10}}
# Runs a command on a terminal of its own, and writes what that shows to stdout.
ON_A_TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]


def test_two_consumers_share_the_partitions(start: Start, witness: Witness) -> None:
    first = start("consumer.py")
    wait_until(lambda: first.assigned == [0, 1, 2], "the first reports all partitions")
    second = start("consumer.py")
    wait_until(lambda: witness.group_is_balanced(2), "both have partitions")
    wait_until(lambda: len(first.assigned or []) == 2, "the first reports two")
    wait_until(lambda: len(second.assigned or []) == 1, "the second reports one")
    assigned = [consumer.assigned for consumer in (first, second)]
    sent = printed_lines(send_events(start, 600))
    wait_until(lambda: printed_lines(first, second) == sent, "all events are printed")
    partitions = [{int(line[len("partition=")]) for line in c.lines} for c in (first, second)]
    assert [sorted(numbers) for numbers in partitions] == assigned
    assert_clean_stop(first, second)


def test_a_fourth_member_waits_until_another_leaves(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py") for _ in range(3)]
    wait_until(lambda: witness.group_is_balanced(3), "each consumer has a partition")
    fourth, processor = start("consumer.py"), start("processor.py")
    for member in (fourth, processor):
        wait_until(lambda: member.find(reports.NO_PARTITIONS), "it reports that it has none")
        assert len(member.err.splitlines()) == 1
    assert_clean_stop(processor)
    assert processor.snapshots == []
    assert_clean_stop(consumers[0])
    wait_until(lambda: len(fourth.assigned or []) == 1, "it is assigned a partition")


def test_members_leave_the_group_when_they_are_terminated(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumer, processor = start("consumer.py"), start("processor.py")
    wait_until(lambda: consumer.lines and processor.snapshots, "all are at work")
    for script in (producer, consumer, processor):
        assert script.stop(signal.SIGTERM, timeout=20) == 0
        assert_plain_stderr(script)
    assert witness.assignments() == []
    # The last line is the script's own, so that the prompt does not follow ^C.
    for reader in (consumer, processor):
        assert re.match(reports.LEAVING, reader.err.splitlines()[-1])


def test_a_member_with_blocked_output_does_not_stop_the_group(
    start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event()) for number in range(3000))
    start("consumer.py", patches=SHORT_POLL_INTERVAL, stdout=pipe.write_end)
    wait_until(pipe.is_full, "the pipe is full")
    consumer = start("consumer.py")
    # The script's 30 s are 3 s here; kafka-python's default of 5 minutes would be 30 s.
    wait_until(lambda: consumer.assigned == [0, 1, 2], "another member has all partitions", 20)
    wait_until(lambda: len(consumer.lines) == 3000, "it prints what is not committed")
    assert_clean_stop(consumer)


@pytest.mark.parametrize("name", ["consumer.py", "processor.py"])
def test_a_removed_member_rejoins_and_reports_its_assignment_again(
    name: str, start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    member = start(name, patches=SHORT_POLL_INTERVAL, stdout=pipe.write_end)
    wait_until(pipe.is_full, "the pipe is full")
    wait_until(lambda: witness.assignments() == [], "the member is removed from the group")
    wait_until(
        lambda: pipe.read() and member.find(reports.ASSIGNMENT) == ["0", "0"],
        "it reports the same partition again",
    )
    if name == "consumer.py":
        assert member.find(reports.REMOVED)
        wait_until(lambda: pipe.read().count(b"\n") >= 6000, "all events are printed again")
        wait_until(lambda: witness.committed() == {0: 3000}, "they are committed")
    assert_clean_stop(member)


def test_a_first_member_reports_its_partitions_and_nothing_before(
    start: Start, tmp_path: Path
) -> None:
    """Also on a broker with Kafka's default, with which they are assigned after 3 s."""
    settings = LIGHT | {"KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "3000"}
    with Broker(tmp_path, environment=settings) as broker:
        consumer = start("consumer.py", address=broker.address)
        processor = start("processor.py", "--group", "counting", address=broker.address)
        for reader in (consumer, processor):
            wait_until(lambda: reader.err, "it reports something")
            assert reader.assigned == [0, 1, 2]
        assert_clean_stop(consumer, processor)


@pytest.mark.parametrize("name", ["consumer.py", "processor.py"])
def test_a_member_sends_a_heartbeat_twice_a_second(
    name: str, start: Start, witness: Witness, proxy: Proxy
) -> None:
    """So that it notices soon when the group rebalances."""
    heartbeats: list[float] = []

    def note_heartbeats(api_key: int) -> bool:
        if api_key == HEARTBEAT:
            heartbeats.append(time.monotonic())
        return True

    reader = start(name, address=proxy.address)
    wait_until(lambda: reader.assigned == [0, 1, 2], "it has all partitions")
    proxy.pass_response = note_heartbeats
    wait_until(lambda: len(heartbeats) == 8, "there are some heartbeats")
    # 3.5 s, or 21 s with kafka-python's default of 3 s.
    assert heartbeats[-1] - heartbeats[0] < 12


def test_on_a_terminal_a_part_is_reported_under_every_snapshot(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    consumers = [start("consumer.py"), start("consumer.py")]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    processor = start(command=[*ON_A_TERMINAL, *script_command("processor.py")])

    def shown() -> str:
        return processor.out.replace("\r", "")

    for number in range(1, 4):
        wait_until(lambda: shown().count("\n}\n") >= number, "a snapshot is printed")
        witness.write((partition, b"key", event(f"user {partition}")) for partition in range(3))
    assert_clean_stop(*consumers)
    wait_until(
        lambda: re.search(reports.COUNTING_ALL, shown(), re.MULTILINE), "it has all partitions"
    )
    wait_until(lambda: shown().endswith("}\n"), "everything is counted")
    part, _, everything = re.split(reports.COUNTING_ALL, shown(), flags=re.MULTILINE)
    first, *snapshots = re.split(r"^\{$", part, flags=re.MULTILINE)
    assert len(snapshots) >= 3
    for text in (first, *snapshots):  # before the first snapshot, and under each
        assert re.fullmatch(reports.COUNTING_PART, text.splitlines()[-1])
    assert "counting" not in everything


@pytest.mark.parametrize("name", ["consumer.py", "processor.py"])
def test_a_join_that_takes_longer_than_a_poll_is_completed(
    name: str, start: Start, witness: Witness, proxy: Proxy
) -> None:
    def pass_slowly(api_key: int) -> bool:
        if api_key == SYNC_GROUP:  # the last step of joining
            time.sleep(2)
        return True

    witness.create_topic(1)
    reader = start(name, address=proxy.address)
    wait_until(lambda: reader.assigned == [0], "it is the group's leader")
    proxy.pass_response = pass_slowly
    witness.add_partitions(3)
    witness.write([(2, b"key", event())])
    wait_until(lambda: reader.assigned == [0, 1, 2], "it is assigned the new partitions", 30)
    wait_until(lambda: reader.lines[-1:] not in ([], ["{}"]), "it reads the event")
    assert_clean_stop(reader)

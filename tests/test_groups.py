"""Consumer groups: members share the partitions, and report what is assigned to them."""

import signal

import pytest
import stderr_lines
from events import event
from proxy import SYNC_GROUP, Proxy
from scripts import Pipe, Start, assert_clean_stop, printed_lines, send_events, wait_until
from witness import Witness


def test_two_consumers_share_the_partitions(start: Start, witness: Witness) -> None:
    first = start("consumer.py")
    wait_until(lambda: first.assigned == [0, 1, 2], "the first reports all partitions")
    second = start("consumer.py")
    wait_until(lambda: len(first.assigned or []) == 2, "the first reports two")
    wait_until(lambda: len(second.assigned or []) == 1, "the second reports one")
    assigned = [consumer.assigned for consumer in (first, second)]
    sent = printed_lines(send_events(start, 600))
    wait_until(lambda: printed_lines(first, second) == sent, "all events are printed")
    partitions = [{int(line[len("partition=")]) for line in c.lines} for c in (first, second)]
    assert [sorted(numbers) for numbers in partitions] == assigned
    assert_clean_stop(first, second)
    assert witness.assignments() == []  # they have left the group


def test_a_fourth_member_waits_until_another_leaves(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py") for _ in range(3)]
    wait_until(lambda: witness.group_is_balanced(3), "each consumer has a partition")
    fourth, processor = start("consumer.py"), start("processor.py")
    wait_until(lambda: len(witness.assignments()) == 5, "both have joined")
    for member in (fourth, processor):
        wait_until(lambda: member.assigned == [], "it reports that it has no partition")
    assert_clean_stop(processor, signum=signal.SIGTERM)
    assert processor.snapshots == []
    assert_clean_stop(consumers[0], signum=signal.SIGTERM)
    wait_until(lambda: len(fourth.assigned or []) == 1, "it is assigned a partition")


@pytest.mark.parametrize("name", ["consumer.py", "processor.py"])
def test_a_stuck_member_is_removed(name: str, start: Start, witness: Witness) -> None:
    """So that it does not stop the whole group; after 3 s here, which stand for 30 s."""
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    pipe = Pipe()
    sooner = ("max_poll_interval_ms=30_000", "max_poll_interval_ms=3_000")
    member = start(name, edit=sooner, stdout=pipe.write_end)
    wait_until(pipe.is_full, "the pipe is full")
    # kafka-python's default of 5 minutes would be 30 s here.
    wait_until(lambda: witness.assignments() == [], "the member is removed from the group", 20)
    wait_until(lambda: pipe.read() and witness.assignments() == [[0]], "it rejoins")
    if name == "consumer.py":
        [reason] = member.find(stderr_lines.NOT_COMMITTED)
        assert reason.startswith("CommitFailedError")
        wait_until(lambda: pipe.read().count(b"\n") >= 6000, "all events are printed again")
        wait_until(lambda: witness.committed() == {0: 3000}, "they are committed")
    else:
        wait_until(lambda: pipe.read().endswith(b"\n}\n"), "the snapshot is complete")
    assert_clean_stop(member)


def test_a_slow_join_is_completed(start: Start, witness: Witness, proxy: Proxy) -> None:
    """Tried with a consumer, as the processor has the same code for it."""
    witness.create_topic(1)
    consumer = start("consumer.py", address=proxy.address)
    wait_until(lambda: consumer.assigned == [0], "it is the group's leader")
    proxy.delay(2, SYNC_GROUP)  # the last step of joining
    witness.add_partitions(3)
    witness.write([(2, b"key", event())])
    wait_until(lambda: consumer.assigned == [0, 1, 2], "it is assigned the new partitions", 30)
    wait_until(lambda: consumer.lines, "it prints the event")
    assert_clean_stop(consumer)

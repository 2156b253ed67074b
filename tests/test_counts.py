"""Every snapshot of the processor is whole and exact, whatever happens in the group or the log."""

import re
import time

from events import counts_of, event, sum_of_counts
from scripts import Start, frozen, patched, wait_until
from witness import Witness, evenly_assigned


def test_first_snapshot_is_printed_once_all_events_are_counted(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    processor = start(command=patched("stopped_clock", "processor.py"))
    wait_until(lambda: processor.snapshots == [{"alice": {"view": 1}}], "a snapshot is printed")


def test_first_snapshot_does_not_wait_for_events_that_arrive_meanwhile(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())] * 300)
    processor = start(command=patched("slow_poll growing_log", "processor.py"))
    wait_until(lambda: processor.snapshots == [{"alice": {"view": 300}}], "the counts are printed")


def test_first_snapshot_is_whole_when_the_first_events_are_deleted(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("deleted"))] * 10)
    witness.delete_events_before({0: 10})
    witness.write([(0, b"key", event("kept"))] * 5)
    processor = start(command=patched("slow_offset_reset", "processor.py"))
    wait_until(lambda: processor.snapshots, "counts are printed")
    assert processor.snapshots[0] == {"kept": {"view": 5}}


def test_last_snapshot_includes_what_was_polled_last(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("first"))])
    processor = start(command=patched("interrupt_after_last", "processor.py"))
    wait_until(lambda: processor.snapshots, "counts are printed")
    witness.write([(0, b"key", event("last"))])
    assert processor.wait() == 0
    assert processor.snapshots[1:] == [{"first": {"view": 1}, "last": {"view": 1}}]


def test_every_snapshot_is_whole_while_members_join_and_leave(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(7500))
    everything = counts_of(witness.messages())
    # Slow enough for catching up to take longer than the second between two snapshots.
    slow = patched("slow_poll", "processor.py")
    first = start(command=slow)
    wait_until(lambda: first.snapshots, "the first prints a snapshot")
    assert first.snapshots[0] == everything
    assert re.search(r"^--- catching up: [\d,]+ events to go$", first.err, re.MULTILINE)
    second = start(command=slow)
    wait_until(lambda: second.snapshots, "the second counts its partitions")
    wait_until(
        lambda: sum_of_counts(first.snapshots[-1], second.snapshots[-1]) == everything,
        "the first counts the rest",
    )
    consumer = start("consumer.py")
    wait_until(evenly_assigned(witness, 3), "the consumer is assigned a partition")
    assert first.stop() == 0
    wait_until(evenly_assigned(witness, 2), "the others are assigned the rest")
    assert consumer.stop() == 0
    wait_until(lambda: second.snapshots[-1] == everything, "the second counts everything")
    assert second.stop() == 0
    for snapshot in (*first.snapshots, *second.snapshots):
        assert snapshot == {
            user: everything[user] for user in snapshot
        }  # each partition has one user


def test_a_frozen_processor_prints_no_snapshot_before_it_has_caught_up(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())] * 100)
    processor = start(command=patched("slow_poll", "processor.py"))
    wait_until(lambda: processor.snapshots, "it prints a snapshot")
    with frozen(processor):
        wait_until(lambda: witness.assignments() == [], "it is removed from the group")
        # Reading them takes longer than the second between two snapshots.
        witness.write([(0, b"key", event())] * 11_900)
    wait_until(lambda: processor.snapshots[-1]["alice"]["view"] == 12_000, "it has caught up")
    assert processor.stop() == 0
    # It may count for up to a second before it learns that it was removed from the group.
    counted = [snapshot["alice"]["view"] for snapshot in processor.snapshots]
    assert not [number for number in counted if 6_000 < number < 12_000]


def test_printing_takes_a_small_part_of_the_time(start: Start, witness: Witness) -> None:
    start("producer.py", "--interval", "0.05")
    processor = start(command=patched("slow_json", "processor.py"))
    moments = []
    for number in (2, 3):
        wait_until(lambda: len(processor.snapshots) >= number, "a snapshot is printed")
        moments.append(time.monotonic())
    assert moments[1] - moments[0] > 4  # ten times the 0.4 s that a snapshot takes

"""The processor: in every snapshot, the counts are exact for the partitions assigned to it."""

import itertools
import json
import time
from datetime import datetime

import reports
from events import counts_of, event, sum_of_counts
from scripts import Start, assert_clean_stop, frozen, printed_lines, send_events, wait_until
from witness import Witness


def test_a_restarted_processor_prints_the_same_counts(start: Start, witness: Witness) -> None:
    send_events(start, 1997)
    witness.write((number, None, event("alice", "click")) for number in range(3))
    expected = counts_of(witness.messages())  # alice has events in each partition
    for _ in range(2):
        processor = start("processor.py")
        wait_until(lambda: processor.snapshots, "a snapshot is printed")
        assert_clean_stop(processor)
        assert processor.snapshots == [expected]
        assert processor.find(reports.COUNTING_ALL) == ["0, 1, 2"]
        assert not processor.find(reports.CATCHING_UP)
    assert processor.out == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert witness.committed() == {}


def test_a_snapshot_is_printed_after_changes_and_at_most_once_a_second(
    start: Start, witness: Witness
) -> None:
    producer = start("producer.py", "--count", "300", "--interval", "0.01")
    wait_until(lambda: producer.lines, "the first event is sent")
    processor = start("processor.py")
    assert producer.wait() == 0
    log = witness.messages()
    expected = counts_of(log)
    wait_until(lambda: processor.snapshots[-1:] == [expected], "all events are counted")
    assert_clean_stop(processor)
    assert processor.snapshots[-1] == expected
    assert all(one != two for one, two in itertools.pairwise(processor.snapshots))
    # The 300 events take about 3 s; more on a busy machine, which leaves time for more snapshots.
    times = sorted(json.loads(message.value or b"")["timestamp"] for message in log)
    first, last = (datetime.fromisoformat(moment) for moment in (times[0], times[-1]))
    assert len(processor.snapshots) <= (last - first).total_seconds() + 4


def test_a_processor_counts_its_part_and_takes_no_event_from_the_consumers(
    start: Start, witness: Witness
) -> None:
    consumers = [start("consumer.py"), start("consumer.py")]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    processor = start("processor.py")
    wait_until(lambda: witness.group_is_balanced(3), "the processor has one of them")
    producer = send_events(start, 900)
    [part] = wait_until(lambda: processor.find(reports.COUNTING_PART), "it reports its part")
    expected = counts_of(m for m in witness.messages() if m.partition == int(part))
    wait_until(lambda: processor.snapshots[-1:] == [expected], "it counts its part")
    alone = start("processor.py", "--group", "separate")
    wait_until(lambda: alone.snapshots, "a separate group has a snapshot")
    assert alone.snapshots[0] == counts_of(witness.messages())

    assert_clean_stop(processor)
    assert processor.snapshots[-1] == expected
    sent = printed_lines(producer)
    wait_until(lambda: printed_lines(*consumers) == sent, "the consumers print its part as well")
    assert_clean_stop(*consumers)


def test_every_snapshot_is_complete_while_members_join_and_leave(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(7500))
    everything = counts_of(witness.messages())
    # It takes longer to read a partition than the second between two snapshots.
    first = start("processor.py", patches={"readers.slow_polls": 0.05})
    wait_until(lambda: first.snapshots, "the first processor has a snapshot")
    assert first.snapshots[0] == everything
    assert first.find(reports.CATCHING_UP)[0].endswith(" events to go")
    second = start("processor.py", patches={"readers.slow_polls": 0.05})
    wait_until(lambda: second.snapshots, "the second counts its part")
    wait_until(
        lambda: sum_of_counts(first.snapshots[-1], second.snapshots[-1]) == everything,
        "the first counts the rest",
    )
    consumer = start("consumer.py")
    wait_until(lambda: witness.group_is_balanced(3), "the consumer has its part")
    assert_clean_stop(first)
    wait_until(lambda: witness.group_is_balanced(2), "the others have the first's partition")
    assert_clean_stop(consumer)
    wait_until(lambda: second.snapshots[-1] == everything, "the second counts everything")
    assert_clean_stop(second)
    for snapshot in (*first.snapshots, *second.snapshots):
        assert snapshot == {user: everything[user] for user in snapshot}


def test_a_frozen_processor_prints_no_counts_before_it_has_caught_up(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())] * 100)
    processor = start("processor.py", patches={"readers.slow_polls": 0.05})
    wait_until(lambda: processor.snapshots, "it counts")
    with frozen(processor):
        wait_until(lambda: witness.assignments() == [], "it is removed from the group")
        # It takes longer to read these than the second between two snapshots.
        witness.write([(0, b"key", event())] * 11_900)
    wait_until(lambda: processor.snapshots[-1]["alice"]["view"] == 12_000, "it has caught up")
    assert_clean_stop(processor)
    # It continues for up to a second before it learns that it was removed.
    counts = [snapshot["alice"]["view"] for snapshot in processor.snapshots]
    assert not [count for count in counts if 6_000 < count < 12_000]


def test_the_first_snapshot_waits_for_nothing_but_the_events(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    processor = start("processor.py", patches={"clients.stop_clock": 0.0})
    wait_until(lambda: processor.snapshots == [{"alice": {"view": 1}}], "a snapshot is printed")


def test_the_first_snapshot_does_not_wait_for_the_end_of_a_growing_log(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())] * 300)
    processor = start(
        "processor.py", patches={"readers.slow_polls": 0.05, "readers.grow_log": 1000}
    )
    wait_until(lambda: processor.snapshots == [{"alice": {"view": 300}}], "a snapshot is printed")


def test_the_first_snapshot_of_a_shortened_log_counts_what_is_left(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("deleted"))] * 10)
    witness.delete_events_before({0: 10})
    witness.write([(0, b"key", event("left"))] * 5)
    processor = start("processor.py", patches={"readers.slow_offset_reset": 2.0})
    wait_until(lambda: processor.snapshots, "a snapshot is printed")
    assert processor.snapshots[0] == {"left": {"view": 5}}


def test_the_last_snapshot_counts_the_events_that_were_read_last(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("first"))])
    processor = start("processor.py", patches={"readers.interrupt_after_poll": "last"})
    wait_until(lambda: processor.snapshots, "a snapshot is printed")
    witness.write([(0, b"key", event("last"))])
    assert processor.wait() == 0
    assert processor.snapshots[1:] == [{"first": {"view": 1}, "last": {"view": 1}}]


def test_printing_takes_a_small_part_of_the_time(start: Start, witness: Witness) -> None:
    start("producer.py", "--interval", "0.05")
    processor = start("processor.py", patches={"readers.slow_snapshots": 0.4})
    times = []
    for number in (2, 3):
        wait_until(lambda: len(processor.snapshots) >= number, "a snapshot is printed")
        times.append(time.monotonic())
    assert times[1] - times[0] > 4  # ten times as long as it takes to print one

"""The processor: in every snapshot, the counts are exact for the partitions assigned to it."""

import stderr_lines
from events import Snapshot, counts_of, event, sum_of_counts
from proxy import Proxy
from scripts import Start, assert_clean_stop, printed_lines, send_events, wait_until
from witness import Witness


def test_a_processor_takes_no_event_from_consumers(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py"), start("consumer.py")]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    processor = start("processor.py")
    wait_until(lambda: witness.group_is_balanced(3), "the processor has one of them")
    producer = send_events(start, 900)
    wait_until(lambda: processor.find(stderr_lines.ASSIGNED_PART), "it reports its part")
    part = processor.assigned
    expected = counts_of(m for m in witness.messages() if [m.partition] == part)
    wait_until(lambda: processor.snapshots[-1:] == [expected], "it counts its part")
    alone = start("processor.py", "--group", "separate")
    wait_until(lambda: alone.snapshots, "a separate group has a snapshot")
    assert alone.snapshots[0] == counts_of(witness.messages())

    assert_clean_stop(processor)
    assert processor.snapshots[-1] == expected
    sent = printed_lines(producer)
    wait_until(lambda: printed_lines(*consumers) == sent, "the consumers print its part as well")
    assert_clean_stop(*consumers)


def test_every_snapshot_is_complete(start: Start, witness: Witness, proxy: Proxy) -> None:
    witness.create_topic(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(7500))
    everything = counts_of(witness.messages())
    # It takes longer to read a partition than the second between two snapshots.
    proxy.bytes_per_second = 150_000
    first = start("processor.py", address=proxy.address)
    wait_until(lambda: first.snapshots, "the first processor has a snapshot")
    assert first.snapshots[0] == everything
    assert first.find(stderr_lines.CATCHING_UP)
    second = start("processor.py", address=proxy.address)
    wait_until(lambda: second.snapshots, "the second counts its part")

    def total() -> Snapshot:
        return sum_of_counts(first.snapshots[-1], second.snapshots[-1])

    wait_until(lambda: total() == everything, "the first counts the rest")
    consumer = start("consumer.py")
    wait_until(lambda: witness.group_is_balanced(3), "the consumer has its part")
    assert_clean_stop(first)
    wait_until(lambda: witness.group_is_balanced(2), "the others have the first's partition")
    assert_clean_stop(consumer)
    wait_until(lambda: second.snapshots[-1] == everything, "the second counts everything")
    assert_clean_stop(second)
    for snapshot in (*first.snapshots, *second.snapshots):
        assert snapshot == {user: everything[user] for user in snapshot}

"""The processor: in every snapshot, the counts are exact for the partitions assigned to it."""

from typing import Any

import stderr_lines
from events import counts_of, event
from proxy import FETCH, Proxy
from scripts import Start, assert_clean_stop, printed_lines, send_events, wait_until
from witness import Witness


def test_a_processor_takes_no_event_from_consumers(start: Start, witness: Witness) -> None:
    consumers = [start("consumer.py"), start("consumer.py")]
    producers = [send_events(start, 300)]
    sent = printed_lines(*producers)
    wait_until(lambda: printed_lines(*consumers) == sent, "the consumers print and commit events")
    processor = start("processor.py")
    wait_until(lambda: witness.group_is_balanced(3), "the processor has one of the partitions")
    producers.append(send_events(start, 600))
    wait_until(lambda: processor.find(stderr_lines.ASSIGNED_PART), "it reports its part")
    part = processor.assigned
    expected = counts_of(m for m in witness.messages() if [m.partition] == part)
    wait_until(lambda: processor.snapshots[-1:] == [expected], "it counts its part")
    assert_clean_stop(processor)
    assert processor.snapshots[-1] == expected
    sent = printed_lines(*producers)
    wait_until(lambda: printed_lines(*consumers) == sent, "the consumers print its part as well")
    assert_clean_stop(*consumers)


def test_every_snapshot_is_complete(start: Start, witness: Witness, proxy: Proxy) -> None:
    witness.create_topic(3)
    for _ in range(5):  # each writes a batch to each partition
        witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(300))
    everything = counts_of(witness.messages())
    # It takes longer to read a partition than the second between two snapshots.
    proxy.delay(0.3, FETCH)
    one_batch_at_a_time = {"fetch_max_bytes": 1}
    slow: dict[str, Any] = {"address": proxy.address, "settings": one_batch_at_a_time}
    first = start("processor.py", **slow)
    wait_until(lambda: first.snapshots, "the first processor has a snapshot")
    assert first.snapshots[0] == everything
    assert first.find(stderr_lines.CATCHING_UP)
    second = start("processor.py", **slow)
    wait_until(lambda: second.snapshots, "the second counts its part")

    def each_counts_its_part() -> bool:
        one, other = first.snapshots[-1], second.snapshots[-1]
        return one | other == everything and not one.keys() & other.keys()

    wait_until(each_counts_its_part, "the first counts the rest")
    assert_clean_stop(first)
    wait_until(lambda: second.snapshots[-1] == everything, "the second counts everything")
    assert_clean_stop(second)
    for snapshot in (*first.snapshots, *second.snapshots):
        assert snapshot == {user: everything[user] for user in snapshot}

"""A topic that is not as expected, or changes while the scripts run."""

import time

from harness import Script, Start, Witness, add, count, event, frozen, line, produce, shown, until


def at_work(start: Start, witness: Witness) -> tuple[Script, Script]:
    """A consumer and a processor, each alone in its group, that have read what there is."""
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    expected = len(witness.log())
    until(lambda: len(consumer.lines) == expected, "the consumer has shown everything")
    until(lambda: processor.snapshots, "the processor has counted everything")
    return consumer, processor


def test_partitions_are_added_while_they_run(start: Start, witness: Witness) -> None:
    produce(start, 100)
    consumer, processor = at_work(start, witness)
    witness.add_partitions(5)
    witness.write((number % 5, None, event(f"user {number}")) for number in range(50))
    produce(start, 100)  # a producer that starts now knows all five
    log = witness.log()
    assert {message.partition for message in log} == {0, 1, 2, 3, 4}
    # The clients' metadata is up to 10 s old.
    until(lambda: processor.snapshots[-1] == count(log), "everything is counted", 30)
    until(lambda: shown(consumer) == sorted(map(line, log)), "everything is shown", 30)
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "0, 1, 2, 3, 4" in script.err


def test_old_events_are_removed_while_they_run(start: Start, witness: Witness) -> None:
    produce(start, 200)
    before = witness.log()
    consumer, processor = at_work(start, witness)
    # Stopped, they cannot have read the next events when those are removed.
    with frozen(consumer, processor):
        time.sleep(1)  # a fetch that is on its way comes back with nothing
        witness.write((number % 3, b"k", event("gone")) for number in range(300))
        witness.delete_before({m.partition: m.offset + 1 for m in witness.log()})
        witness.write((number % 3, b"k", event("left")) for number in range(30))
        after = witness.log()
        assert len(after) == 30
    expected = add(count(before), count(after))
    until(lambda: processor.snapshots[-1] == expected, "it goes on, and counts what is left")
    until(lambda: {*map(line, after)} <= {*consumer.lines}, "what is left is shown")
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "Traceback" not in script.err


def test_a_replaced_topic_is_counted_from_its_start_when_events_come(
    start: Start, witness: Witness
) -> None:
    """Too quickly for the group to notice: kafka-python believes that the log was truncated."""
    witness.create(1)
    witness.write([(0, b"key", event("old"))] * 100)
    processor = start("processor.py")
    until(lambda: processor.snapshots, "counts are shown")
    with frozen(processor):  # or it may create the topic first
        witness.create(1)
        witness.write([(0, b"key", event("new"))] * 10)
        time.sleep(1)  # by then all is as before, but for the log

    def counted_anew() -> bool:
        witness.write([(0, b"key", event("new"))])
        time.sleep(3)  # longer than its counts may lag, or each look may come too early
        return processor.snapshots[-1] == count(witness.log())

    until(counted_anew, "the new topic's events are counted, and no others")
    assert processor.stop() == 0

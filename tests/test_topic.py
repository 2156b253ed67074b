"""A topic that is not as expected, or changes while the scripts run."""

import signal
import time

import pytest
from harness import TOPIC, Script, Start, Witness, add, count, event, line, produce, shown, until


def at_work(start: Start, witness: Witness) -> tuple[Script, Script]:
    """A consumer and a processor, each alone in its group, that have read what there is."""
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    expected = len(witness.log())
    until(lambda: len(consumer.lines) == expected, "the consumer has shown everything")
    until(lambda: processor.snapshots, "the processor has counted everything")
    until(lambda: ": all\n" in processor.err, "it says so")
    return consumer, processor


@pytest.mark.parametrize("partitions", [1, 7])
def test_another_number_of_partitions(partitions: int, start: Start, witness: Witness) -> None:
    witness.create(partitions)
    producer = produce(start, 300)
    consumer, processor = at_work(start, witness)
    assert shown(consumer) == shown(producer)
    assert processor.snapshots[-1] == count(witness.log())
    everything = ", ".join(map(str, range(partitions)))
    assert f"--- counting partitions of events: {everything}: all\n" in processor.err
    assert f"--- partitions of events: {everything}\n" in consumer.err


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
    for script in (consumer, processor):
        script.process.send_signal(signal.SIGSTOP)
    witness.write((number % 3, b"k", event("gone")) for number in range(300))
    ends = dict.fromkeys(range(3), 0)
    for message in witness.log():
        ends[message.partition] = message.offset + 1
    witness.delete_before(ends)
    witness.write((number % 3, b"k", event("left")) for number in range(30))
    after = witness.log()
    assert len(after) == 30
    for script in (consumer, processor):
        script.process.send_signal(signal.SIGCONT)
    expected = add(count(before), count(after))
    until(lambda: "left" in processor.snapshots[-1], "it goes on")
    until(lambda: processor.snapshots[-1]["left"] == {"view": 30}, "it counts what is left")
    # A fetch that was on its way may have brought some of the events that were then removed.
    gone = processor.snapshots[-1].get("gone", {"view": 0})
    assert gone["view"] <= 300
    assert add(processor.snapshots[-1]) == add(expected, {"gone": gone} if gone["view"] else {})
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
    processor.process.send_signal(signal.SIGSTOP)  # or it may create the topic first
    witness.delete(TOPIC)
    witness.create(1)
    witness.write([(0, b"key", event("new"))] * 10)
    processor.process.send_signal(signal.SIGCONT)

    def counted_anew() -> bool:
        witness.write([(0, b"key", event("new"))])
        time.sleep(1)
        return processor.snapshots[-1] == count(witness.log())

    until(counted_anew, "the new topic's events are counted, and no others")
    assert processor.stop() == 0

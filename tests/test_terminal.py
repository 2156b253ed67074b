"""What a person sees on a terminal, where a snapshot scrolls everything else away."""

import re
import sys

from harness import Start, Witness, event, python, settled, until

# Runs a command on a terminal of its own, and passes on what that shows.
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
PART = (
    r"counting partition \d only; others of event-watchers hold \d, \d \(everything: --group mine\)"
)


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
    until(lambda: "counting partitions 0, 1, 2: everything" in processor.out, "it has everything")
    shown = processor.out.replace("\r", "")
    part, _, everything = shown.partition("counting partitions 0, 1, 2: everything\n")
    first, *snapshots = re.split(r"^\{$", part, flags=re.MULTILINE)
    assert re.fullmatch(f"{PART}\n", first)  # before the first snapshot
    assert len(snapshots) >= 3
    for snapshot in snapshots:
        assert re.search(rf"^\}}\n{PART}\n$", snapshot, re.MULTILINE)  # and under each
    assert max(len(line) for line in part.splitlines()) < 100
    until(lambda: processor.out.endswith("}\r\n"), "everything is counted")
    assert "counting" not in everything


def test_a_long_list_of_partitions_stays_in_one_line(start: Start, witness: Witness) -> None:
    witness.create(40)
    consumer = start("consumer.py")
    until(lambda: "38, 39\n" in consumer.err, "the consumer has all partitions")
    processor = start("processor.py")
    said = "counting 20 of 40 partitions (everything: --group mine)\n"
    until(lambda: processor.err == said, "it says so briefly")
    assert consumer.stop() == 0

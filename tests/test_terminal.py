"""What a person sees on a terminal, where a snapshot scrolls everything else away."""

import re
import sys

from harness import Start, Witness, event, python, settled, until

# Runs a command on a terminal of its own, and passes on what that shows.
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
PART = r"--- counting partitions of events: \d; others of the group have the rest \(all: .*\)"


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
    until(
        lambda: "--- counting partitions of events: 0, 1, 2: all" in processor.out,
        "it has everything",
    )
    shown = processor.out.replace("\r", "")
    part, _, everything = shown.partition("--- counting partitions of events: 0, 1, 2: all\n")
    first, *snapshots = re.split(r"^\{$", part, flags=re.MULTILINE)
    assert re.fullmatch(f"{PART}\n", first)  # before the first snapshot
    assert len(snapshots) >= 3
    for snapshot in snapshots:
        assert re.search(rf"^\}}\n{PART}\n$", snapshot, re.MULTILINE)  # and under each
    assert max(len(line) for line in part.splitlines()) < 100
    until(lambda: processor.out.endswith("}\r\n"), "everything is counted")
    assert "counting" not in everything

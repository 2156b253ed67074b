"""Time the scripts against the fastest plain kafka-python loops that do the same work.

python tests/benchmark.py [--events N]   takes two to three minutes with 300,000 events

Each program is timed as a whole process, from its start until its work is done: the best of three
runs, in turn with the plain loop. Only figures of one run can be compared, because machines are
noisy. "speed" is the plain loop's time divided by the script's: higher is faster.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any
from uuid import uuid4

from broker import ROOT, Broker, Cluster, free_port
from witness import Witness


def time_program(address: str, command: list[str], lines: int) -> float:
    """Return the seconds until a program exits or, if `lines` is not 0, has printed so many."""
    own = {"KAFKA_BOOTSTRAP_SERVERS": address, "KAFKA_CLIENT_SETTINGS": "{}"}
    options: Any = {"cwd": ROOT, "env": os.environ | own | {"PYTHONPATH": str(ROOT)}}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    began, seen = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, *command], **options) as process:
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 1 << 20):
                seen += chunk.count(b"\n")
                if lines and seen >= lines:
                    break
            else:
                assert process.wait() == 0, command
            return time.perf_counter() - began
        finally:
            process.kill()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300_000, metavar="N")
    events = parser.parse_args().events
    comparisons = [  # script, its arguments, plain loop, lines after which both are killed
        ("producer.py", ["--quiet", "--interval=0", f"--count={events}"], "produce", 0),
        ("consumer.py", ["--group"], "consume", events),
        ("processor.py", ["--once", "--group"], "process", 0),
    ]
    Broker.java_options = ()
    table = [f"{'program':<16}{'seconds':>8}{'events/s':>12}{'speed':>8}"]
    print("18 runs; 300,000 events take two to three minutes", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), [free_port()]) as cluster:
        witness = Witness(cluster.address)
        for script, arguments, loop, lines in comparisons:
            plain_command = ["tests/plain_loops.py", loop, str(events)]
            runs: dict[str, list[float]] = {script: [], "  plain loop": []}
            for label in [*runs] * 3:
                command = [script, *arguments] if label == script else plain_command
                if loop == "produce":  # into an empty topic
                    witness.delete_everything()
                    witness.create_topic(3)
                elif label == script:  # in a group that has committed nothing
                    command.append(str(uuid4()))
                runs[label].append(time_program(cluster.address, command, lines))
                print(f"{label:<16}{runs[label][-1]:>8.2f} s", file=sys.stderr)
            fastest = {label: min(seconds) for label, seconds in runs.items()}
            for label, seconds in fastest.items():
                speed = f"{fastest['  plain loop'] / seconds:>8.2f}"
                table.append(f"{label:<16}{seconds:>8.2f}{events / seconds:>12,.0f}{speed}")
    print("", *table, sep="\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

"""Time the scripts against the fastest plain kafka-python loops that do the same work.

python tests/benchmark.py [--events N]

Each program is timed as a whole process, from its start until its work is done: the best of three
runs, in turn with the plain loop. Only figures of one run can be compared, because machines are
noisy. "speed" is the plain loop's time divided by the script's: higher is faster.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

from broker import MISSING_PACKAGE, ROOT, Broker, Cluster, free_port

try:
    from witness import Witness
except ModuleNotFoundError as error:
    sys.exit(MISSING_PACKAGE.format(error.name, "tests/requirements.txt"))

Run = tuple[float, float]  # seconds, and peak memory in MB


def time_program(address: str, command: list[str], lines: int) -> Run:
    """Time a program until it exits, or, if `lines` is not 0, until it has printed that many."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"KAFKA_BOOTSTRAP_SERVERS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    seen = 0
    while chunk := os.read(process.stdout.fileno(), 1 << 20):
        seen += chunk.count(b"\n")
        if lines and seen >= lines:
            break
    seconds = time.perf_counter() - began
    if lines:
        process.kill()
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert seen >= lines if lines else process.returncode == 0, command
    kilobyte = 1e6 if sys.platform == "darwin" else 1e3  # see ru_maxrss in getrusage(2)
    return seconds, usage.ru_maxrss / kilobyte


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=300_000, metavar="N")
    events = parser.parse_args().events
    comparisons = [  # script, its arguments, plain loop, lines after which both are killed
        ("producer.py", ["--quiet", "--interval=0", f"--count={events}"], "produce", 0),
        ("consumer.py", ["--group"], "consume", events),
        ("processor.py", ["--once", "--group"], "process", 0),
    ]
    Broker.java_options = ()
    print(f"{'program':<16}{'seconds':>8}{'events/s':>12}{'speed':>8}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), [free_port()]) as cluster:
        witness = Witness(cluster.address)
        for script, arguments, loop, lines in comparisons:
            plain_command = ["tests/plain_loops.py", loop, str(events)]
            runs: dict[str, list[Run]] = {script: [], "  plain loop": []}
            for label in [*runs] * 3:
                command = [script, *arguments] if label == script else plain_command
                if loop == "produce":  # into an empty topic
                    witness.delete_everything()
                    witness.create_topic(3)
                elif label == script:  # in a group that has committed nothing
                    command.append(str(uuid4()))
                runs[label].append(time_program(cluster.address, command, lines))
            plain_seconds, _ = min(runs["  plain loop"])
            for label, (seconds, memory) in ((label, min(runs[label])) for label in runs):
                print(f"{label:<16}{seconds:>8.2f}{events / seconds:>12,.0f}", end="")
                print(f"{plain_seconds / seconds:>8.2f}{memory:>9.0f}", flush=True)
    print("speed: the plain loop's time / the script's time; higher is faster")


if __name__ == "__main__":
    main()

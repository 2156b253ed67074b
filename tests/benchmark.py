"""Time the scripts against the fastest plain kafka-python loops that do the same work.

python tests/benchmark.py [--events N]

Each program is timed as a whole process, from its start until its work is done: the best of three
runs, in turn with the plain loop. Only figures of one run can be compared, because machines are
noisy. "speed" is the plain loop's time divided by the script's: higher is faster.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from broker import MISSING_PACKAGE, ROOT, Broker, Cluster, free_port

try:
    from witness import Witness
except ModuleNotFoundError as error:
    sys.exit(MISSING_PACKAGE.format(error.name, "tests/requirements.txt"))

Run = tuple[float, float]  # seconds, and peak memory in MB


def time_program(address: str, program: str, *arguments: str, lines: int = 0) -> Run:
    """Time a program until it exits, or until it has printed that many lines and is killed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments],
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
    assert seen >= lines if lines else process.returncode == 0, program
    kilobyte = 1e6 if sys.platform == "darwin" else 1e3  # see ru_maxrss in getrusage(2)
    return seconds, usage.ru_maxrss / kilobyte


def compare(name: str, events: int, plain: Callable[[], Run], script: Callable[[], Run]) -> None:
    """Print a row for the script and one for the plain loop."""
    runs = [(plain(), script()) for _ in range(3)]
    (plain_seconds, plain_memory), (seconds, memory) = map(min, zip(*runs, strict=True))
    for label, taken, megabytes in (
        (name, seconds, memory),
        ("  plain loop", plain_seconds, plain_memory),
    ):
        speed = f"{plain_seconds / taken:>8.2f}"
        print(
            f"{label:<16}{taken:>8.2f}{events / taken:>12,.0f}{speed}{megabytes:>9.0f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=300_000, metavar="N")
    events = parser.parse_args().events
    number = str(events)
    Broker.java_options = ()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), [free_port()]) as cluster:
        run = functools.partial(time_program, cluster.address)
        plain = functools.partial(run, "tests/plain_loops.py")
        witness = Witness(cluster.address)

        def produce(time_producer: Callable[[], Run]) -> Run:
            """Time a producer that begins with an empty topic."""
            witness.delete_everything()
            witness.create_topic(3)
            return time_producer()

        def group() -> str:
            return f"--group={uuid4()}"  # one that has committed nothing

        print(f"{'program':<16}{'seconds':>8}{'events/s':>12}{'speed':>8}{'peak MB':>9}")
        compare(
            "producer.py",
            events,
            lambda: produce(lambda: plain("produce", number)),
            lambda: produce(
                lambda: run("producer.py", "--quiet", "--interval=0", "--count", number)
            ),
        )
        compare(
            "consumer.py",
            events,
            lambda: plain("consume", number, lines=events),
            lambda: run("consumer.py", group(), lines=events),
        )
        compare(
            "processor.py",
            events,
            lambda: plain("process", number),
            lambda: run("processor.py", "--once", group()),
        )
    print("speed: the plain loop's time / the script's time; higher is faster")


if __name__ == "__main__":
    main()

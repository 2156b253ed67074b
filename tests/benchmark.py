"""How fast the scripts are, against the barest kafka-python loops that do the same work.

python tests/benchmark.py                    the three scripts, 300,000 events
python tests/benchmark.py --peers            also what others would count the same events with
                                             (pip install aiokafka quixstreams, beforehand)
python tests/benchmark.py --growth           how the cost grows with events, users and processors

Each program is timed as a whole process, from its start until its work is done: best of three,
in turn with the others, for machines are noisy. Only figures of one run can be compared.
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from broker import ROOT, Broker, Cluster, free_port
from harness import Witness, event

HEAD = """
import json, os, sys, uuid
from collections import Counter
N, server, group = int(sys.argv[1]), os.environ["KAFKA_BOOTSTRAP_SERVERS"], str(uuid.uuid4())
"""
# The client settings of the scripts, which the bare loops share.
READER = f"""{HEAD}
from kafka import KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
consumer = KafkaConsumer(
    "events", bootstrap_servers=server, group_id=group, auto_offset_reset="earliest",
    enable_auto_commit=False, partition_assignment_strategy=[CooperativeStickyAssignor],
    session_timeout_ms=10_000, heartbeat_interval_ms=500, metadata_max_age_ms=10_000,
    max_partition_fetch_bytes=4 * 1024 * 1024, fetch_max_wait_ms=100, max_poll_records=5_000)
"""
BARE_PRODUCER = f"""{HEAD}
from kafka import KafkaProducer
sys.path.insert(0, {str(ROOT)!r})
from producer import random_event
producer = KafkaProducer(
    bootstrap_servers=server, acks="all", enable_idempotence=True, batch_size=64 * 1024)
for _ in range(N):
    event = random_event()
    producer.send("events", key=event["user_id"].encode(), value=json.dumps(event).encode())
producer.flush()
"""
BARE_CONSUMER = f"""{READER}
shown = 0
while shown < N:
    for messages in consumer.poll(timeout_ms=500).values():
        for m in messages:
            key, value = m.key.decode(), m.value.decode()
            print(f"partition={{m.partition}} offset={{m.offset}} key={{key}} {{value}}")
        shown += len(messages)
"""
BARE_PROCESSOR = f"""{READER}
counts = Counter()
while counts.total() < N:
    for messages in consumer.poll(timeout_ms=500).values():
        for message in messages:
            event = json.loads(message.value)
            counts[event["user_id"], event["action"]] += 1
"""
# Its snapshots are empty, but for the first and the last.
SILENT_PROCESSOR = """
import processor
real, printed = processor.as_json, []
def as_json(partitions):
    if printed and not processor.stopping:
        return "{}"
    printed.append(True)
    return real(partitions)
processor.as_json = as_json
processor.main()
"""
PEERS = {
    "confluent_kafka": f"""{HEAD}
from confluent_kafka import Consumer
consumer = Consumer({{"bootstrap.servers": server, "group.id": group,
    "auto.offset.reset": "earliest", "enable.auto.commit": False, "broker.address.family": "v4"}})
consumer.subscribe(["events"])
counts = Counter()
while counts.total() < N:
    for message in consumer.consume(5_000, timeout=0.1):
        event = json.loads(message.value())
        counts[event["user_id"], event["action"]] += 1
""",
    "aiokafka": f"""{HEAD}
import asyncio
from aiokafka import AIOKafkaConsumer
async def main():
    consumer = AIOKafkaConsumer("events", group_id=group, enable_auto_commit=False,
        bootstrap_servers=server, auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024)
    await consumer.start()
    counts = Counter()
    while counts.total() < N:
        for messages in (await consumer.getmany(timeout_ms=500)).values():
            for message in messages:
                event = json.loads(message.value)
                counts[event["user_id"], event["action"]] += 1
    os._exit(0)
asyncio.run(main())
""",
    "quixstreams": f"""{HEAD}
import tempfile
from quixstreams import Application
app = Application(broker_address=server, loglevel="ERROR", consumer_group=group,
    auto_offset_reset="earliest", state_dir=tempfile.mkdtemp())
seen = 0
def count(event, state):
    global seen
    actions = state.get("actions", {{}})
    actions[event["action"]] = actions.get(event["action"], 0) + 1
    state.set("actions", actions)
    seen += 1
    if seen == N:
        os._exit(0)
app.dataframe(app.topic("events", value_deserializer="json")).update(count, stateful=True)
app.run()
""",
}


class Run(NamedTuple):
    seconds: float
    megabytes: float


def start(address: str, *arguments: str, out: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A Python process that finds the broker."""
    environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": address}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=out,
        stderr=subprocess.DEVNULL,
    )


def timed(address: str, *arguments: str, lines: int = 0) -> Run:
    """Times a program until it ends, or until it has printed so many lines and is ended."""
    began = time.perf_counter()
    process = start(address, *arguments, out=subprocess.PIPE)
    assert process.stdout is not None
    seen = 0
    while chunk := os.read(process.stdout.fileno(), 1 << 20):
        seen += chunk.count(b"\n")
        if lines and seen >= lines:
            break
    seconds = time.perf_counter() - began
    if lines:
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert seen >= lines, f"{seen} of {lines} lines"
    assert lines or process.returncode == 0, arguments
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, getrusage(2)
    return Run(seconds, usage.ru_maxrss * unit / 1e6)


def group() -> str:
    """The option for a group of its own, so that a program reads everything."""
    return f"--group=benchmark-{random.randrange(10**12)}"


def best_of_three(programs: dict[str, Callable[[], Run]]) -> dict[str, Run]:
    """The shortest run of each program; they take turns."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for _ in range(3):
        for name, program in programs.items():
            runs[name].append(program())
    return {name: min(several) for name, several in runs.items()}


def scripts(address: str, events: int, peers: bool) -> None:
    """Prints the table; the ratio is that of the bare loop's time to the program's."""
    number, witness = str(events), Witness(address)

    def produce(*arguments: str) -> Run:
        witness.clean()
        return timed(address, *arguments)

    quiet = ("producer.py", "--quiet", "--interval", "0", "--count", number)
    writing = {
        "bare producer": lambda: produce("-c", BARE_PRODUCER, number),
        "producer.py": lambda: produce(*quiet),
    }
    showing = {
        "bare consumer": lambda: timed(address, "-c", BARE_CONSUMER, number, lines=events),
        "consumer.py": lambda: timed(address, "consumer.py", group(), lines=events),
    }
    counting: dict[str, Callable[[], Run]] = {
        "bare processor": lambda: timed(address, "-c", BARE_PROCESSOR, number),
        "processor.py": lambda: timed(address, "processor.py", "--once", group()),
    }
    if peers:
        for name, source in PEERS.items():
            counting[name] = functools.partial(timed, address, "-c", source, number)
    print(f"{'program':<24}{'seconds':>8}{'events/s':>12}{'ratio':>8}{'peak MB':>9}")
    for programs in (writing, showing, counting):
        results = best_of_three(programs)
        bare = next(iter(results.values())).seconds
        for name, (seconds, megabytes) in results.items():
            figures = f"{seconds:>8.2f}{events / seconds:>12,.0f}{bare / seconds:>8.2f}"
            print(f"{name:<24}{figures}{megabytes:>9.0f}", flush=True)


def fill(address: str, events: int, users: int, anew: bool = True) -> None:
    """Writes so many events of so many users; anew: the topic holds no others."""
    witness = Witness(address)
    if anew:
        witness.clean()
        witness.create(3)
    values = (event(f"user {n % users}", "view", event_id="0" * 36) for n in range(events))
    witness.write((n % 3, b"key", value) for n, value in enumerate(values))


def counted(out: IO[bytes]) -> int:
    """How many events the last snapshot in the file holds; 0 while it is being written."""
    text = os.pread(out.fileno(), 1 << 30, 0)
    try:
        users = json.loads(text[text.rfind(b"\n{") + 1 :])
    except json.JSONDecodeError:
        return 0
    return sum(sum(actions.values()) for actions in users.values())


def two_processors(address: str, events: int) -> Run:
    """Two processors of one group, until their snapshots together hold everything."""
    name, began = group(), time.perf_counter()
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        processes = [start(address, "processor.py", name, out=out) for out in (one, two)]
        while counted(one) + counted(two) != events:
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    return Run(seconds, 0)


def flooded(address: str, users: int, *program: str) -> float:
    """Events a second that a processor counts while it cannot keep up with what is written."""
    fill(address, 100_000, users)
    with tempfile.TemporaryFile() as out:
        process = start(address, *program, group(), out=out)
        while not (first := counted(out)):
            time.sleep(0.05)
        began = time.perf_counter()
        fill(address, 3_000_000, users, anew=False)
        process.send_signal(signal.SIGINT)
        elapsed = time.perf_counter() - began
        process.wait()
        return (counted(out) - first) / elapsed


def growth(address: str, events: int) -> None:
    print("catch-up of one processor, 6 users")
    for number in (events, 2 * events, 4 * events):
        fill(address, number, 6)
        [best] = best_of_three(
            {f"{number:,}": lambda: timed(address, "processor.py", "--once", group())}
        ).values()
        print(
            f"  {number:,} events: {best.seconds:.2f} s, peak {best.megabytes:.0f} MB", flush=True
        )
    print(f"catch-up of {4 * events:,} events by one and by two processors")
    shared = {
        "one": lambda: timed(address, "processor.py", "--once", group()),
        "two": lambda: two_processors(address, 4 * events),
    }
    for name, best in best_of_three(shared).items():
        print(f"  {name}: {best.seconds:.2f} s", flush=True)
    print("counting under a flood of events, with its snapshots and without")
    for users in (1_000, 100_000):
        printing, silent = (
            max(flooded(address, users, *program) for _ in range(2))
            for program in (("processor.py",), ("-c", SILENT_PROCESSOR))
        )
        print(f"  {users:,} users: {printing:,.0f} events/s, {printing / silent:.2f} of the speed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the scripts against bare loops.")
    parser.add_argument("--events", type=int, default=300_000, metavar="N")
    parser.add_argument("--peers", action="store_true", help="also other clients' counting loops")
    parser.add_argument("--growth", action="store_true", help="growth of the cost instead")
    options = parser.parse_args()
    Broker.java_options = ()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), [free_port()]) as cluster:
        if options.growth:
            growth(cluster.address, options.events)
        else:
            scripts(cluster.address, options.events, options.peers)


if __name__ == "__main__":
    main()

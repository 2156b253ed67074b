"""How fast the scripts are, against the barest kafka-python loops that do the same work.

python tests/benchmark.py                    the three scripts, 300,000 events
python tests/benchmark.py --peers            also what others would count the same events with
                                             (pip install aiokafka quixstreams, beforehand)
python tests/benchmark.py --growth           how the cost grows with events, users and processors

Each program is timed as a whole process, from its start until its work is done: best of three,
in turn with the others, for machines are noisy. Only figures of one run can be compared.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from broker import ROOT, Broker
from harness import Witness, event

# The client settings of the scripts, which the bare loops share.
CONNECT = """
import json, os, sys, uuid
from collections import Counter
from kafka import KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
N = int(sys.argv[1])
server = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
def connect():
    return KafkaConsumer(
        "events", bootstrap_servers=server, group_id=str(uuid.uuid4()),
        auto_offset_reset="earliest", enable_auto_commit=False,
        partition_assignment_strategy=[CooperativeStickyAssignor],
        session_timeout_ms=10_000, heartbeat_interval_ms=500, metadata_max_age_ms=10_000,
        max_partition_fetch_bytes=4 * 1024 * 1024, fetch_max_wait_ms=100, max_poll_records=5_000,
    )
"""
BARE_PROCESSOR = (
    CONNECT
    + """
consumer, counts = connect(), Counter()
while counts.total() < N:
    for messages in consumer.poll(timeout_ms=500).values():
        for message in messages:
            event = json.loads(message.value)
            counts[event["user_id"], event["action"]] += 1
print(json.dumps({"all": {"all": counts.total()}}), flush=True)
"""
)
BARE_CONSUMER = (
    CONNECT
    + """
consumer, shown = connect(), 0
while shown < N:
    for messages in consumer.poll(timeout_ms=500).values():
        for m in messages:
            key, value = m.key.decode(), m.value.decode()
            print(f"partition={m.partition} offset={m.offset} key={key} {value}")
        shown += len(messages)
sys.stdout.flush()
"""
)
BARE_PRODUCER = (
    CONNECT
    + f"""
sys.path.insert(0, {str(ROOT)!r})
from producer import random_event
producer = KafkaProducer(bootstrap_servers=server, batch_size=64 * 1024)
for _ in range(N):
    event = random_event()
    producer.send("events", key=event["user_id"].encode(), value=json.dumps(event).encode())
producer.flush()
"""
)
# Its first and its last snapshot are real, the others are empty.
SILENT_PROCESSOR = """
import processor
real, printed = processor.Counts.as_json, []
def as_json(counts):
    if printed and not processor.stopping:
        return "{}"
    printed.append(True)
    return real(counts)
processor.Counts.as_json = as_json
processor.main()
"""
PEERS = {
    "confluent_kafka": """
import json, os, sys, uuid
from collections import Counter
from confluent_kafka import Consumer
N = int(sys.argv[1])
consumer = Consumer({"bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
    "group.id": str(uuid.uuid4()), "auto.offset.reset": "earliest", "enable.auto.commit": False,
    "broker.address.family": "v4"})
consumer.subscribe(["events"])
counts = Counter()
while counts.total() < N:
    for message in consumer.consume(5_000, timeout=0.1):
        event = json.loads(message.value())
        counts[event["user_id"], event["action"]] += 1
print(json.dumps({"all": {"all": counts.total()}}), flush=True)
""",
    "aiokafka": """
import asyncio, json, os, sys, uuid
from collections import Counter
from aiokafka import AIOKafkaConsumer
N = int(sys.argv[1])
async def main():
    consumer = AIOKafkaConsumer("events", group_id=str(uuid.uuid4()), enable_auto_commit=False,
        bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"], auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024)
    await consumer.start()
    counts = Counter()
    while counts.total() < N:
        for messages in (await consumer.getmany(timeout_ms=500)).values():
            for message in messages:
                event = json.loads(message.value)
                counts[event["user_id"], event["action"]] += 1
    print(json.dumps({"all": {"all": counts.total()}}), flush=True)
    os._exit(0)
asyncio.run(main())
""",
    "quixstreams": """
import json, os, sys, tempfile, uuid
from quixstreams import Application
N = int(sys.argv[1])
app = Application(broker_address=os.environ["KAFKA_BOOTSTRAP_SERVERS"], loglevel="ERROR",
    consumer_group=str(uuid.uuid4()), auto_offset_reset="earliest",
    state_dir=tempfile.mkdtemp())
seen = 0
def count(event, state):
    global seen
    actions = state.get("actions", {})
    actions[event["action"]] = actions.get(event["action"], 0) + 1
    state.set("actions", actions)
    seen += 1
    if seen == N:
        print(json.dumps({"all": {"all": seen}}), flush=True)
        os._exit(0)
app.dataframe(app.topic("events", value_deserializer="json")).update(count, stateful=True)
app.run()
""",
}


class Run(NamedTuple):
    seconds: float
    megabytes: float


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def counted(output: bytes) -> int:
    """How many events the last snapshot, which is a complete JSON document or not yet, holds."""
    last = output[output.rfind(b"\n{") + 1 :]
    try:
        return sum(sum(actions.values()) for actions in json.loads(last).values())
    except json.JSONDecodeError:
        return 0


def run(command: list[str], address: str, done: Callable[[bytes], int], goal: int) -> Run:
    """Times the command until done() of its output, given in pieces, is the goal; then ends it.

    With a goal of 0 it is the command that ends, and its end that counts.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"KAFKA_BOOTSTRAP_SERVERS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    peak = 0

    def watch_memory() -> None:
        nonlocal peak
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.returncode is None:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.02)

    watch = threading.Thread(target=watch_memory)
    watch.start()
    reached = 0
    while chunk := os.read(process.stdout.fileno(), 1 << 20):
        reached = done(chunk)
        if goal and reached >= goal:
            break
    if not goal:
        process.wait()
    seconds = time.perf_counter() - start
    if goal:
        process.send_signal(signal.SIGINT)
        while os.read(process.stdout.fileno(), 1 << 20):
            pass
    status = process.wait()
    watch.join()
    assert reached >= goal, f"{command} ended at {reached} of {goal}"
    assert goal or status == 0, command
    return Run(seconds, peak / 1e6)


def snapshot_reader() -> Callable[[bytes], int]:
    output = b""

    def read(chunk: bytes) -> int:
        nonlocal output
        output = (output + chunk)[-50_000_000:]
        return counted(output)

    return read


def line_counter() -> Callable[[bytes], int]:
    lines = 0

    def read(chunk: bytes) -> int:
        nonlocal lines
        lines += chunk.count(b"\n")
        return lines

    return read


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def group() -> str:
    return f"benchmark-{random.randrange(10**12)}"


def processor(address: str, events: int) -> Run:
    return run(python("processor.py", "--group", group()), address, snapshot_reader(), events)


def consumer(address: str, events: int) -> Run:
    return run(python("consumer.py", "--group", group()), address, line_counter(), events)


def producer(address: str, events: int) -> Run:
    Witness(address).clean()
    arguments = ("--count", str(events), "--interval", "0", "--quiet")
    return run(python("producer.py", *arguments), address, line_counter(), 0)


def loop(source: str, reader: Callable[[], Callable[[bytes], int]]) -> Callable[[str, int], Run]:
    def timed(address: str, events: int) -> Run:
        return run(python("-c", source, str(events)), address, reader(), events)

    return timed


def bare_producer(address: str, events: int) -> Run:
    Witness(address).clean()
    return run(python("-c", BARE_PRODUCER, str(events)), address, line_counter(), 0)


def best_of(
    rounds: int, programs: dict[str, Callable[[str, int], Run]], address: str, events: int
) -> dict[str, Run]:
    """The shortest run of each program, and its peak memory in MB; the programs take turns."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for number in range(rounds):
        for name, program in programs.items():
            runs[name].append(program(address, events))
            say(f"  {name}, {number + 1} of {rounds}: {runs[name][-1].seconds:.2f} s")
    return {name: min(several) for name, several in runs.items()}


def table(results: dict[str, Run], events: int) -> Iterator[str]:
    """The rows; the ratio is that of the bare loop's time to the program's (1: as fast)."""
    bare = next(result for name, result in results.items() if name.startswith("bare"))
    for name, (seconds, megabytes) in results.items():
        speed, ratio = events / seconds, bare.seconds / seconds
        yield f"{name:<24}{seconds:>8.2f}{speed:>12,.0f}{ratio:>8.2f}{megabytes:>9.0f}"


def scripts(address: str, events: int, peers: bool) -> None:
    head = f"{'program':<24}{'seconds':>8}{'events/s':>12}{'ratio':>8}{'peak MB':>9}"
    say(f"writing {events:,} events")
    rows = [
        *table(
            best_of(3, {"bare producer": bare_producer, "producer.py": producer}, address, events),
            events,
        )
    ]
    say(f"showing {events:,} events")
    shown = {"bare consumer": loop(BARE_CONSUMER, line_counter), "consumer.py": consumer}
    rows += table(best_of(3, shown, address, events), events)
    say(f"counting {events:,} events")
    counting: dict[str, Callable[[str, int], Run]] = {
        "bare processor": loop(BARE_PROCESSOR, snapshot_reader),
        "processor.py": processor,
    }
    for name in PEERS if peers else ():
        if importlib.util.find_spec(name):
            counting[name] = loop(PEERS[name], snapshot_reader)
        else:
            say(f"  {name} is not installed")
    rows += table(best_of(3, counting, address, events), events)
    print(head, *rows, sep="\n")


def fill(address: str, events: int, users: int) -> None:
    """Makes the topic anew, with that many events of so many users."""
    witness = Witness(address)
    witness.clean()
    witness.create(3)
    values = (event(f"user {n % users}", "view", event_id="0" * 36) for n in range(events))
    witness.write((n % 3, b"key", value) for n, value in enumerate(values))


def growth(address: str, events: int) -> None:
    print("catch-up of one processor, 6 users")
    for number in (events, 2 * events, 4 * events):
        fill(address, number, 6)
        result = best_of(3, {f"{number:,} events": processor}, address, number)
        [(name, (seconds, megabytes))] = result.items()
        print(f"  {name}: {seconds:.2f} s, peak {megabytes:.0f} MB", flush=True)

    def two(address: str, number: int) -> Run:
        """Two processors of one group: until their snapshots together hold everything."""
        name, start = group(), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, str(number)) for number in range(2)]
            environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": address}
            processes = []
            for file in files:
                with file.open("wb") as out:
                    command = python("processor.py", "--group", name)
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=environment,
                            stdout=out,
                            stderr=subprocess.DEVNULL,
                        )
                    )
            while sum(counted(file.read_bytes()) for file in files) != number:
                time.sleep(0.02)
            seconds = time.perf_counter() - start
            for process in processes:
                process.send_signal(signal.SIGINT)
            for process in processes:
                process.wait()
        return Run(seconds, 0)

    print(f"catch-up of {4 * events:,} events by one and by two processors")
    for name, (seconds, _) in best_of(
        3, {"one": processor, "two": two}, address, 4 * events
    ).items():
        print(f"  {name}: {seconds:.2f} s", flush=True)

    print("counting under a flood of events, with its snapshots and without")
    for users in (1_000, 100_000):
        speeds: dict[str, list[float]] = {"processor.py": [], SILENT_PROCESSOR: []}
        for _ in range(2):
            for source, several in speeds.items():
                fill(address, 2 * events, users)
                several.append(flooded(address, users, source))
                say(f"  {several[-1]:,.0f} events/s")
        printing, silent = (max(several) for several in speeds.values())
        print(f"  {users:,} users: {printing:,.0f} events/s, {printing / silent:.2f} of the speed")


def flooded(address: str, users: int, source: str) -> float:
    """Events a second that a processor counts while it cannot keep up with what is written."""
    environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": address}
    program = [source] if source.endswith(".py") else ["-c", source]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            python(*program, "--group", group()),
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )

        def output() -> bytes:
            return os.pread(out.fileno(), 1 << 30, 0)

        while not (first := counted(output())):
            time.sleep(0.05)
        started = time.perf_counter()
        values = (event(f"user {n % users}", "view", event_id="0" * 36) for n in range(3_000_000))
        Witness(address).write((n % 3, b"key", value) for n, value in enumerate(values))
        process.send_signal(signal.SIGINT)
        elapsed = time.perf_counter() - started
        process.wait()
        return (counted(output()) - first) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time the scripts against bare kafka-python loops."
    )
    parser.add_argument(
        "--events", type=int, default=300_000, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--peers", action="store_true", help="also other clients' counting loops")
    parser.add_argument("--growth", action="store_true", help="growth of the cost instead")
    options = parser.parse_args()
    say("starting a broker")
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder)) as broker:
        if options.growth:
            growth(broker.address, options.events)
        else:
            scripts(broker.address, options.events, options.peers)


if __name__ == "__main__":
    main()

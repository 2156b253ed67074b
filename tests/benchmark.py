"""How fast the scripts are, against the barest kafka-python loops that do the same work.

python tests/benchmark.py            the three scripts, 300,000 events
python tests/benchmark.py --peers    and other clients (pip install aiokafka quixstreams, before)
python tests/benchmark.py --growth   how the cost grows with events, users and processors

Each program is timed as a whole process: best of three, in turn with the others, for machines are
noisy. Only figures of one run can be compared.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from uuid import uuid4

from broker import ROOT, Broker, Cluster, free_port
from events import event
from witness import Witness

HEAD = """
import collections, json, os, sys, uuid
N, server, group = int(sys.argv[1]), os.environ["KAFKA_BOOTSTRAP_SERVERS"], str(uuid.uuid4())
counts = collections.Counter()
"""
# The client settings of the scripts, but with fetches as large as pays: so the ratio tells what
# the scripts' smaller ones cost, which a slow line needs, and read_committed.
READER = f"""{HEAD}
from kafka import KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
consumer = KafkaConsumer("events", bootstrap_servers=server, group_id=group,
    auto_offset_reset="earliest", enable_auto_commit=False,
    partition_assignment_strategy=[CooperativeStickyAssignor],
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
            place = f"partition={{m.partition}} offset={{m.offset}}"
            print(f"{{place}} key={{m.key.decode()}} {{m.value.decode()}}")
        shown += len(messages)
"""
BARE_PROCESSOR = f"""{READER}
while counts.total() < N:
    for messages in consumer.poll(timeout_ms=500).values():
        for message in messages:
            event = json.loads(message.value)
            counts[event["user_id"], event["action"]] += 1
"""
# It shows its first counts and its last ones, and none between.
SILENT_PROCESSOR = """
import processor
report = processor.report
def silent(counts, left, printed, share):
    if printed and not processor.stopping:
        return printed
    return report(counts, left, printed, share)
processor.report = silent
processor.main()
"""
PEERS = {
    "confluent_kafka": f"""{HEAD}
from confluent_kafka import Consumer
consumer = Consumer({{"bootstrap.servers": server, "group.id": group,
    "auto.offset.reset": "earliest", "enable.auto.commit": False, "broker.address.family": "v4"}})
consumer.subscribe(["events"])
while counts.total() < N:
    for message in consumer.consume(5_000, timeout=0.1):
        event = json.loads(message.value())
        counts[event["user_id"], event["action"]] += 1
""",
    "aiokafka": f"""{HEAD}
import asyncio, aiokafka
async def main():
    consumer = aiokafka.AIOKafkaConsumer("events", bootstrap_servers=server, group_id=group,
        enable_auto_commit=False, auto_offset_reset="earliest", max_partition_fetch_bytes=1 << 22)
    await consumer.start()
    while counts.total() < N:
        for messages in (await consumer.getmany(timeout_ms=500)).values():
            for message in messages:
                event = json.loads(message.value)
                counts[event["user_id"], event["action"]] += 1
    os._exit(0)
asyncio.run(main())
""",
    "quixstreams": f"""{HEAD}
import quixstreams, tempfile
app = quixstreams.Application(broker_address=server, loglevel="ERROR", consumer_group=group,
    auto_offset_reset="earliest", state_dir=tempfile.mkdtemp())
def count(event, state):
    actions = state.get("actions", {{}})
    actions[event["action"]] = actions.get(event["action"], 0) + 1
    state.set("actions", actions)
    counts[""] += 1
    if counts[""] == N:
        os._exit(0)
app.dataframe(app.topic("events", value_deserializer="json")).update(count, stateful=True)
app.run()
""",
}
Run = tuple[float, float]  # seconds, and peak memory in MB


def start(address: str, *arguments: str, out: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A Python process that finds the broker."""
    command = ["env", f"KAFKA_BOOTSTRAP_SERVERS={address}", sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.DEVNULL)


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
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert seen >= lines if lines else process.returncode == 0, arguments
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # getrusage(2)


def best_of_three(programs: dict[str, Callable[[], Run]]) -> dict[str, Run]:
    """The shortest run of each program; they take turns."""
    runs = [{name: program() for name, program in programs.items()} for _ in range(3)]
    return {name: min(run[name] for run in runs) for name in programs}


def scripts(address: str, events: int, peers: bool) -> None:
    """Prints the table; the ratio is that of the bare loop's time to the program's."""
    number, witness = str(events), Witness(address)

    def produce(*arguments: str) -> Run:
        witness.delete_everything()
        return timed(address, *arguments, number)

    writing = {
        "bare producer": lambda: produce("-c", BARE_PRODUCER),
        "producer.py": lambda: produce("producer.py", "--quiet", "--interval=0", "--count"),
    }
    showing = {
        "bare consumer": lambda: timed(address, "-c", BARE_CONSUMER, number, lines=events),
        "consumer.py": lambda: timed(address, "consumer.py", f"--group={uuid4()}", lines=events),
    }
    counting: dict[str, Callable[[], Run]] = {
        "bare processor": lambda: timed(address, "-c", BARE_PROCESSOR, number),
        "processor.py": lambda: timed(address, "processor.py", "--once", f"--group={uuid4()}"),
    }
    for name, source in PEERS.items() if peers else ():
        counting[name] = functools.partial(timed, address, "-c", source, number)
    print(f"{'program':<24}{'seconds':>8}{'events/s':>12}{'ratio':>8}{'peak MB':>9}")
    for programs in (writing, showing, counting):
        results = best_of_three(programs)
        bare, _ = next(iter(results.values()))
        for name, (seconds, megabytes) in results.items():
            speed, ratio = f"{events / seconds:>12,.0f}", f"{bare / seconds:>8.2f}"
            print(f"{name:<24}{seconds:>8.2f}{speed}{ratio}{megabytes:>9.0f}", flush=True)


def fill(address: str, events: int, users: int, anew: bool = True) -> None:
    """Writes so many events of so many users; anew: the topic holds no others."""
    witness = Witness(address)
    if anew:
        witness.delete_everything()
        witness.create_topic(3)
    witness.write((n % 3, b"key", event(f"user {n % users}", "view")) for n in range(events))


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
    name, began = f"--group={uuid4()}", time.perf_counter()
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        processes = [start(address, "processor.py", name, out=out) for out in (one, two)]
        while counted(one) + counted(two) != events:
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        for process in processes:
            process.kill()
    return seconds, 0


def flooded(address: str, users: int, *program: str) -> float:
    """Events a second that a processor counts while it cannot keep up with what is written."""
    fill(address, 100_000, users)
    with tempfile.TemporaryFile() as out:
        process = start(address, *program, f"--group={uuid4()}", out=out)
        while not (first := counted(out)):
            time.sleep(0.05)
        began = time.perf_counter()
        fill(address, 3_000_000, users, anew=False)
        process.send_signal(signal.SIGINT)
        elapsed = time.perf_counter() - began
        process.wait()
        return (counted(out) - first) / elapsed


def growth(address: str, events: int) -> None:
    one = functools.partial(timed, address, "processor.py", "--once", f"--group={uuid4()}")
    for number in (events, 2 * events, 4 * events):
        fill(address, number, 6)
        seconds, megabytes = best_of_three({"one": one})["one"]
        print(f"catch-up, {number:,} events: {seconds:.2f} s, peak {megabytes:.0f} MB", flush=True)
    two = functools.partial(two_processors, address, 4 * events)
    for name, (seconds, _) in best_of_three({"one": one, "two": two}).items():
        print(f"catch-up, {4 * events:,} events, by {name}: {seconds:.2f} s", flush=True)
    for users in (1_000, 100_000):
        printing = max(flooded(address, users, "processor.py") for _ in range(2))
        silent = max(flooded(address, users, "-c", SILENT_PROCESSOR) for _ in range(2))
        share = f"{printing / silent:.2f} of the speed without snapshots"
        print(f"flood, {users:,} users: {printing:,.0f} events/s, {share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the scripts against bare loops.")
    parser.add_argument("--events", type=int, default=300_000, metavar="N")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    Broker.java_options = ()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), [free_port()]) as kafka:
        if options.growth:
            growth(kafka.address, options.events)
        else:
            scripts(kafka.address, options.events, options.peers)


if __name__ == "__main__":
    main()

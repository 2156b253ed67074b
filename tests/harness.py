"""What the tests are made of: the scripts as processes, waiting for conditions, and a witness.

The witness is confluent-kafka (librdkafka), which shares no code with the client under test.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from broker import ROOT
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions, NewTopic

SCRIPTS = ("producer.py", "consumer.py", "processor.py")
TOPIC = "events"
GROUP = "event-watchers"
# What a reader says that has no partition.
NONE_YET = (
    "partitions of events: none yet: others of the group have them, "
    "or there is no topic, no right to it, or no group"
)
# What a processor says that holds a part, and which partitions that is.
PART = (
    r"--- counting partitions of events: ([\d, ]+); others of the group have the rest"
    r" \(all: --group NAME\)"
)
PATIENCE = 60.0  # seconds; generous, for a test that passes does not wait for it

Counts = dict[str, dict[str, int]]


def until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Waits until the condition holds and returns its value; AssertionError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)
    return value


class Script:
    """One of the three scripts (or another command) as a process; its output goes to files."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        number = len(list(folder.glob("*.out")))
        self.out_file = folder / f"{number}.out"
        self.err_file = folder / f"{number}.err"
        self.command = command
        with self.out_file.open("wb") as out, self.err_file.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        # newline="": a lone carriage return must not look like the end of a line.
        with self.out_file.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    @property
    def lines(self) -> list[str]:
        """The complete lines of stdout."""
        return self.out.split("\n")[:-1]

    @property
    def snapshots(self) -> list[Counts]:
        """The complete JSON documents of stdout, which must hold nothing else."""
        documents = []
        text = self.out
        while text.strip():
            try:
                document, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                assert self.process.poll() is None, f"not JSON: {text!r}"
                break  # it is being written
            documents.append(document)
            text = text[end:].lstrip()
        return documents

    def wait(self, timeout: float = PATIENCE) -> int:
        """Waits for the end; returns the exit status."""
        return self.process.wait(timeout)

    def stop(self, signum: int = signal.SIGINT, timeout: float = PATIENCE) -> int:
        """Sends Ctrl-C (or another signal) and returns the exit status."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def connected(self) -> bool:
        """Whether it has a connection: its signal handlers are in place, or about to be."""
        return any(process.net_connections() for process in self.tree())

    def tree(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


Start = Callable[..., Script]  # of the fixture `start`


class Proxy:
    """Passes connections on to a port, and goes on accepting them while nobody listens there.

    So does Docker's for a published port: a client gets a connection to a broker that is down, and
    loses it at once.

    `answers(api_key)` is called with each response of the broker, and is given the API key of its
    request. It says whether the response is passed on, and may take its time to say so; if not,
    the connection is cut. A test may put another function in its place.

    So it may give the way a delay, in seconds a request, and a rate, in bytes of answers a second
    of all connections together.
    """

    def __init__(self, port: int, target: int) -> None:
        self.address = f"localhost:{port}"
        self.target = target
        self.reset()
        self.line = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=100)
        threading.Thread(target=self.accept, daemon=True).start()

    def reset(self) -> None:
        self.answers: Callable[[int], bool] = lambda api_key: True
        self.delay, self.rate = 0.0, math.inf

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                continue
            self.connect(client, server)

    def connect(self, client: socket.socket, server: socket.socket) -> None:
        api_keys: dict[int, int] = {}  # of the requests, by correlation id

        def request(message: bytes) -> bool:
            api_key, _, correlation_id = struct.unpack_from(">hhi", message)
            api_keys[correlation_id] = api_key
            time.sleep(self.delay)
            return True

        def response(message: bytes) -> bool:
            [correlation_id] = struct.unpack_from(">i", message)
            return self.answers(api_keys.pop(correlation_id))

        def paced(data: bytes) -> None:
            for start in range(0, len(data), 10_000):
                with self.line:
                    time.sleep(len(data[start : start + 10_000]) / self.rate)
                client.sendall(data[start : start + 10_000])

        ways = ((client, request, server, server.sendall), (server, response, client, paced))
        for arguments in ways:
            threading.Thread(target=self.copy, args=arguments, daemon=True).start()

    def copy(
        self,
        source: socket.socket,
        passes: Callable[[bytes], bool],
        sink: socket.socket,
        send: Callable[[bytes], None],
    ) -> None:
        # struct.error: a message that is cut off, for its sender was killed.
        with contextlib.suppress(OSError, struct.error), source.makefile("rb") as stream:
            while size := stream.read(4):
                message = stream.read(int.from_bytes(size, "big"))
                if not passes(message):
                    break
                send(size + message)
        # kafka-python loses an answer with which the end of the connection comes.
        time.sleep(0.1)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Pipe:
    """A pipe for a script to write to, by the name of `path`, which only read() empties."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "fifo")
        os.mkfifo(self.path)
        self.end = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self.output = b""

    def is_full(self) -> bool:
        return not select.select([], [self.end], [], 0)[1]

    def fed_by(self, command: list[str]) -> list[str]:
        """The command with its stdout in the pipe."""
        return ["sh", "-c", 'exec "$@" >"$0"', self.path, *command]

    def read(self) -> bytes:
        """All that has come out of it so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.output += os.read(self.end, 1 << 20)
        return self.output


@contextlib.contextmanager
def frozen(*several: Any) -> Iterator[None]:
    """Stops scripts or brokers as Ctrl-Z does; they go on at the end."""
    for one in several:
        one.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in several:
            one.process.send_signal(signal.SIGCONT)


class Message(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Witness:
    """Looks at a broker, and writes to it, with a client of other origin."""

    def __init__(self, address: str) -> None:
        self.address = address
        # librdkafka tries IPv6 as well; quiet, since some tests stop the broker.
        self.settings = {"bootstrap.servers": address, "broker.address.family": "v4"}
        self.admin = AdminClient({**self.settings, "log_level": 0})

    def partitions(self) -> list[int]:
        """The partitions of the topic, none if it does not exist; asking does not create it."""
        topics = self.admin.list_topics(timeout=PATIENCE).topics
        return sorted(topics[TOPIC].partitions) if TOPIC in topics else []

    def copies(self, in_sync: bool = False) -> list[int]:
        """How many copies each partition of the topic has, or has in sync."""
        partitions = self.admin.list_topics(timeout=PATIENCE).topics[TOPIC].partitions
        return [len(p.isrs if in_sync else p.replicas) for _, p in sorted(partitions.items())]

    def ask(
        self, request: Callable[..., dict[Any, Any]], what: list[Any], already: int = 0
    ) -> bool:
        """Asks the controller; returns whether that has done it, False if `already` is its answer.

        Anew if need be: librdkafka, busy, may not notice that it knows the controller by now.
        """
        codes: set[int] = set()

        def answered() -> bool:
            codes.clear()
            for future in request(what, request_timeout=5).values():
                if error := future.exception():
                    codes.add(error.args[0].code())
            return KafkaError._TIMED_OUT not in codes

        until(answered, "the controller answers")
        assert codes <= {already}, codes
        return not codes

    def create(self, partitions: int) -> None:
        """A new topic, instead of one that a client has just created by asking for it."""

        def created() -> bool:
            self.delete(TOPIC)
            return self.ask(self.admin.create_topics, [topic], KafkaError.TOPIC_ALREADY_EXISTS)

        topic = NewTopic(TOPIC, partitions, 1)
        until(created, "the topic is created")
        until(lambda: len(self.partitions()) == partitions, "the topic is there")

    def delete(self, *topics: str) -> None:
        def gone() -> bool:
            there = self.admin.list_topics(timeout=PATIENCE).topics
            if left := [name for name in topics if name in there]:
                self.ask(self.admin.delete_topics, left, KafkaError.UNKNOWN_TOPIC_OR_PART)
            return not left

        until(gone, "the topics are gone")

    def add_partitions(self, total: int) -> None:
        new = NewPartitions(TOPIC, total)
        self.ask(self.admin.create_partitions, [new], KafkaError.INVALID_PARTITIONS)
        until(lambda: len(self.partitions()) == total, "the topic has more partitions")

    def delete_before(self, offsets: dict[int, int]) -> None:
        """Removes the events before these offsets, as retention does in its own time."""
        wanted = [TopicPartition(TOPIC, number, offset) for number, offset in offsets.items()]
        for future in self.admin.delete_records(wanted).values():
            future.result()

    def groups(self) -> list[str]:
        listed = self.admin.list_consumer_groups(request_timeout=PATIENCE).result()
        return [group.group_id for group in listed.valid or []]

    def clean(self) -> None:
        """Leaves neither topics nor groups."""
        topics = self.admin.list_topics(timeout=PATIENCE).topics
        self.delete(*(name for name in topics if not name.startswith("_")))
        for group in self.groups():
            until(lambda: not self.members(group), f"{group} has no members")
            self.admin.delete_consumer_groups([group])[group].result()

    def members(self, group: str = GROUP) -> list[list[int]]:
        """The partitions of each member of the group; [[-1]] while its coordinator cannot tell."""
        # Not describe_consumer_groups(): when that is not answered, librdkafka 2.x aborts Python.
        try:
            found = self.admin.list_groups(group, timeout=5)
        except KafkaException:
            return [[-1]]
        members: list[Any] = [member for state in found for member in state.members]
        return [assigned(member.assignment) for member in members]

    def committed(self) -> dict[int, int]:
        """The group's committed offset of each partition that has one."""
        consumer = Consumer({**self.settings, "group.id": GROUP})
        asked = [TopicPartition(TOPIC, number) for number in self.partitions()]

        def answer() -> list[TopicPartition] | None:
            with contextlib.suppress(KafkaException):  # the coordinator is not ready yet
                return consumer.committed(asked, timeout=PATIENCE)
            return None

        answered = until(answer, "the coordinator answers") if asked else []
        consumer.close()
        return {entry.partition: entry.offset for entry in answered if entry.offset >= 0}

    def log(self) -> list[Message]:
        """All messages of the topic, those of a partition in order."""
        consumer = Consumer(
            {**self.settings, "group.id": "witness", "enable.partition.eof": True}
            | {"enable.auto.commit": False, "auto.offset.reset": "earliest"}
            | {"fetch.wait.max.ms": 10}  # before the broker says that there is no more
        )
        unread = set(self.partitions())
        consumer.assign([TopicPartition(TOPIC, number, 0) for number in unread])
        messages = []
        message: Any  # by its types, all that it is asked for may be None
        deadline = time.monotonic() + PATIENCE
        while unread:
            assert time.monotonic() < deadline, f"no end of partitions {unread}"
            for message in consumer.consume(1_000, timeout=0.05):
                partition, offset, error = message.partition(), message.offset(), message.error()
                if error is None:
                    messages.append(Message(partition, offset, message.key(), message.value()))
                else:
                    assert error.name() == "_PARTITION_EOF", error
                    unread.discard(partition)
        consumer.close()
        return sorted(messages, key=lambda message: message[:2])

    def write(
        self, messages: Iterable[tuple[int, bytes | None, bytes | None]], compression: str = "none"
    ) -> None:
        """Writes raw (partition, key, value)."""
        errors: set[object] = set()
        producer = Producer({**self.settings, "linger.ms": 5, "compression.type": compression})
        for number, (partition, key, value) in enumerate(messages):
            if number % 50_000 == 0:  # half of what its buffer takes
                producer.flush(PATIENCE)
            producer.produce(TOPIC, value, key, partition, on_delivery=lambda e, _: errors.add(e))
        assert producer.flush(PATIENCE) == 0
        assert errors <= {None}


def assigned(assignment: bytes) -> list[int]:
    """The partitions in a member's assignment, of at most one topic (Kafka's consumer protocol)."""
    if len(assignment) < 12:  # it is just joining, or has none
        return []
    [length] = struct.unpack_from(">h", assignment, 6)
    [number] = struct.unpack_from(">i", assignment, 8 + length)
    return sorted(struct.unpack_from(f">{number}i", assignment, 12 + length))


def event(user_id: Any = "alice", action: Any = "view", **fields: Any) -> bytes:
    """A good event, unless a field given is none."""
    good = {"event_id": "0", "user_id": user_id, "action": action, "timestamp": "2026-01-01"}
    return json.dumps(good | fields).encode()


def line(message: Message) -> str:
    """The line that producer and consumer show for a message of printable UTF-8."""
    key, value = ("null" if data is None else data.decode() for data in message[2:])
    return f"partition={message.partition} offset={message.offset} key={key} {value}"


def count(messages: Iterable[Message]) -> Counts:
    """The counts of these messages, all of them good events: the processor's answer, recounted."""
    total: Counts = {}
    for message in messages:
        assert message.value is not None
        fields = json.loads(message.value)
        actions = total.setdefault(fields["user_id"], {})
        actions[fields["action"]] = actions.get(fields["action"], 0) + 1
    return total


def add(*several: Counts) -> Counts:
    """The sum of counts."""
    total: dict[str, Counter[str]] = {}
    for counts in several:
        for user, actions in counts.items():
            total.setdefault(user, Counter()).update(actions)
    return {user: dict(actions) for user, actions in total.items()}


def produce(start: Start, number: int, **where: Any) -> Script:
    """Sends that many events as fast as it goes and waits for them."""
    producer = start("producer.py", "--count", str(number), "--interval", "0", **where)
    assert producer.wait() == 0
    assert producer.err.splitlines()[-1] == f"--- {number} delivered, 0 failed"
    assert len(producer.lines) == number
    return producer


def main_job(start: Start, witness: Witness, **where: Any) -> list[Script]:
    """A hundred events are sent, shown and counted; returns the scripts."""
    producer = produce(start, 100, **where)
    log = witness.log()
    assert shown(producer) == sorted(map(line, log))
    assert witness.partitions() == [0, 1, 2]
    consumer = start("consumer.py", **where)
    until(lambda: len(consumer.lines) >= 100, "all events are shown")
    assert consumer.stop() == 0
    assert shown(consumer) == shown(producer)
    processor = start("processor.py", "--once", "--group", "counting", **where)
    assert processor.wait() == 0
    assert processor.snapshots == [count(log)]
    return [producer, consumer, processor]


def settled(witness: Witness, members: int) -> Callable[[], bool]:
    """The condition that so many members share all partitions, each of them holding its share."""

    def condition() -> bool:
        held = witness.members()
        everything = sorted(partition for share in held for partition in share)
        few, more = divmod(len(witness.partitions()), members)
        sizes = sorted(map(len, held))
        return (
            everything == witness.partitions()
            and sizes == [few] * (members - more) + [few + 1] * more
        )

    return condition


def shown(*consumers: Script) -> list[str]:
    """All lines of their output together, in order."""
    return sorted(line for consumer in consumers for line in consumer.lines)


def assert_plain(script: Script) -> None:
    """A few plain lines on stderr, and no traceback."""
    assert "Traceback" not in script.err
    assert len(script.err.splitlines()) < 15, script.err


def python(script: str, *arguments: str) -> list[str]:
    """The command that runs one of the scripts."""
    return [sys.executable, str(ROOT / script), *arguments]


def patched(lines: str, script: str, *arguments: str) -> list[str]:
    """The command that runs one of the scripts after these lines, which change kafka-python."""
    run = f'import runpy; runpy.run_path({str(ROOT / script)!r}, run_name="__main__")'
    return [sys.executable, "-c", f"{lines}\n{run}", *arguments]


def failing(sign: Path) -> str:
    """Lines for patched(): while the file is there, a reader's calls fail, and add to its size."""
    return f"""
from kafka import KafkaConsumer, errors
def fails(call):
    def failing(*arguments, **settings):
        try:
            with open({str(sign)!r}, "r+") as file:
                file.seek(0, 2)
                file.write(".")
        except FileNotFoundError:
            return call(*arguments, **settings)
        raise errors.KafkaTimeoutError
    return failing
KafkaConsumer.poll = fails(KafkaConsumer.poll)
KafkaConsumer.committed = fails(KafkaConsumer.committed)
"""


def choosing(expression: str) -> str:
    """Lines for patched(): the producer takes this for every user and every action."""
    choice = f"lambda values: {expression} if type(values[0]) is str else choice(values)"
    return f"import random; choice, left = random.choice, list('abcd'); random.choice = {choice}"

"""The scripts as processes: start one, wait for a condition, look at what it has printed."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from broker import ROOT

SCRIPTS = ("producer.py", "consumer.py", "processor.py")
# What a reader reports instead of its partitions when none are assigned to it.
NO_PARTITIONS = "none; the other members have them all, or topic, access or coordinator is missing"
# The line of a processor that is assigned some partitions, or all three.
PARTIAL_ASSIGNMENT = (
    r"--- counting partitions of events: ([\d, ]+); other members have the rest"
    r" \(--group NAME counts all\)"
)
FULL_ASSIGNMENT = "--- counting partitions of events: 0, 1, 2 (all)\n"
# What the producer reports of a topic that does not exist, with the command that creates it.
MISSING_TOPIC = r"--- topic events is missing or forbidden; create it: `(.*)`\n"
TIMEOUT = 60.0  # seconds; generous, because a test that passes does not wait for it

Counts = dict[str, dict[str, int]]


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> Any:
    """Return the condition's value once that is true; raise AssertionError after `timeout` s."""
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
        """All of stdout so far."""
        # newline="": a lone carriage return must not look like the end of a line.
        with self.out_file.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()

    @property
    def err(self) -> str:
        """All of stderr so far."""
        return self.err_file.read_text()

    @property
    def lines(self) -> list[str]:
        """The complete lines of stdout."""
        return self.out.split("\n")[:-1]

    @property
    def snapshots(self) -> list[Counts]:
        """The complete JSON documents of stdout, which must contain nothing else."""
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

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the script to exit; return its status."""
        return self.process.wait(timeout)

    def stop(self, signum: int = signal.SIGINT, timeout: float = TIMEOUT) -> int:
        """Send Ctrl-C (or another signal), wait for the script to exit, return its status."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def is_connected(self) -> bool:
        """Return whether it has a connection: its signal handlers are in place, or almost."""
        return any(process.net_connections() for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """Return its process and that one's descendants."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


Start = Callable[..., Script]  # the type of the fixture `start`


def python(script: str, *arguments: str) -> list[str]:
    """Return the command that runs one of the scripts."""
    return [sys.executable, str(ROOT / script), *arguments]


def patched(patches: str, script: str, *arguments: str) -> list[str]:
    """Return the command that runs one of the scripts with patches of kafka-python.

    `patches` are names of modules in tests/patches and client settings, separated by spaces:
    "slow_poll max_poll_interval_ms=2000".
    """
    return python("tests/patches/run.py", *patches.split(), "--", str(ROOT / script), *arguments)


def printed_lines(*scripts: Script) -> list[str]:
    """Return all lines that the scripts have printed, sorted."""
    return sorted(line for script in scripts for line in script.lines)


def assert_few_plain_lines(script: Script) -> None:
    """Assert that there are only a few lines on stderr, and no traceback."""
    assert "Traceback" not in script.err
    assert len(script.err.splitlines()) < 15, script.err


def send_events(start: Start, number: int, **where: Any) -> Script:
    """Send that many events as fast as possible; return the producer, which has exited."""
    producer = start("producer.py", "--count", str(number), "--interval", "0", **where)
    assert producer.wait() == 0
    assert producer.err.splitlines()[-1] == f"--- {number} delivered, 0 failed"
    assert len(producer.lines) == number
    return producer


@contextlib.contextmanager
def frozen(*several: Any) -> Iterator[None]:
    """Stop scripts or brokers, as Ctrl-Z does, and let them continue in the end."""
    for one in several:
        one.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in several:
            one.process.send_signal(signal.SIGCONT)


class Pipe:
    """A pipe as stdout of a script; nobody but read() empties it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "fifo")
        os.mkfifo(self.path)
        self.end = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self.output = b""

    def is_full(self) -> bool:
        return not select.select([], [self.end], [], 0)[1]

    def as_stdout_of(self, command: list[str]) -> list[str]:
        """Return the command with its stdout redirected to the pipe."""
        return ["sh", "-c", 'exec "$@" >"$0"', self.path, *command]

    def read(self) -> bytes:
        """Empty the pipe; return all that has come out of it so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.output += os.read(self.end, 1 << 20)
        return self.output

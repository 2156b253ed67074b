"""The scripts as processes, what they report on stderr, and waiting for conditions."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import stderr_lines
from broker import ROOT
from events import Snapshot

SCRIPTS = ("producer.py", "consumer.py", "processor.py")
TOPIC = "events"
GROUP_ID = "event-watchers"
TIMEOUT = 60.0  # seconds; generous, as a test that passes does not wait for it


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> Any:
    """Wait until the condition is true and return its value.

    Fail after `timeout` seconds, or when a script of this test has ended with a traceback.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        for script in Script.running:
            has_crashed = script.process.poll() is not None and "Traceback" in script.err
            assert not has_crashed, f"{script.command}, before {what}:\n{script.err}"
        time.sleep(0.1)
    return value


class Script:
    """One of the three scripts, or another command, as a process."""

    running: ClassVar[list["Script"]] = []  # those whose end the test has not waited for yet

    def __init__(
        self, command: list[str], folder: Path, environment: dict[str, str], stdout: int | None
    ) -> None:
        number = len(list(folder.glob("*.err")))
        self.command = command
        self.out_file, self.err_file = folder / f"{number}.out", folder / f"{number}.err"
        with self.out_file.open("wb") as file, self.err_file.open("wb") as stderr:
            options: Any = {"stdin": subprocess.DEVNULL, "stderr": stderr, "cwd": ROOT}
            options |= {"stdout": stdout or file, "env": os.environ | environment}
            self.process = subprocess.Popen(command, **options)
        Script.running.append(self)

    @property
    def out(self) -> str:
        # newline="": a carriage return alone must not look like the end of a line.
        with self.out_file.open(encoding="utf-8", newline="") as file:
            return file.read()

    @property
    def err(self) -> str:
        return self.err_file.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[str]:
        """The complete lines of stdout."""
        return self.out.split("\n")[:-1]

    @property
    def snapshots(self) -> list[Snapshot]:
        """The complete JSON documents of stdout, which must contain nothing else."""
        documents, text = [], self.out
        while text.strip():
            try:
                document, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                assert self.process.poll() is None, f"not JSON: {text!r}"
                break  # it is being written
            documents.append(document)
            text = text[end:].lstrip()
        return documents

    def find(self, pattern: str) -> list[Any]:
        """Return what re.findall() finds in stderr for a pattern from stderr_lines.py."""
        return re.findall(pattern, self.err, re.MULTILINE)

    @property
    def assigned(self) -> list[int] | None:
        """The partitions that were last reported as assigned; None before the first report."""
        found = self.find(stderr_lines.ASSIGNED)
        return [int(number) for number in re.findall(r"\d+", found[-1])] if found else None

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until it exits; return the exit status."""
        if self in Script.running:
            Script.running.remove(self)
        return self.process.wait(timeout)

    def stop(self, signum: int = signal.SIGINT, timeout: float = TIMEOUT) -> int:
        """Send Ctrl-C or another signal; return the exit status."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def processes(self) -> list[psutil.Process]:
        """Return the process and its children; none if it has exited."""
        if self.process.poll() is not None:
            return []
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]


def script_command(*arguments: str) -> list[str]:
    """Return the command that runs a script."""
    script, *options = arguments
    return [sys.executable, str(ROOT / script), *options]


class Start:
    """Start scripts, and terminate those that still run when the test is over."""

    def __init__(self, folder: Path, default_address: Callable[[], str]) -> None:
        self.folder = folder
        self.default_address = default_address
        self.scripts: list[Script] = []

    def __call__(
        self,
        *arguments: str,
        edit: tuple[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        command: list[str] | None = None,
        address: str | None = None,
        environment: dict[str, str] | None = None,
        stdout: int | None = None,
    ) -> Script:
        """Start a script with these arguments, or another command.

        It finds the test's broker, or that at `address`. `settings` are those of its client.
        `edit` is a text in the script and what replaces it, such as a shorter time.
        """
        if address is None:
            address = self.default_address()
        variables = {"KAFKA_BOOTSTRAP_SERVERS": address, **(environment or {})}
        if settings:
            variables["KAFKA_CLIENT_SETTINGS"] = json.dumps(settings)
        command = command or script_command(*arguments)
        if edit:
            text = (ROOT / arguments[0]).read_text()
            assert text.count(edit[0]) == 1
            copy = self.folder / f"{len(self.scripts)}-{arguments[0]}"
            copy.write_text(text.replace(*edit))
            command[1] = str(copy)
        self.scripts.append(Script(command, self.folder, variables, stdout))
        return self.scripts[-1]

    def terminate_all(self) -> None:
        """Terminate the scripts; show how each has ended, for the report of a test that failed."""
        for script in self.scripts:
            for process in script.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        for script in self.scripts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.wait(20)
            script.process.kill()
            script.wait()
            print(f"--- {script.command}: {script.process.returncode}")
            print(script.out[-400:], script.err[-4000:], sep="\n")


class Pipe:
    """A pipe for a script's stdout: start(..., stdout=pipe.write_end). Only read() empties it."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self.reader = os.fdopen(read_end, "rb", buffering=0)
        os.set_blocking(read_end, False)
        self.contents = b""

    def is_full(self) -> bool:
        return not select.select([], [self.write_end], [], 0)[1]

    def read(self) -> bytes:
        """Return everything that has been written to the pipe so far."""
        while chunk := self.reader.read(1 << 20):
            self.contents += chunk
        return self.contents


@contextlib.contextmanager
def frozen(*several: Any) -> Iterator[None]:
    """Suspend scripts or brokers, as Ctrl-Z does, until the end of the `with` block."""
    for one in several:
        one.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in several:
            one.process.send_signal(signal.SIGCONT)


def start_readers(start: Start, **options: Any) -> tuple[Script, Script]:
    """Start a consumer and a processor in separate groups."""
    return start("consumer.py", **options), start("processor.py", "--group", "other", **options)


def send_events(start: Start, number: int, **options: Any) -> Script:
    """Have producer.py send this many events; return it when all are acknowledged."""
    arguments = ("--count", str(number), "--interval", "0")
    producer = start("producer.py", *arguments, **options)
    assert producer.wait() == 0
    assert producer.err.splitlines()[-1] == f"--- {number} delivered, 0 failed"
    assert len(producer.lines) == number
    return producer


def printed_lines(*scripts: Script) -> list[str]:
    """Return all lines that these scripts have printed to stdout, sorted."""
    return sorted(line for script in scripts for line in script.lines)


def assert_clean_stop(*scripts: Script, signum: int = signal.SIGINT) -> None:
    """Stop the scripts, one after the other; each must exit with status 0 and a plain stderr."""
    for script in scripts:
        assert script.stop(signum, timeout=20) == 0
        assert_plain_stderr(script)


def assert_plain_stderr(*scripts: Script) -> None:
    """Check that each script has printed only whole messages, and few but those of an outage."""
    for script in scripts:
        lines = script.err.splitlines()
        assert all(line.startswith("--- ") for line in lines), script.err
        others = [line for line in lines if not re.search(" assigned | failed: ", line)]
        assert len(others) < 15, script.err

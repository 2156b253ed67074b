"""The scripts as processes, what they report on stderr, and waiting for conditions.

consumer = start("consumer.py", "--group", "mine")
wait_until(lambda: len(consumer.lines) == 9, "all events are printed")
assert consumer.stop() == 0
"""

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
from typing import Any

import psutil
import reports
from broker import ROOT
from events import Counts

SCRIPTS = ("producer.py", "consumer.py", "processor.py")
TOPIC = "events"
GROUP_ID = "event-watchers"
TIMEOUT = 60.0  # seconds; generous, as a test that passes does not wait for it


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> Any:
    """Wait until the condition is true and return its value; after `timeout` seconds, fail."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)
    return value


class Script:
    """One of the three scripts, or another command, as a process."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        environment: dict[str, str],
        stdout: int | None = None,
    ) -> None:
        number = len(list(folder.glob("*.err")))
        self.command = command
        self.out_file = folder / f"{number}.out"
        self.err_file = folder / f"{number}.err"
        with self.out_file.open("wb") as file, self.err_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=stderr,
            )

    @property
    def out(self) -> str:
        # newline="": a carriage return alone must not look like the end of a line.
        with self.out_file.open(encoding="utf-8", newline="") as file:
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
        """Return the matches of a pattern, from reports.py, in stderr, as re.findall() does."""
        return re.findall(pattern, self.err, re.MULTILINE)

    @property
    def assigned(self) -> list[int] | None:
        """The partitions that were last reported as assigned; None before the first report."""
        found = self.find(reports.ASSIGNMENT)
        return [int(number) for number in re.findall(r"\d+", found[-1])] if found else None

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until it exits; return the exit status."""
        return self.process.wait(timeout)

    def stop(self, signum: int = signal.SIGINT, timeout: float = TIMEOUT) -> int:
        """Send Ctrl-C or another signal; return the exit status."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def processes(self) -> list[psutil.Process]:
        """Return the running process and its children, if there are any."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def script_command(*arguments: str, patches: dict[str, Any] | None = None) -> list[str]:
    """Return the command that runs a script, with patches of kafka-python if there are any."""
    script, *options = arguments
    command = [sys.executable, str(ROOT / script), *options]
    if patches:
        runner = ROOT / "tests" / "patches" / "run.py"
        command[1:1] = [str(runner), json.dumps(patches)]
    return command


class Start:
    """Start scripts, and terminate those that still run when the test is over."""

    def __init__(self, folder: Path, default_address: Callable[[], str]) -> None:
        self.folder = folder
        self.default_address = default_address
        self.scripts: list[Script] = []

    def __call__(
        self,
        *arguments: str,
        patches: dict[str, Any] | None = None,
        command: list[str] | None = None,
        address: str | None = None,
        environment: dict[str, str] | None = None,
        stdout: int | None = None,
    ) -> Script:
        """Start a script with these arguments, or another command.

        It finds the test's broker, or that at `address`. Before it runs, `patches` are applied:
        the names of functions in tests/patches, with their argument.
        """
        if address is None:
            address = self.default_address()
        variables = {"KAFKA_BOOTSTRAP_SERVERS": address, **(environment or {})}
        command = command or script_command(*arguments, patches=patches)
        self.scripts.append(Script(command, self.folder, variables, stdout))
        return self.scripts[-1]

    def terminate_all(self) -> None:
        """Terminate the scripts; show how each has ended, for the report of a test that failed."""
        for script in self.scripts:
            for process in script.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        for script in self.scripts:
            try:
                script.wait(20)
            except subprocess.TimeoutExpired:
                script.process.kill()
                script.wait()
            print(f"--- {script.command}: {script.process.returncode}")
            print(script.out[-400:], script.err[-4000:], sep="\n")


class Pipe:
    """A pipe whose write end is a script's stdout, and which only read() empties."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.contents = b""

    def is_full(self) -> bool:
        return not select.select([], [self.write_end], [], 0)[1]

    def read(self) -> bytes:
        """Return everything that has been written to the pipe so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.contents += os.read(self.read_end, 1 << 20)
        return self.contents

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


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


def assert_plain_stderr(*scripts: Script) -> None:
    """Check that each script has reported a few plain lines at most, and no traceback."""
    for script in scripts:
        assert "Traceback" not in script.err
        assert len(script.err.splitlines()) < 15, script.err


def assert_clean_stop(*scripts: Script) -> None:
    """Stop the scripts, one after the other; each must exit with status 0 and a plain stderr."""
    for script in scripts:
        assert script.stop() == 0
        assert_plain_stderr(script)

"""How the scripts start and end when something about them, not Kafka, is unusual."""

import re
import shlex
import signal
import sys

import pytest
from broker import free_port
from harness import SCRIPTS, Pipe, Start, Witness, line, produce, python, until


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_broker(signum: int, start: Start) -> None:
    scripts = [start(name, address=f"localhost:{free_port()}") for name in SCRIPTS]
    for script in scripts:
        until(lambda: "trying again" in script.err, "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # as it ends any program
        assert script.out == ""
        assert len(script.err.splitlines()) == 1


def test_bad_arguments_are_usage_errors(start: Start) -> None:
    bad = "\udce9"  # a byte that is not UTF-8, as Python takes it from a command line
    for option in ("producer.py --count", "consumer.py --group", "processor.py --group"):
        script = start(*option.split(), bad, address="localhost:1")
        assert script.wait(9) == 2  # before it looks for a broker
        assert script.err.startswith("usage: ")
        assert "Traceback" not in script.err


@pytest.mark.parametrize(
    "arguments", ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]
)
def test_a_reader_that_leaves_ends_the_script(
    arguments: str, start: Start, witness: Witness
) -> None:
    start("producer.py", "--interval", "0.01", "--quiet")
    until(witness.log, "there are events")
    pipeline = f"{shlex.join(python(*arguments.split()))} | head -1; echo status ${{PIPESTATUS[0]}}"
    script = start(command=["bash", "-c", pipeline])
    assert script.wait() == 0
    first, status = script.lines
    assert first == "{" if "processor" in arguments else first.startswith("partition=")
    assert status == "status 0"
    assert "Traceback" not in script.err
    assert "Error" not in script.err
    if "producer" in arguments:
        assert re.fullmatch(r"--- \d+ delivered, 0 failed\n", script.err)


@pytest.mark.parametrize(
    ("to", "why"), [(">&-", "--- no stdout to write to"), (">/dev/full", "No space left on device")]
)
def test_what_cannot_be_shown_is_not_committed(
    to: str, why: str, start: Start, witness: Witness
) -> None:
    produce(start, 9)
    for name in ("consumer.py", "processor.py"):
        script = start(command=["bash", "-c", f"{shlex.join(python(name))} {to}"])
        assert script.wait() != 0
        assert why in script.err
    assert witness.committed() == {}


# Runs a command with a stdout that takes what it can at once, as some parents (ssh, node) leave it.
NON_BLOCKING = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK), 1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_no_line_is_lost_in_a_full_pipe(start: Start, witness: Witness, pipe: Pipe) -> None:
    produce(start, 5000)
    consumer = start(
        command=[sys.executable, "-c", NON_BLOCKING, pipe.path, *python("consumer.py")],
        environment={"PYTHONUNBUFFERED": "1"},  # usual in containers; Python's own stdout loses so
    )
    until(pipe.is_full, "the pipe is full")
    until(lambda: len(pipe.read().splitlines()) == 5000, "all is shown")
    until(lambda: sum(witness.committed().values()) == 5000, "all is committed")
    assert consumer.stop() == 0
    assert sorted(pipe.read().decode().splitlines()) == sorted(map(line, witness.log()))


def test_a_signal_ends_all_cleanly_and_they_leave_the_group(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumer, processor = start("consumer.py"), start("processor.py")
    until(lambda: consumer.lines and processor.snapshots, "all are at work")
    for script in (producer, consumer, processor):
        assert script.stop(signal.SIGTERM, timeout=20) == 0
        assert "Traceback" not in script.err
    assert witness.members() == []
    # The last line is the script's own, so that the prompt does not stand behind ^C.
    assert re.fullmatch(r"--- \d+ delivered, 0 failed", producer.err.splitlines()[-1])
    for reader in (consumer, processor):
        assert reader.err.splitlines()[-1] == "--- leaving the group"

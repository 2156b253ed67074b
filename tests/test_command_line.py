"""Arguments, signals and pipes: how the scripts start and stop."""

import re
import shlex
import signal
import subprocess

import pytest
from broker import free_port
from events import event
from scripts import SCRIPTS, Pipe, Start, python, wait_until
from witness import Witness


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_script_that_waits_for_a_broker(signum: int, start: Start) -> None:
    scripts = [start(name, address=f"localhost:{free_port()}") for name in SCRIPTS]
    for script in scripts:
        wait_until(lambda: "retrying" in script.err, "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # as any program
        assert script.out == ""
        assert len(script.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("producer.py", "--count", "many"),
        ("producer.py", "--count", "-1"),
        ("producer.py", "--interval", "nan"),
        ("producer.py", "--interval", "inf"),
        ("producer.py", "--interval", "-1"),
        ("consumer.py", "--group", ""),
        ("processor.py", "--group", ""),
        ("consumer.py", "--group", "\udce9"),  # a byte that is not UTF-8
    ],
)
def test_bad_arguments_are_usage_errors(arguments: tuple[str, ...], start: Start) -> None:
    script = start(*arguments, address="localhost:1")
    assert script.wait(9) == 2  # before it looks for a broker
    assert script.err.startswith("usage: ")
    assert "Traceback" not in script.err


@pytest.mark.parametrize(
    "arguments", ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]
)
def test_a_second_ctrl_c_stops_a_script_with_blocked_output(
    arguments: str, start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    script = start(command=pipe.as_stdout_of(python(*arguments.split())))
    wait_until(pipe.is_full, "the pipe is full")
    script.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        script.wait(2)
    assert script.stop(timeout=5) == -signal.SIGINT


def test_two_signals_at_once_count_as_one(start: Start, witness: Witness) -> None:
    """timeout(1) sends each signal to the command and to its process group."""
    consumer = start("consumer.py")
    wait_until(lambda: consumer.err, "it has joined the group")
    consumer.process.send_signal(signal.SIGTERM)
    assert consumer.stop(signal.SIGTERM) == 0
    assert consumer.err.endswith("--- leaving the group\n")


@pytest.mark.parametrize(
    "arguments", ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]
)
def test_a_closed_pipe_stops_the_script(arguments: str, start: Start, witness: Witness) -> None:
    start("producer.py", "--interval", "0.01", "--quiet")
    wait_until(witness.messages, "there are events")
    pipeline = f"{shlex.join(python(*arguments.split()))} | head -1; echo status ${{PIPESTATUS[0]}}"
    script = start(command=["bash", "-c", pipeline])
    assert script.wait() == 0
    first, status = script.lines
    assert first == "{" if "processor" in arguments else first.startswith("partition=")
    assert status == "status 0"
    assert "Traceback" not in script.err
    assert "Error" not in script.err
    if "producer" in arguments:
        assert re.search(r"^--- \d+ delivered, 0 failed\n\Z", script.err, re.MULTILINE)

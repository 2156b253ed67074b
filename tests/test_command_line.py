"""The scripts as programs: arguments, signals before they are connected, and pipes."""

import re
import shlex
import signal
import subprocess

import pytest
import reports
from broker import free_port
from events import event
from scripts import SCRIPTS, Pipe, Start, script_command, wait_until
from witness import Witness


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_script_that_waits_for_a_broker(signum: int, start: Start) -> None:
    scripts = [start(name, address=f"localhost:{free_port()}") for name in SCRIPTS]
    for script in scripts:
        wait_until(lambda: script.find(reports.NO_CONNECTION), "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # like any program
        assert script.out == ""
        assert len(script.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "producer.py --count many",
        "producer.py --count -1",
        "producer.py --interval nan",
        "producer.py --interval inf",
        "producer.py --interval -1",
        "consumer.py --group ''",
        "processor.py --group ''",
        "consumer.py --group \udce9",  # a byte that is not UTF-8, as Python represents it
        "processor.py --group \udce9",
    ],
)
def test_bad_arguments_are_usage_errors(arguments: str, start: Start) -> None:
    script = start(*shlex.split(arguments), address="localhost:1")
    assert script.wait(9) == 2  # before it looks for a broker
    assert script.err.startswith("usage: ")
    assert "Traceback" not in script.err


@pytest.mark.parametrize(
    "arguments", ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]
)
def test_a_closed_pipe_stops_a_script_without_an_error(
    arguments: str, start: Start, witness: Witness
) -> None:
    start("producer.py", "--interval", "0.01", "--quiet")
    wait_until(witness.messages, "there are events")
    command = shlex.join(script_command(*arguments.split()))
    pipeline = start(command=["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"])
    assert pipeline.wait() == 0
    first_line, status = pipeline.lines
    assert first_line == "{" if "processor" in arguments else first_line.startswith("partition=")
    assert status == "0"
    assert not re.search("Traceback|Error", pipeline.err)
    if "producer" in arguments:
        [(_, failed)] = pipeline.find(reports.DELIVERED)
        assert failed == "0"


@pytest.mark.parametrize(
    "arguments", ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]
)
def test_a_second_ctrl_c_stops_a_script_whose_output_is_blocked(
    arguments: str, start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    script = start(*arguments.split(), stdout=pipe.write_end)
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
    assert consumer.find(reports.LEAVING)

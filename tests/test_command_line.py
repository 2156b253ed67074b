"""The scripts as programs: arguments, signals before they are connected, and pipes."""

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import stderr_lines
from broker import free_port
from events import event
from scripts import SCRIPTS, Pipe, Start, script_command, start_readers, wait_until
from witness import Witness

ALL = ["producer.py --interval 0", "consumer.py", "processor.py --group counting"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_script_that_waits_for_a_broker(signum: int, start: Start) -> None:
    scripts = [start(name, address=f"localhost:{free_port()}") for name in SCRIPTS]
    for script in scripts:
        wait_until(lambda: script.find(stderr_lines.CONNECTION_FAILED), "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # like any program
        assert script.out == ""
        assert all(line.startswith("--- ") for line in script.err.splitlines())


@pytest.mark.parametrize("arguments", ALL)
def test_a_closed_pipe_stops_a_script(arguments: str, start: Start, witness: Witness) -> None:
    start("producer.py", "--interval", "0.01", "--quiet")
    wait_until(witness.messages, "there are events")
    command = shlex.join(script_command(*arguments.split()))
    pipeline = start(command=["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"])
    assert pipeline.wait() == 0
    first_line, status = pipeline.lines
    assert first_line == "{" if "processor" in arguments else first_line.startswith("partition=")
    assert status == "1"
    assert pipeline.find(stderr_lines.STOPPED)[0].startswith("[Errno 32] Broken pipe")
    assert not re.search("Traceback|Exception", pipeline.err)
    if "producer" in arguments:
        assert [failed for _, failed in pipeline.find(stderr_lines.DELIVERED)] == ["0"]
    else:
        assert pipeline.find(stderr_lines.LEAVING)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_stops_the_scripts(start: Start, witness: Witness) -> None:
    with Path("/dev/full").open("wb") as full:
        producer = start("producer.py", "--interval", "0.1", stdout=full.fileno())
        assert producer.wait() == 1
        readers = start_readers(start, stdout=full.fileno())
        reason = "[Errno 28] No space left on device"
        account = f"--- {len(witness.messages())} delivered, 0 failed"
        assert producer.err.splitlines() == [f"--- stopped: {reason} (topic events)", account]
        for reader in readers:
            assert reader.wait() == 1
            assert reader.find(stderr_lines.LEAVING)
            assert reader.err.endswith(f"\nOSError: {reason}\n")
            assert "Exception ignored" not in reader.err
    assert witness.committed() == {}


def test_an_exception_in_print_events_is_seen(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    function = "def print_events(batches: Batches) -> None:\n"
    for error, reason in (
        ("FileNotFoundError('/no/file')", "FileNotFoundError: /no/file"),
        ("KeyError('mistake')", "KeyError: 'mistake'"),
        ("BrokenPipeError('mine')", "--- stopped: mine"),
    ):
        consumer = start("consumer.py", edit=(function, f"{function}    raise {error}\n"))
        assert consumer.wait() == 1
        assert consumer.err.splitlines()[-1] == reason
        assert ("Traceback" in consumer.err) == (not reason.startswith("---"))
        assert witness.assignments() == []  # it has left the group,
        assert witness.committed() == {}  # and its event is still to be handled


def test_a_second_ctrl_c_kills(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write((0, b"key", event(f"user {number}")) for number in range(3000))
    pipes = [Pipe() for _ in ALL]
    scripts = [start(*a.split(), stdout=p.write_end) for a, p in zip(ALL, pipes, strict=True)]
    for script, pipe in zip(scripts, pipes, strict=True):
        wait_until(pipe.is_full, "the pipe is full")
        script.process.send_signal(signal.SIGINT)
    for script in scripts:
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(2)
        assert script.stop(timeout=5) == -signal.SIGINT

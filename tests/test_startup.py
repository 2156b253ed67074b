"""How the scripts start and end when something about them, not Kafka, is unusual."""

import random
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator

import pytest
from broker import free_port
from harness import SCRIPTS, Pipe, Start, Witness, line, produce, python, until


@pytest.fixture(scope="module")
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_without_a_broker_it_says_why_and_how_to_start_one(
    start: Start, silent_server: str
) -> None:
    """kafka-python's own reason at once, where it has one; after 10 s the end."""
    reasons = {
        f"localhost:{free_port()}": "KafkaConnectionError: .* ECONNREFUSED",
        "no.such.host.invalid:9092": "KafkaConnectionError: DNS Resolution failure",
        silent_server: ".*RequestTimedOutError: .*",
    }
    scripts = [(start(name, address=address), address) for name in SCRIPTS for address in reasons]
    for script, address in scripts:
        assert script.wait() == 1
        assert script.out == ""
        first, last = script.err.splitlines()
        why = rf"--- no connection to {address} \({reasons[address]}\); trying again"
        assert re.fullmatch(why, first)
        how = "docker compose up -d or python tests/broker.py"
        assert last == f"--- no Kafka at {address}: {how}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_broker(signum: int, start: Start) -> None:
    scripts = [start(name, address=f"localhost:{free_port()}") for name in SCRIPTS]
    for script in scripts:
        until(lambda: "trying again" in script.err, "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # as it ends any program
        assert script.out == ""
        assert len(script.err.splitlines()) == 1


def test_a_signal_at_any_moment_of_the_start_ends_it(start: Start, witness: Witness) -> None:
    dice = random.Random(6)
    for _ in range(3):
        scripts = [(start(name), dice.choice([signal.SIGINT, signal.SIGTERM])) for name in SCRIPTS]
        time.sleep(dice.uniform(0.1, 0.6))
        for script, signum in scripts:
            script.process.send_signal(signum)
        for script, signum in scripts:
            # Before a script has come to its first line, the signal ends Python itself.
            assert script.wait(20) in (0, -signum) or "init_import_site" in script.err


@pytest.mark.parametrize(
    "command",
    [
        "producer.py --count many",
        "producer.py --interval soon",
        "consumer.py --group $'\\xe9'",  # Latin-1, which is not UTF-8
        "processor.py --group $'\\xe9'",
        "processor.py --nonsense",
    ],
)
def test_bad_arguments_are_usage_errors(command: str, start: Start) -> None:
    name, *arguments = command.split(" ", 1)
    run = " ".join([shlex.join(python(name)), *arguments])
    script = start(command=["bash", "-c", run], address="localhost:1")
    assert script.wait(9) == 2  # before it looks for a broker
    assert script.err.startswith("usage: ")
    assert "Traceback" not in script.err
    assert script.out == ""


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


@pytest.mark.parametrize("arguments", ["producer.py --count 9", "consumer.py", "processor.py"])
def test_without_a_stdout_it_says_so_and_does_nothing(
    arguments: str, start: Start, witness: Witness
) -> None:
    produce(start, 9)
    script = start(command=["bash", "-c", f"{shlex.join(python(*arguments.split()))} >&-"])
    assert script.wait() == 1
    assert script.err == "--- no stdout to write to\n"
    assert len(witness.log()) == 9
    assert witness.committed() == {}


def test_a_full_disk_is_no_output(start: Start, witness: Witness) -> None:
    produce(start, 9)
    for name in ("consumer.py", "processor.py"):
        script = start(command=["bash", "-c", f"{shlex.join(python(name))} >/dev/full"])
        assert script.wait() != 0
        assert "No space left on device" in script.err
    assert witness.committed() == {}  # nothing was shown


# Runs a command with a stdout that takes what it can at once, as some parents (ssh, node) leave it.
NON_BLOCKING = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK), 1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("arguments", ["producer.py --count 5000 --interval 0", "consumer.py"])
def test_no_line_is_lost_in_a_full_pipe(
    arguments: str, start: Start, witness: Witness, pipe: Pipe
) -> None:
    if "consumer" in arguments:
        produce(start, 5000)
    script = start(
        command=[sys.executable, "-c", NON_BLOCKING, pipe.path, *python(*arguments.split())],
        environment={"PYTHONUNBUFFERED": "1"},  # usual in containers; Python's own stdout loses so
    )
    until(pipe.is_full, "the pipe is full")
    until(lambda: len(pipe.read().splitlines()) == 5000, "all is shown")
    if "consumer" in arguments:
        until(lambda: sum(witness.committed().values()) == 5000, "all is committed")
        script.process.send_signal(signal.SIGINT)
    assert script.wait() == 0
    assert sorted(pipe.read().decode().splitlines()) == sorted(map(line, witness.log()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_cleanly_and_they_leave_the_group(
    signum: int, start: Start, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumer, processor = start("consumer.py"), start("processor.py")
    until(lambda: consumer.lines and processor.snapshots, "all are at work")
    for script in (producer, consumer, processor):
        assert script.stop(signum, timeout=20) == 0
        assert "Traceback" not in script.err
    assert witness.members() == []
    # The last line is the script's own, so that the prompt does not stand behind ^C.
    assert re.fullmatch(r"--- \d+ delivered, 0 failed", producer.err.splitlines()[-1])
    for reader in (consumer, processor):
        assert reader.err.splitlines()[-1] == "--- leaving the group"

"""How the scripts start and end when something about them, not Kafka, is unusual."""

import http.server
import random
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from broker import free_port
from harness import SCRIPTS, Start, Witness, produce, python, until


class Deaf(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Deaf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_no_broker_is_one_line_and_status_1(
    start: Start, web_server: str, silent_server: str
) -> None:
    """Nobody at the address: said within 3 s; after 10 s the reason and what to do."""
    nobody = f"localhost:{free_port()}"
    reasons = {
        nobody: "connection refused; run `docker compose up -d` or `python tests/broker.py`",
        web_server: "no answer",
        silent_server: "no answer",
        "no.such.host.invalid:9092": "host name not known",
    }
    scripts = [(start(name, address=address), address) for name in SCRIPTS for address in reasons]
    for name in SCRIPTS:  # kafka-python alone would wait for ever
        secured = {"KAFKA_SECURITY_PROTOCOL": "SSL"}
        script = start(name, address=silent_server, environment=secured)
        scripts.append((script, silent_server))
    for script, address in scripts:
        assert script.wait() == 1
        assert script.out == ""
        first, last = script.err.splitlines()
        assert first == f"not connected to {address} yet"
        assert last.startswith(f"no connection to Kafka at {address}: {reasons[address]}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_broker(signum: int, start: Start, silent_server: str) -> None:
    scripts = [start(name, address=silent_server) for name in SCRIPTS]
    for script in scripts:
        until(lambda: "not connected" in script.err, "it waits for the broker")
    for script in scripts:
        assert script.stop(signum, timeout=5) == -signum  # as it ends any program
        assert script.out == ""
        assert script.err == f"not connected to {silent_server} yet\n"


def test_a_signal_at_any_moment_of_the_start_ends_it(start: Start, witness: Witness) -> None:
    dice = random.Random(6)
    for _ in range(6):
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
        "producer.py --count -3",
        "producer.py --count many",
        "producer.py --count 1.5",
        "producer.py --interval nan",
        "producer.py --interval inf",
        "producer.py --interval -1",
        "producer.py --interval soon",
        "producer.py something",
        "consumer.py --group ''",
        "consumer.py --group",
        "consumer.py something",
        "processor.py --group ''",
        "processor.py --nonsense",
    ],
)
def test_bad_arguments_are_usage_errors(command: str, start: Start) -> None:
    script = start(*shlex.split(command), address="localhost:1")
    assert script.wait(9) == 2  # before it looks for a broker
    assert script.err.startswith("usage: ")
    assert "Traceback" not in script.err
    assert script.out == ""


def test_nothing_to_send(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--count", "0")
    assert producer.wait() == 0
    assert (producer.out, producer.err) == ("", "0 delivered, 0 failed\n")


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
        assert re.fullmatch(r"\d+ delivered, 0 failed\n", script.err)


@pytest.mark.parametrize(
    "arguments", ["producer.py --count 9 --interval 0", "consumer.py", "processor.py"]
)
def test_output_that_cannot_be_written_is_one_line_and_status_1(
    arguments: str, start: Start, witness: Witness
) -> None:
    produce(start, 9)
    command = f"{shlex.join(python(*arguments.split()))} >/dev/full"
    script = start(command=["bash", "-c", command])
    assert script.wait() == 1
    tally = "9 delivered, 0 failed\n" if "producer" in arguments else ""
    assert script.err.endswith(f"cannot write the output: No space left on device\n{tally}")
    assert "Traceback" not in script.err
    assert witness.committed() == {}  # nothing was shown


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
    assert re.search(r"^\d+ delivered, 0 failed$", producer.err, re.MULTILINE)


def test_one_ctrl_c_sent_twice_is_one(start: Start, witness: Witness) -> None:
    """timeout(1), for one, signals the process and then its whole process group."""
    produce(start, 1000)
    for name in ("consumer.py", "processor.py"):
        script = start(name)
        until(lambda: script.lines, "it is at work")
        for _ in range(3):
            script.process.send_signal(signal.SIGINT)
        assert script.wait() == 0
    assert sum(witness.committed().values()) == 1000

"""tests/broker.py as a program: it serves, stops, and leaves nothing behind."""

import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
from broker import ROOT, free_port, killed_with_parent
from events import event
from scripts import TIMEOUT, Script, Start, send_events, wait_until
from witness import Witness

# Runs the program with the port (9092 otherwise) and the folder for its data that come first.
PROGRAM = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import broker
broker.PORT, broker.EVENTS = int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1), ".kafka")
sys.exit(broker.main())
"""


def program(
    start: Start, port: int, folder: Path, *command: str, environment: dict[str, str] | None = None
) -> Script:
    arguments = [sys.executable, "-c", PROGRAM, str(port), str(folder), *command]
    return start(command=arguments, address="nowhere:1", environment=environment)


def java_processes(script: Script) -> list[psutil.Process]:
    return [process for process in script.processes() if process.pid != script.process.pid]


def test_a_broker_stops_with_its_terminal_and_keeps_events(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "Zoë's folder"
    folder.mkdir()
    port = free_port()
    witness = Witness(f"localhost:{port}")
    ready = f"ready on localhost:{port}; Ctrl-C stops it"

    broker = program(start, port, folder)
    wait_until(lambda: ready in broker.out, "it is ready")
    witness.create_topic(3)
    witness.write([(0, b"key", event())] * 5)
    [java] = java_processes(broker)
    assert broker.stop(signal.SIGHUP) == 0  # the terminal's window is closed
    assert not java.is_running()
    assert broker.lines[-1] == "stopping Kafka"
    assert broker.err == ""

    broker = program(start, port, folder)
    wait_until(lambda: ready in broker.out, "it is ready again")
    assert len(witness.messages()) == 5
    [java] = java_processes(broker)
    broker.stop(signal.SIGKILL if killed_with_parent() else signal.SIGINT)
    wait_until(lambda: not java.is_running(), "no process is left")
    assert broker.err == ""


def test_a_command_has_a_broker_of_its_own_and_needs_no_java(start: Start, tmp_path: Path) -> None:
    """The machine has no Java; the jars are there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("env", "setpriv", "sh", "true"):
        if path := shutil.which(name):
            (folder / name).symlink_to(path)
    (tmp_path / ".m2").symlink_to(Path.home() / ".m2")
    environment = {"PATH": str(folder), "HOME": str(tmp_path), "JAVA_HOME": ""}
    job = f"{sys.executable} producer.py --count 3 --interval 0 --quiet && env && exit 7"
    with socket.socket() as occupied:
        port = free_port()
        occupied.bind(("127.0.0.1", port))
        occupied.listen()
        broker = program(start, port, tmp_path, "sh", "-c", job, environment=environment)
        refused = program(start, port, tmp_path)
        assert broker.wait() == 7  # the command's status
        assert refused.wait() == 1
    assert refused.err.startswith(f"port {port} is in use: `lsof -i :{port}` ")
    [own] = re.findall(r"^KAFKA_BOOTSTRAP_SERVERS=localhost:(\d+)$", broker.out, re.MULTILINE)
    assert int(own) != port
    assert broker.err == "--- 3 delivered, 0 failed\n"
    assert not (tmp_path / ".kafka").exists()


def test_a_failed_download_is_reported_in_one_line(start: Start, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "HTTPS_PROXY": f"http://localhost:{free_port()}"}
    broker = program(start, free_port(), tmp_path, "true", environment=environment)
    assert broker.wait() == 1
    announcement, error = broker.err.splitlines()
    assert announcement.startswith("downloading Kafka, ")
    assert re.match(r"cannot download Kafka \S+ from Maven Central \(ProxyError\): ", error)


def test_one_of_three_brokers_can_be_killed_by_the_printed_command(
    start: Start, tmp_path: Path
) -> None:
    port = free_port(3)
    brokers = program(start, port, tmp_path, "--brokers", "3")
    wait_until(lambda: "Ctrl-C stops all" in brokers.out, "they are ready", 2 * TIMEOUT)
    addresses = [f"localhost:{port + number}" for number in range(3)]
    assert f"    export KAFKA_BOOTSTRAP_SERVERS={','.join(addresses)}" in brokers.lines
    kills = re.findall(r"^    kill -9 (\d+)  # (localhost:\d+)$", brokers.out, re.MULTILINE)
    assert [address for _, address in kills] == addresses
    send_events(start, 10, address=addresses[0])
    os.kill(int(kills[1][0]), signal.SIGKILL)
    wait_until(lambda: f"the broker on {addresses[1]} has exited" in brokers.out, "it is reported")
    running = java_processes(brokers)
    assert len(running) == 2
    assert brokers.stop() == 0
    assert not any(process.is_running() for process in running)
    assert brokers.err == ""


@pytest.mark.parametrize("name", ["broker", "benchmark"])
def test_a_missing_package_is_reported_with_what_to_install(name: str, start: Start) -> None:
    # -S: Python without site-packages, as if the virtual environment were not active.
    script = start(command=[sys.executable, "-S", str(ROOT / "tests" / f"{name}.py")])
    assert script.wait() == 1
    hint = r"\w+ is missing: is the virtual environment active\? If so, pip install -r tests/\S+\n"
    assert re.fullmatch(hint, script.err)

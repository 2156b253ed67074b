"""tests/broker.py as a program; on a free port here, where users have it on 9092."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from broker import ROOT, Cluster, free_port, version
from events import event
from scripts import TIMEOUT, Script, Start, send_events, wait_until
from witness import Witness

# Runs the program on the port given first, with its data under the folder given second.
PROGRAM = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import broker
broker.PORT, broker.EVENTS = int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1), ".kafka")
sys.exit(broker.main())
"""


def program(start: Start, port: int, folder: Path, *command: str) -> Script:
    arguments = [sys.executable, "-c", PROGRAM, str(port), str(folder), *command]
    return start(command=arguments, address="nowhere:1")


def test_it_serves_until_ctrl_c_and_keeps_the_events(start: Start, tmp_path: Path) -> None:
    tmp_path = tmp_path / "Zoë's folder"
    tmp_path.mkdir()
    port = free_port()
    for run in range(2):
        broker = program(start, port, tmp_path)
        wait_until(lambda: "ready" in broker.out, "it says that it is ready")
        assert f"localhost:{port}" in broker.out
        assert "Ctrl-C" in broker.out
        witness = Witness(f"localhost:{port}")
        if run == 0:
            witness.create_topic(3)
            witness.write([(0, b"key", event())] * 5)
        assert len(witness.messages()) == 5
        assert broker.stop(signal.SIGINT if run == 0 else signal.SIGTERM) == 0
        assert broker.err == ""
        assert broker.lines[-1] == "stopping Kafka"


def test_beside_a_broker_it_serves_a_command_and_nothing_else(start: Start, tmp_path: Path) -> None:
    job = f"{sys.executable} producer.py --count 3 --interval 0 --quiet && env && exit 7"
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        broker = program(start, port, tmp_path, "sh", "-c", job)
        refused = program(start, port, tmp_path)
        assert broker.wait() == 7  # the command's status
        assert refused.wait() == 1
    assert refused.err == f"port {port} is taken: does a broker run already?\n"
    [own] = re.findall(r"^KAFKA_BOOTSTRAP_SERVERS=localhost:(\d+)$", broker.out, re.MULTILINE)
    assert int(own) != port
    assert broker.err == "--- 3 delivered, 0 failed\n"
    assert not (tmp_path / ".kafka").exists()


def test_three_brokers_on_the_usual_ports_name_their_own(tmp_path: Path) -> None:
    for broker in Cluster(tmp_path, [9092, 9093, 9094]).brokers:
        own = f"PLAINTEXT://{broker.address}"
        assert broker.environment["KAFKA_ADVERTISED_LISTENERS"] == own


def test_three_brokers_until_ctrl_c_of_which_one_is_killed(start: Start, tmp_path: Path) -> None:
    port = free_port(3)
    brokers = program(start, port, tmp_path, "--brokers", "3")
    wait_until(lambda: "Ctrl-C stops all" in brokers.out, "they are ready", 2 * TIMEOUT)
    addresses = [f"localhost:{port + number}" for number in range(3)]
    assert f"    export KAFKA_BOOTSTRAP_SERVERS={','.join(addresses)}" in brokers.lines
    kills = re.findall(r"^    kill -9 (\d+)  # (localhost:\d+)$", brokers.out, re.MULTILINE)
    assert [address for _, address in kills] == addresses
    send_events(start, 10, address=addresses[0])
    os.kill(int(kills[1][0]), signal.SIGKILL)
    wait_until(lambda: f"the broker on {addresses[1]} has ended" in brokers.out, "it says so")
    running = [process for process in brokers.processes() if process.pid != brokers.process.pid]
    assert len(running) == 2
    assert brokers.stop() == 0
    assert brokers.lines[-1] == "stopping Kafka"
    assert not any(process.is_running() for process in running)
    assert brokers.err == ""


def test_without_its_packages_it_says_what_to_install(start: Start) -> None:
    # -I -S: Python without site-packages, as outside the virtual environment.
    command = [sys.executable, "-I", "-S", str(ROOT / "tests" / "broker.py")]
    bare = start(command=command, address="nowhere:1")
    assert bare.wait() == 1
    assert bare.out == ""
    assert re.fullmatch(
        r"\w+ is missing: `pip install -r tests/broker-requirements.txt`\n", bare.err
    )
    helped = start(command=[*command, "--help"], address="nowhere:1")
    assert helped.wait() == 0
    assert "--brokers 3" in helped.out


@pytest.mark.parametrize("there", [True, False])
def test_it_announces_a_download_only_if_there_is_one(
    there: bool, start: Start, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    if there:
        (repository / "org/apache/kafka/kafka_2.13" / version()).mkdir(parents=True)
    # What it would download is not needed to see what it says.
    stub = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import broker\n"
        "class Settings:\n"
        f"    repo_cache = {str(repository)!r}\n"
        "    load = classmethod(lambda cls: cls)\n"
        "broker.GlobalSettings, broker.run = Settings, print\n"
        "sys.exit(broker.main())\n"
    )
    arguments = ["--brokers", "3", "ls", "-l"] if there else ["true"]
    broker = start(command=[sys.executable, "-c", stub, *arguments], address="nowhere:1")
    assert broker.wait() == 0
    assert broker.out == ("['ls', '-l'] 3\n" if there else "['true'] 1\n")
    assert ("downloading Kafka" in broker.err) is not there

"""tests/broker.py as a program: it serves, stops, and leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import free_port, version
from events import event
from readme import copy_project
from scripts import TIMEOUT, Script, Start, send_events, wait_until
from witness import Witness


class Program:
    """broker.py in a copy of the project, which serves on another port than 9092."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.start = start
        self.project = copy_project(folder)
        self.port = free_port()
        script = self.project / "tests" / "broker.py"
        script.write_text(script.read_text().replace("PORT = 9092", f"PORT = {self.port}"))

    def run(self, *arguments: str, **environment: str) -> Script:
        command = [sys.executable, str(self.project / "tests" / "broker.py"), *arguments]
        return self.start(command=command, address="nowhere:1", environment=environment)

    def serve(self) -> Script:
        broker = self.run()
        ready = f"ready on localhost:{self.port}; Ctrl-C stops it"
        wait_until(lambda: ready in broker.out, "it is ready", 2 * TIMEOUT)
        return broker


@pytest.fixture
def program(kafka: None, start: Start, tmp_path: Path) -> Iterator[Program]:
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    (tmp_path / "Zoë's folder").mkdir()
    yield Program(start, tmp_path / "Zoë's folder")
    signal.signal(signal.SIGHUP, hangup)


def java_processes(script: Script) -> list[psutil.Process]:
    return [process for process in script.processes() if "java" in process.name()]


def test_events_are_kept_and_the_compose_file_is_read_at_each_start(program: Program) -> None:
    """First with a mapping of values, then with a list, and under nohup."""
    compose = program.project / "docker-compose.yml"
    text = compose.read_text()
    assert '- "127.0.0.1:9092:9092"' in text  # Docker's is for this machine only
    more = "KAFKA_AUTO_CREATE_TOPICS_ENABLE: true\n      KAFKA_NUM_IO_THREADS:\n      KAFKA_NUM_"
    compose.write_text(text.replace("KAFKA_NUM_", more))
    witness = Witness(f"localhost:{program.port}")
    broker = program.serve()
    witness.create_topic(3)
    witness.write([(0, b"key", event())] * 5)
    [java] = java_processes(broker)
    assert broker.stop(signal.SIGHUP) == 0  # the terminal's window is closed
    assert not java.is_running()
    assert broker.lines[-1] == "stopping Kafka"
    assert broker.err == ""

    text = re.sub(r"^      (KAFKA_\w+): ", r"      - \1=", text, flags=re.MULTILINE)
    text = text.replace("PARTITIONS=3", "PARTITIONS=5").replace("//:", "//0.0.0.0:")
    image = r"image: localhost:5000/\1@sha256:0"
    compose.write_text(re.sub("image: (.*)", image, text), newline="\r\n")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    broker = program.serve()
    broker.process.send_signal(signal.SIGHUP)
    [java] = java_processes(broker)
    assert {c.laddr.ip.removeprefix("::ffff:") for c in java.net_connections()} == {"127.0.0.1"}
    assert len(witness.messages()) == 5
    witness.delete_topics("events")
    send_events(program.start, 5, address=witness.address)
    wait_until(lambda: len(witness.partitions()) == 5, "a new topic has five partitions")
    assert broker.stop() == 0
    assert broker.err == ""


def test_a_command_has_its_own_broker_and_needs_no_java(program: Program, tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to(str(shutil.which("sh")))
    producer = f"'{sys.executable}' producer.py --count 3 --interval 0 --quiet"
    job = f"{producer} && echo $KAFKA_BOOTSTRAP_SERVERS && exit 7"
    with socket.create_server(("localhost", program.port)):
        login = json.dumps({"security_protocol": "SSL"})  # of another cluster
        environment = {"PATH": str(tmp_path), "JAVA_HOME": "", "KAFKA_CLIENT_SETTINGS": login}
        broker = program.run("sh", "-c", job, **environment)
        refused = program.run()
        assert broker.wait() == 7  # the command's status
        assert refused.wait() == 1
    assert refused.err.startswith(f"port {program.port} is in use: ")
    assert re.fullmatch(rf"localhost:(?!{program.port})\d+\n", broker.out)
    assert broker.err == "--- 3 delivered, 0 failed\n"
    assert not (program.project / ".kafka").exists()


def test_a_download_that_was_cut_short_is_repeated(program: Program, tmp_path: Path) -> None:
    cut_short = program.run("true", XDG_CACHE_HOME=str(tmp_path))
    wait_until(lambda: list(tmp_path.rglob("*.pom")), "the download has begun")
    cut_short.stop(signal.SIGKILL)
    proxy = f"http://localhost:{free_port()}"
    no_network = program.run("true", XDG_CACHE_HOME=str(tmp_path), https_proxy=proxy)
    assert no_network.wait() == 1
    announcement, error = no_network.err.splitlines()
    assert announcement.startswith("downloading Kafka, ")
    assert error.startswith("Kafka: download failed: ProxyError ")


def test_failures_are_reported_with_their_cause(program: Program) -> None:
    (program.project / ".kafka").touch()
    no_folder = program.run()
    assert no_folder.wait() == 1
    assert re.fullmatch(r"/.*/\.kafka\S*: (Not a directory|File exists)\n", no_folder.err)

    compose = program.project / "docker-compose.yml"
    text = compose.read_text()
    other_service = text.replace("\n  kafka:", "\n  broker:")
    no_version, no_tag = text.replace(version(), "latest"), re.sub(":4.*", "@sha256:4", text)
    for unusable in (other_service, no_version, no_tag, "a: b: c", "", "- KEY: value"):
        compose.write_text(unusable)
        no_broker = program.run("true")
        assert no_broker.wait() == 1
        assert re.fullmatch(r"/.*yml has no service `kafka` with .*\n", no_broker.err), unusable

    compose.write_text(text.replace("ROLES: broker,", "ROLES: brother,"))
    bad_setting = program.run("true")
    assert bad_setting.wait() == 1
    headline, *log = bad_setting.err.splitlines()
    assert re.fullmatch(r"Kafka on localhost:\d+ (could not be set up|did not start):", headline)
    assert any("brother" in line for line in log)
    assert len(log) <= 10


def test_kill_ends_the_command_with_all_that_it_has_started(program: Program) -> None:
    """Before that, its broker dies, which is reported."""
    broker = program.run("sh", "-c", "sleep 1000 & echo $KAFKA_BOOTSTRAP_SERVERS; wait")
    wait_until(lambda: broker.lines, "the command runs", 2 * TIMEOUT)
    [java] = java_processes(broker)
    java.terminate()
    wait_until(lambda: f"Kafka on {broker.lines[0]} has exited:\n" in broker.err, "it is reported")
    processes = broker.processes()
    assert processes[-1].name() == "sleep"
    assert broker.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert not any(process.is_running() for process in processes)


def test_the_printed_command_kills_one_of_three_brokers(program: Program) -> None:
    brokers = program.run("--brokers", "3")
    wait_until(lambda: "Ctrl-C stops all" in brokers.out, "they are ready", 2 * TIMEOUT)
    addresses = [f"localhost:{program.port + number}" for number in range(3)]
    assert f"    export KAFKA_BOOTSTRAP_SERVERS={','.join(addresses)}" in brokers.lines
    kills = re.findall(r"^    (localhost:\d+): kill -9 (\d+)$", brokers.out, re.MULTILINE)
    assert [address for address, _ in kills] == addresses
    send_events(program.start, 10, address=addresses[0])
    os.kill(int(kills[1][1]), signal.SIGKILL)
    wait_until(lambda: brokers.err == f"Kafka on {addresses[1]} was killed\n", "it is reported")
    running = java_processes(brokers)
    assert len(running) == 2
    assert brokers.stop() == 0
    assert not any(process.is_running() for process in running)

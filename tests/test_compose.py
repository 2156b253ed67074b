"""docker-compose.yml: as far as it goes without Docker, and for real where an engine answers."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import yaml
from broker import PORT, ROOT, is_open
from harness import Start, Witness, count, line, shown, until

ADDRESS = f"localhost:{PORT}"


def test_the_file_describes_one_pinned_broker_for_this_machine_only() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    [service] = compose["services"].values()
    assert service["image"] == "apache/kafka:4.3.1"
    assert service["ports"] == ["127.0.0.1:9092:9092"]
    environment = service["environment"]
    assert environment["KAFKA_NUM_PARTITIONS"] == 3
    assert environment["KAFKA_PROCESS_ROLES"] == "broker,controller"
    assert environment["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://localhost:9092"
    assert environment["KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS"] == 0
    for name in ("OFFSETS_TOPIC", "TRANSACTION_STATE_LOG", "SHARE_COORDINATOR_STATE_TOPIC"):
        assert environment[f"KAFKA_{name}_REPLICATION_FACTOR"] == 1
    [volume] = service["volumes"]
    name, folder = volume.split(":")
    assert name in compose["volumes"]
    assert folder == environment["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"
    assert "/dev/tcp/localhost/9092" in " ".join(service["healthcheck"]["test"])


def no_engine() -> str:
    """Why the compose file cannot be tried here; empty if it can."""
    if not shutil.which("docker"):
        return "there is no docker command"
    for command in (["docker", "compose", "version"], ["docker", "info"]):
        if subprocess.run(command, capture_output=True).returncode != 0:
            return f"`{' '.join(command)}` fails: no Docker engine answers"
    if is_open(PORT):
        return f"port {PORT} is taken"
    return ""


@pytest.fixture
def compose() -> Iterator[Callable[..., None]]:
    """compose("up", "-d"): runs docker compose, under a project name of the test's own."""
    if reason := no_engine():
        pytest.skip(reason)

    def run(*arguments: str) -> None:
        command = ["docker", "compose", "--project-name", f"practice-test-{os.getpid()}"]
        subprocess.run([*command, *arguments], cwd=ROOT, check=True)

    yield run
    run("down", "--volumes")


@pytest.mark.xdist_group("port 9092")
def test_the_main_job_on_the_compose_files_broker(
    compose: Callable[..., None], start: Start
) -> None:
    compose("up", "-d", "--wait")
    producer = start("producer.py", "--count", "100", "--interval", "0", address=ADDRESS)
    assert producer.wait() == 0
    witness = Witness(ADDRESS)
    log = witness.log()
    assert witness.partitions() == [0, 1, 2]
    assert shown(producer) == sorted(map(line, log))
    consumer = start("consumer.py", address=ADDRESS)
    until(lambda: len(consumer.lines) >= 100, "all events are shown")
    assert consumer.stop() == 0
    assert shown(consumer) == shown(producer)
    for _ in range(2):
        processor = start("processor.py", "--once", address=ADDRESS)
        assert processor.wait() == 0
        assert processor.snapshots == [count(log)]
        compose("down")
        compose("up", "-d", "--wait")
        assert Witness(ADDRESS).log() == log

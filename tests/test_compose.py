"""docker-compose.yml: as far as it goes without Docker, and for real where an engine answers."""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
import yaml
from broker import PORT, ROOT, is_open
from harness import Start, Witness, main_job

ADDRESS = f"localhost:{PORT}"


def test_the_broker_is_for_this_machine_only_and_keeps_its_events() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    [service] = compose["services"].values()
    assert service["ports"] == ["127.0.0.1:9092:9092"]
    [volume] = service["volumes"]
    name, folder = volume.split(":")
    assert name in compose["volumes"]
    assert folder == service["environment"]["KAFKA_LOG_DIRS"]


@pytest.fixture
def compose() -> Iterator[Callable[..., None]]:
    """compose("up", "-d"): runs docker compose, under a project name of the test's own."""
    try:
        subprocess.run(["docker", "compose", "ls"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no Docker engine answers")
    if is_open(PORT):
        pytest.skip(f"port {PORT} is taken")

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
    main_job(start, Witness(ADDRESS), address=ADDRESS)
    log = Witness(ADDRESS).log()
    compose("down")
    compose("up", "-d", "--wait")
    assert Witness(ADDRESS).log() == log

"""docker-compose.yml: what can be checked without Docker, and the main job where it runs."""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
import yaml
from broker import PORT, ROOT, is_open
from scripts import Start
from witness import Witness, run_pipeline

ADDRESS = f"localhost:{PORT}"


def test_the_broker_listens_on_loopback_and_keeps_its_events() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    [service] = compose["services"].values()
    assert service["ports"] == ["127.0.0.1:9092:9092"]
    [volume] = service["volumes"]
    name, folder = volume.split(":")
    assert name in compose["volumes"]
    assert folder == service["environment"]["KAFKA_LOG_DIRS"]


@pytest.fixture
def compose() -> Iterator[Callable[..., None]]:
    """compose("up", "-d") runs docker compose, with a project name of its own."""
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
def test_the_main_job_works_with_docker_and_events_are_kept(
    compose: Callable[..., None], start: Start
) -> None:
    compose("up", "-d", "--wait")
    run_pipeline(start, Witness(ADDRESS), address=ADDRESS)
    messages = Witness(ADDRESS).messages()
    compose("down")
    compose("up", "-d", "--wait")
    assert Witness(ADDRESS).messages() == messages

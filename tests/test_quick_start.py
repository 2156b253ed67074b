"""The quick start on port 9092: without Docker, and where a Docker engine answers also with it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reports
import yaml
from broker import PORT, ROOT, is_open
from pipeline import run_pipeline
from readme import blocks, copy_project, section
from scripts import SCRIPTS, TIMEOUT, Script, Start, assert_clean_stop, printed_lines, wait_until
from witness import Witness


@pytest.mark.skipif(is_open(PORT), reason=f"port {PORT} is taken")
def test_the_quick_start_works_without_docker(tmp_path: Path, start: Start) -> None:
    quick_start = section("Quick start")
    clone_and_create, in_two_minutes, _, start_broker, look_at_group = blocks(quick_start)
    activate = ". .venv/bin/activate"
    assert f"`{activate}`" in quick_start
    clone, create = clone_and_create.splitlines()
    assert re.fullmatch(r"git clone \S+ kafka-practice && cd kafka-practice", clone)
    project = copy_project(tmp_path)
    # Without the virtual environment of the tests: the quick start creates its own.
    path = os.environ["PATH"].replace(str(Path(sys.executable).parent), "")
    kept = ("HOME", "LANG", "TMPDIR", "JDK_JAVA_OPTIONS", "PIP_", "SSL_")
    variables = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment = [f"{name}={value}" for name, value in (variables | {"PATH": path}).items()]

    def terminal(*lines: str) -> Script:
        block = "\n".join((f"cd {project}", *lines))
        return start(command=["env", "-i", *environment, "bash", "-c", block], address="")

    first_try = terminal(create, in_two_minutes)
    assert first_try.wait(3 * TIMEOUT) == 0, first_try.err
    [counts] = first_try.snapshots
    assert sum(count for actions in counts.values() for count in actions.values()) == 100

    broker = terminal(activate, start_broker)
    wait_until(lambda: "ready" in broker.out or broker.process.poll(), "Kafka is ready", 180)
    assert broker.process.poll() is None, broker.err
    for script in SCRIPTS:
        assert f"`python {script}`" in quick_start
    producer = terminal(activate, "exec python producer.py")
    wait_until(lambda: producer.lines, "an event is printed")
    first = terminal(activate, "exec python consumer.py")
    wait_until(lambda: first.assigned == [0, 1, 2], "the first consumer has all partitions")
    assert f"`{first.err.strip()}`" in quick_start
    second = terminal(activate, "exec python consumer.py")
    wait_until(lambda: len(second.assigned or []) == 1, "the second has one")
    processor = terminal(activate, "exec python processor.py")
    assert re.search(reports.COUNTING_PART.strip("^$"), quick_start)
    wait_until(lambda: processor.find(reports.COUNTING_PART), "the processor reports its part")
    wait_until(lambda: processor.snapshots, "it prints counts")

    group = terminal(activate, look_at_group)
    assert group.wait() == 0
    assert group.out.count("'client_id': 'consumer.py'") == 2
    assert group.out.count("'client_id': 'processor.py'") == 1
    assert "'lag': " in group.out

    assert_clean_stop(producer, first, second, processor)
    read_again = blocks(section("Things to try"))[0]
    assert "reset-offsets" in read_again
    assert terminal(activate, read_again).wait() == 0
    consumer = terminal(activate, "exec python consumer.py")
    sent = printed_lines(producer)
    wait_until(lambda: printed_lines(consumer) == sent, "it prints all events again")
    assert_clean_stop(consumer)


def test_dockers_broker_is_for_this_machine_only_and_keeps_its_events() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    [service] = compose["services"].values()
    assert service["ports"] == ["127.0.0.1:9092:9092"]
    [volume] = service["volumes"]
    name, folder = volume.split(":")
    assert name in compose["volumes"]
    assert folder == service["environment"]["KAFKA_LOG_DIRS"]


@pytest.fixture
def compose() -> Iterator[Callable[..., None]]:
    """compose("up", "-d") runs docker compose, with a project name for this test only."""
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


def test_the_pipeline_works_with_docker(compose: Callable[..., None], start: Start) -> None:
    address = f"localhost:{PORT}"
    compose("up", "-d", "--wait")
    run_pipeline(start, Witness(address), address=address)
    log = Witness(address).messages()
    compose("down")
    compose("up", "-d", "--wait")
    assert Witness(address).messages() == log

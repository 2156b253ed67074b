"""The quick start without Docker, on port 9092. CI runs the one with Docker."""

import re
import shlex
import sysconfig
import venv
from pathlib import Path

import pytest
import stderr_lines
from broker import PORT, is_open
from readme import blocks, copy_project, section
from scripts import SCRIPTS, Script, Start, assert_clean_stop, wait_until


def test_the_quick_start_without_docker(kafka: None, tmp_path: Path, start: Start) -> None:
    if is_open(PORT):
        pytest.skip(f"port {PORT} is in use by another broker")
    quick_start = section("Quick start")
    _, _, start_broker, look_at_group = blocks(quick_start)
    project = copy_project(tmp_path)
    # The environment that the first command creates, with the packages of the tests.
    venv.create(project / ".venv", symlinks=True)
    [packages] = project.glob(".venv/lib/*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    [activate] = re.findall(r"`(\. .*?activate)`", quick_start)

    def terminal(command: str) -> Script:
        block = f"cd {shlex.quote(str(project))}\n{activate}\n{command}"
        arguments = ["env", "-u", "KAFKA_BOOTSTRAP_SERVERS", "bash", "-c", block]
        return start(command=arguments, address="")

    broker = terminal(f"exec {start_broker}")
    wait_until(lambda: "ready" in broker.out or broker.process.poll(), "Kafka is ready", 180)
    assert broker.process.poll() is None, broker.err
    for script in SCRIPTS:
        assert f"`python {script}`" in quick_start
    producer = terminal("exec python producer.py")
    wait_until(lambda: producer.lines, "an event is printed")
    first = terminal("exec python consumer.py")
    wait_until(lambda: first.assigned == [0, 1, 2], "the first consumer has all partitions")
    assert f"`{first.err.splitlines()[-1]}`" in quick_start
    second = terminal("exec python consumer.py")
    wait_until(lambda: len(second.assigned or []) == 1, "the second has one")
    processor = terminal("exec python processor.py")
    wait_until(lambda: processor.find(stderr_lines.ASSIGNED_PART), "the processor has its part")
    wait_until(lambda: processor.snapshots, "it prints counts")

    group = terminal(look_at_group)
    assert group.wait() == 0
    assert group.out.count("'client_id': 'consumer.py'") == 2
    assert group.out.count("'client_id': 'processor.py'") == 1
    assert "'lag': " in group.out

    read_again, add_partitions, _ = blocks(section("Things to try"))
    assert terminal(add_partitions).wait() == 0
    members = (first, second, processor)
    wait_until(lambda: sum(len(m.assigned or []) for m in members) == 6, "all six are assigned")
    [other_group] = re.findall(r"`(python processor\.py --group .*?)`", quick_start)
    onlooker = terminal(f"exec {other_group}")
    wait_until(lambda: len(onlooker.assigned or []) == 6, "a member of another group has all")
    assert_clean_stop(producer, *members, onlooker)

    assert terminal(read_again).wait() == 0
    consumer = terminal("exec python consumer.py")
    old = {line for line in producer.lines if line < "partition=3"}
    wait_until(lambda: old <= {*consumer.lines}, "it prints all events again")
    assert_clean_stop(consumer)

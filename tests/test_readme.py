"""The commands of the README, taken from its own text and run as they stand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import PORT, ROOT, Broker, is_open
from harness import PATIENCE, Script, Witness, until

README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    _, found, rest = README.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(r"\n##+ ", rest)[0]


def blocks(text: str, language: str = "sh") -> list[str]:
    """The code blocks of a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE).strip() for indent, code in found]


def copy_project(folder: Path) -> Path:
    """A copy of the project in `folder`, as git would make it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    return shutil.copytree(ROOT, folder / "kafka-practice", ignore=ignored)


@pytest.fixture
def project(tmp_path: Path, broker: Broker) -> Path:
    """A copy in which `python tests/broker.py COMMAND` gives the test's broker to the command.

    That is as fresh as one of its own, which would take most of the time of some tests.
    """
    project = copy_project(tmp_path)
    stand_in = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])\n"
    (project / "tests" / "broker.py").write_text(stand_in)
    return project


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[list[Script]]:
    """The scripts started by a test; ended with everything that they have started."""
    scripts: list[Script] = []
    yield scripts
    for script in scripts:
        for process in reversed(script.tree()):
            process.terminate()
    for script in scripts:
        script.wait()


def environment(address: str = "") -> dict[str, str]:
    """That of a shell which finds the tests' Python, and Kafka at the address if one is given."""
    inherited = {k: v for k, v in os.environ.items() if k != "KAFKA_BOOTSTRAP_SERVERS"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"KAFKA_BOOTSTRAP_SERVERS": address} if address else {}
    return inherited | {"PATH": path} | given


def run(folder: Path, command: str, address: str = "") -> str:
    """Runs a block in bash; returns what it has printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(address),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=3 * PATIENCE,
    )
    return done.stdout


@pytest.mark.xdist_group("port 9092")
def test_the_quick_start_without_docker(tmp_path: Path, shell: list[Script]) -> None:
    if is_open(PORT):
        pytest.skip(f"port {PORT} is taken")
    install, _, kafka = blocks(section("## Quick start"))
    further = "cd kafka-practice && . .venv/bin/activate"
    assert f"`{further}`" in section("## Quick start")
    clone, *enter = install.splitlines()
    assert re.fullmatch(r"git clone \S+ kafka-practice", clone)
    copy_project(tmp_path)
    # Without the environment of the tests, for the quick start makes one of its own.
    path = os.environ["PATH"].replace(str(Path(sys.executable).parent), "")
    kept = ("HOME", "LANG", "TMPDIR", "JDK_JAVA_OPTIONS", "PIP_", "SSL_")
    clean = {name: value for name, value in os.environ.items() if name.startswith(kept)}

    def terminal(*lines: str) -> Script:
        arguments = [f"{name}={value}" for name, value in (clean | {"PATH": path}).items()]
        command = [
            "env",
            "-i",
            *arguments,
            "bash",
            "-c",
            "\n".join(("cd " + str(tmp_path), *lines)),
        ]
        script = Script(tmp_path, command, {})
        shell.append(script)
        return script

    broker = terminal(*enter, kafka)
    until(lambda: "Kafka is ready" in broker.out, "Kafka is ready", 3 * PATIENCE)
    for command in ("python producer.py", "python consumer.py", "python processor.py"):
        assert f"`{command}`" in section("## Quick start")
    producer = terminal(further, "exec python producer.py")
    until(lambda: producer.lines, "an event is shown")
    consumer = terminal(further, "exec python consumer.py")
    until(lambda: "partitions: 0, 1, 2\n" in consumer.err, "it has all partitions")
    another = terminal(further, "exec python consumer.py")
    until(lambda: re.search(r"^partitions: \d$", another.err, re.MULTILINE), "it has one")
    processor = terminal(further, "exec python processor.py")
    until(lambda: "others of event-watchers hold" in processor.err, "it says what it counts")
    until(lambda: processor.snapshots, "it shows counts")

    describe, watch = blocks(section("### Look into the group"))
    match = re.fullmatch(r'watch -n1 "(.*)"', watch)
    assert match
    looked = terminal(further, match[1])
    assert looked.wait() == 0
    assert "'lag': " in looked.out
    described = terminal(further, describe)
    assert described.wait() == 0
    assert described.out.count("'client_id': 'consumer.py'") == 2
    assert described.out.count("'client_id': 'processor.py'") == 1

    for script in (producer, consumer, another, processor):
        assert script.stop() == 0
    events = len(producer.lines)
    assert {*consumer.lines, *another.lines} <= {*producer.lines}
    [reset] = re.findall(r"`(python -m kafka.admin \S+ \S+ groups reset-offsets .*?)`", README)
    assert terminal(further, reset).wait() == 0
    again = terminal(further, "exec python consumer.py")
    until(lambda: len(again.lines) == events, "all events are shown again")
    assert again.stop() == 0
    broker.process.send_signal(signal.SIGTERM)


def test_all_in_one_terminal(tmp_path: Path) -> None:
    [job] = blocks(section("### All in one terminal"))
    counts = json.loads(run(copy_project(tmp_path), job).partition("{")[2].join("{ "))
    assert sum(number for actions in counts.values() for number in actions.values()) == 100


def test_comparing_what_was_sent_with_what_was_shown(project: Path, broker: Broker) -> None:
    _, compare = blocks(section("## Things to try"))
    out = run(project, compare, broker.address)
    assert out.endswith("nothing lost, nothing repeated\n")


def test_killing_one(project: Path, broker: Broker) -> None:
    kill, _ = blocks(section("## Things to try"))
    produce, one, two, repeats = kill.splitlines()
    run(project, produce, broker.address)

    def start(command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=project,
            env=environment(broker.address),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    first = start(one)
    tree = psutil.Process(first.pid)
    until(lambda: "sleep" in [p.name() for p in tree.children(recursive=True)], "it stands still")
    assert (project / "one").read_bytes().count(b"\n") == 100
    os.killpg(first.pid, signal.SIGQUIT)
    first.wait()
    second = start(two)
    committed = Witness(broker.address).committed
    until(lambda: sum(committed().values()) == 10_000, "it has come to the end")
    os.killpg(second.pid, signal.SIGINT)
    second.wait()
    assert run(project, repeats).split() == ["100"]


BREAK_IT = section("## Break it")


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
@pytest.mark.parametrize("number", range(3), ids=["no key", "commit first", "no seek"])
def test_breaking_it(number: int, changed: bool, project: Path, broker: Broker) -> None:
    """Each change applies to the script that the README names, and does what it says."""
    change, command = blocks(BREAK_IT, "diff")[number], blocks(BREAK_IT)[number]
    script = project / re.findall(r"^\*\*.*?\*\*,? in `(\w+\.py)`", BREAK_IT, re.MULTILINE)[number]
    if changed:
        old = [line[1:] for line in change.splitlines() if line[0] in "- "]
        new = [line[1:] for line in change.splitlines() if line[0] in "+ "]
        text = script.read_text()
        assert text.count("\n".join(old)) == 1
        script.write_text(text.replace("\n".join(old), "\n".join(new)))
    out = run(project, command, broker.address)
    if number == 0:
        partitions = re.findall(r"^ *\d+ partition=\d$", out, re.MULTILINE)
        assert len(partitions) > 1 if changed else len(partitions) == 1
    elif number == 1:
        lost = int(out.split()[-1])
        assert lost > 1000 if changed else lost == 0
    elif changed:
        assert out.endswith("{}\n")
    else:
        counts = json.loads(out)
        assert sum(number for actions in counts.values() for number in actions.values()) == 100

"""The README: its commands run as they stand, its diffs apply, its quotes are exact."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broker import PORT, ROOT, Broker, is_open
from scripts import PARTIAL_ASSIGNMENT, SCRIPTS, TIMEOUT, Script, Start, wait_until
from witness import Witness

README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """Return what follows a heading, up to the next one."""
    _, found, rest = README.partition(f"\n## {heading}\n")
    assert found, heading
    return rest.partition("\n## ")[0]


def blocks(text: str, language: str = "sh") -> list[str]:
    """Return the code blocks in a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def copy_project(folder: Path) -> Path:
    """Copy the project to `folder`, as git would."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    return shutil.copytree(ROOT, folder / "kafka-practice", ignore=ignored)


@pytest.fixture
def project(tmp_path: Path, broker: Broker) -> Path:
    """A copy in which `python tests/broker.py COMMAND` runs the command with the test's broker.

    That one is just as empty, and a broker of its own would take most of the time of some tests.
    """
    project = copy_project(tmp_path)
    stand_in = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])\n"
    (project / "tests" / "broker.py").write_text(stand_in)
    return project


def run(start: Start, folder: Path, command: str) -> str:
    """Run a block in bash, with the Python of the tests; return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = start(command=["bash", "-c", f"cd {folder}\n{command}"], environment={"PATH": path})
    assert script.wait(3 * TIMEOUT) == 0, script.err
    return script.out


@pytest.mark.xdist_group("port 9092")
def test_the_quick_start_works_without_docker(tmp_path: Path, start: Start) -> None:
    if is_open(PORT):
        pytest.skip(f"port {PORT} is in use")
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
    clean = {name: value for name, value in os.environ.items() if name.startswith(kept)}

    def terminal(*lines: str) -> Script:
        arguments = [f"{name}={value}" for name, value in (clean | {"PATH": path}).items()]
        block = "\n".join((f"cd {project}", *lines))
        return start(command=["env", "-i", *arguments, "bash", "-c", block], address="")

    first_try = terminal(create, in_two_minutes)
    assert first_try.wait(3 * TIMEOUT) == 0, first_try.err
    [counts] = first_try.snapshots
    assert sum(number for actions in counts.values() for number in actions.values()) == 100

    broker = terminal(activate, start_broker)
    wait_until(lambda: "ready" in broker.out or broker.process.poll(), "it is ready", 3 * TIMEOUT)
    assert broker.process.poll() is None, broker.err
    for script in SCRIPTS:
        assert f"`python {script}`" in quick_start
    producer = terminal(activate, "exec python producer.py")
    wait_until(lambda: producer.lines, "an event is printed")
    consumer = terminal(activate, "exec python consumer.py")
    report = "--- assigned partitions of events: 0, 1, 2"
    assert f"`{report}`" in quick_start
    wait_until(lambda: f"{report}\n" in consumer.err, "it is assigned all partitions")
    second_consumer = terminal(activate, "exec python consumer.py")
    one_partition = re.compile(r"^--- assigned partitions of events: \d$", re.MULTILINE)
    wait_until(lambda: one_partition.search(second_consumer.err), "it is assigned one")
    processor = terminal(activate, "exec python processor.py")
    assert re.search(f"`{PARTIAL_ASSIGNMENT}`", quick_start)
    wait_until(lambda: re.search(PARTIAL_ASSIGNMENT, processor.err), "it is assigned one as well")
    wait_until(lambda: processor.snapshots, "it prints counts")

    group = terminal(activate, look_at_group)
    assert group.wait() == 0
    assert group.out.count("'client_id': 'consumer.py'") == 2
    assert group.out.count("'client_id': 'processor.py'") == 1
    assert "'lag': " in group.out

    for stopped in (producer, consumer, second_consumer, processor):
        assert stopped.stop() == 0
    read_again = blocks(section("Things to try"))[0]
    assert "reset-offsets" in read_again
    assert terminal(activate, read_again).wait() == 0
    consumer = terminal(activate, "exec python consumer.py")
    wait_until(
        lambda: sorted(consumer.lines) == sorted(producer.lines), "it reads everything again"
    )
    assert consumer.stop() == 0


def test_quoted_loops_are_those_of_the_scripts() -> None:
    quotes = blocks(section("The code"), "python")
    for script, quote in zip(("consumer.py", "processor.py"), quotes, strict=True):
        assert f"{quote}" in (ROOT / script).read_text()
        assert quote.startswith("    for batches in polls(")
        assert len(quote.splitlines()) <= 10


def test_delivery_is_at_least_once(project: Path, start: Start) -> None:
    _, at_least_once = blocks(section("Things to try"))
    lines = run(start, project, at_least_once).splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:]


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
@pytest.mark.parametrize("number", [0, 1], ids=["no key", "commit first"])
def test_each_change_breaks_what_the_readme_says(
    number: int, changed: bool, project: Path, start: Start
) -> None:
    break_it = section("Break it")
    command = blocks(break_it)[number]
    script = project / re.findall(r"^\*\*.*?\*\*,? in `(\w+\.py)`", break_it, re.MULTILINE)[number]
    if changed:
        lines = blocks(break_it, "diff")[number].splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in "- ")
        new = "".join(line[1:] for line in lines if line[0] in "+ ")
        assert script.read_text().count(old) == 1
        script.write_text(script.read_text().replace(old, new))
    out = run(start, project, command)
    if number == 0:
        partitions = re.findall(r"^ *\d+ partition=\d$", out, re.MULTILINE)
        assert len(partitions) == (3 if changed else 1)
    else:
        assert int(out.splitlines()[-1]) == (0 if changed else 1000)


def unused_imports(folder: Path) -> set[str]:
    """Return the names of the scripts' unused imports; assert that ruff finds nothing else."""
    command = [sys.executable, "-m", "ruff", "check", "--select=F", "--output-format=json"]
    found = json.loads(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE).stdout)
    assert {message["code"] for message in found} <= {"F401"}
    return {re.findall(r"(\w+)`", message["message"])[0] for message in found}


@pytest.mark.parametrize("error_handling", ["with", "without"])
def test_the_scripts_can_be_changed_to_another_subject(
    error_handling: str, tmp_path: Path, broker: Broker, start: Start, witness: Witness
) -> None:
    make_it_yours = section("Make it yours")
    subject, removal = blocks(make_it_yours, "diff")
    [delete] = blocks(make_it_yours)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    apply = re.findall(r"`(git apply .*?) FILE`", make_it_yours)[0]
    (tmp_path / "subject.diff").write_text(subject)
    (tmp_path / "removal.diff").write_text(removal)
    run(start, tmp_path, f"{apply} subject.diff")
    if error_handling == "without":
        run(start, tmp_path, f"{delete}{apply} removal.diff")
        prose = make_it_yours.rpartition("This leaves unused")[2]
        assert unused_imports(tmp_path) == {*re.findall(r"`(\w+)`", prose)} - {"rewind"}
    else:
        assert unused_imports(tmp_path) == set()
    for name in SCRIPTS:
        text = (tmp_path / name).read_text()
        for word in ("event-watchers", "USER_IDS", "alice", '"user_id"', '"action"'):
            assert word not in text
    job = "python producer.py --count 100 --interval 0 >sent && python processor.py --once"
    counts = json.loads(run(start, tmp_path, f"({job}) 2>reports"))
    assert {*counts} == {"Ada", "Bob", "Cleo"}
    assert {*counts["Ada"]} == {"new", "paid", "sent"}
    assert sum(number for statuses in counts.values() for number in statuses.values()) == 100
    job = "python consumer.py >printed & until [ $(wc -l <printed) -ge 100 ]; do sleep 0.1; done"
    run(start, tmp_path, f"{job}; kill $!; wait")
    sent, printed = (
        sorted((tmp_path / name).read_text().splitlines()) for name in ("sent", "printed")
    )
    assert sent == printed
    event = json.loads(sent[0][sent[0].index("{") :])
    assert list(event) == ["event_id", "customer", "status", "timestamp"]
    reports = (tmp_path / "reports").read_text().splitlines()
    assert all(line.startswith("--- ") for line in reports)
    assert len(reports) < 6
    assert {"order-watchers", "order-counts"} <= {*witness.groups()}


def test_without_error_handling_a_missing_broker_is_one_traceback_after_10_s(
    tmp_path: Path, start: Start
) -> None:
    removal = blocks(section("Make it yours"), "diff")[1]
    [delete] = blocks(section("Make it yours"))
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "removal.diff").write_text(removal)
    subprocess.run(
        ["bash", "-c", f"{delete}git apply --unidiff-zero removal.diff"], cwd=tmp_path, check=True
    )
    scripts = [
        start(command=[sys.executable, str(tmp_path / name)], address="localhost:1")
        for name in SCRIPTS
    ]
    for script in scripts:
        assert script.wait(25) == 1
        assert script.err.count("Traceback") == 1
        assert script.err.splitlines()[-1].startswith("kafka.errors.KafkaTimeoutError")

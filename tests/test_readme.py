"""The commands of the README, taken from its own text and run as they stand."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from broker import PORT, ROOT, Broker, is_open
from harness import PATIENCE, SCRIPTS, Script, Start, Witness, until

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


def run(start: Start, folder: Path, command: str) -> str:
    """Runs a block in bash, with the tests' Python; returns what it has printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = start(command=["bash", "-c", f"cd {folder}\n{command}"], environment={"PATH": path})
    assert script.wait(3 * PATIENCE) == 0
    return script.out


@pytest.mark.xdist_group("port 9092")
def test_the_quick_start_without_docker(tmp_path: Path, start: Start) -> None:
    if is_open(PORT):
        pytest.skip(f"port {PORT} is taken")
    quick_start = section("## Quick start")
    install, at_once, _, kafka = blocks(quick_start)
    further = ". .venv/bin/activate"
    assert f"`{further}`" in quick_start
    clone, environment = install.splitlines()
    assert re.fullmatch(r"git clone \S+ kafka-practice && cd kafka-practice", clone)
    project = copy_project(tmp_path)
    # Without the environment of the tests, for the quick start makes one of its own.
    path = os.environ["PATH"].replace(str(Path(sys.executable).parent), "")
    kept = ("HOME", "LANG", "TMPDIR", "JDK_JAVA_OPTIONS", "PIP_", "SSL_")
    clean = {name: value for name, value in os.environ.items() if name.startswith(kept)}

    def terminal(*lines: str) -> Script:
        arguments = [f"{name}={value}" for name, value in (clean | {"PATH": path}).items()]
        block = "\n".join((f"cd {project}", *lines))
        return start(command=["env", "-i", *arguments, "bash", "-c", block], address="")

    one_command = terminal(environment, at_once)
    assert one_command.wait(3 * PATIENCE) == 0
    [counts] = one_command.snapshots
    assert sum(number for actions in counts.values() for number in actions.values()) == 100

    broker = terminal(further, kafka)
    until(lambda: "ready" in broker.out or broker.process.poll(), "Kafka is ready", 3 * PATIENCE)
    assert broker.process.poll() is None, broker.err
    for command in ("python producer.py", "python consumer.py", "python processor.py"):
        assert f"`{command}`" in quick_start
    producer = terminal(further, "exec python producer.py")
    until(lambda: producer.lines, "an event is shown")
    consumer = terminal(further, "exec python consumer.py")
    until(lambda: "--- partitions of events: 0, 1, 2\n" in consumer.err, "it has all partitions")
    another = terminal(further, "exec python consumer.py")
    one = r"^--- partitions of events: \d$"
    until(lambda: re.search(one, another.err, re.MULTILINE), "it has one")
    processor = terminal(further, "exec python processor.py")
    part = r"`(--- counting partitions of events: )1(; others .*?\))`"
    [(before, after)] = re.findall(part, quick_start)
    said = re.escape(before) + r"\d" + re.escape(after)
    until(lambda: re.search(said, processor.err), "it says what it counts")
    until(lambda: processor.snapshots, "it shows counts")

    [look] = blocks(section("### Look into the group"))
    looked = terminal(further, look)
    assert looked.wait() == 0
    assert looked.out.count("'client_id': 'consumer.py'") == 2
    assert looked.out.count("'client_id': 'processor.py'") == 1
    assert "'lag': " in looked.out

    for script in (producer, consumer, another, processor):
        assert script.stop() == 0
    events = len(producer.lines)
    assert {*consumer.lines, *another.lines} <= {*producer.lines}
    [reset] = re.findall(r"`(python -m kafka.admin \S+ \S+ groups reset-offsets .*?)`", README)
    assert terminal(further, reset).wait() == 0
    again = terminal(further, "exec python consumer.py")
    until(lambda: len(again.lines) == events, "all events are shown again")
    assert again.stop() == 0
    [forget] = re.findall(r"`(python -m kafka.admin \S+ \S+ groups delete .*?)`", README)
    assert terminal(further, forget).wait() == 0


def test_what_is_shown_and_not_committed_is_shown_again(project: Path, start: Start) -> None:
    leave, _ = blocks(section("## Things to try"))
    lines = run(start, project, leave).splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:]


def test_comparing_what_was_sent_with_what_was_shown(project: Path, start: Start) -> None:
    _, compare = blocks(section("## Things to try"))
    assert run(start, project, compare) == "nothing lost, nothing repeated\n"


BREAK_IT = section("## Break it")


def change(script: Path, hunk: list[str]) -> None:
    """Applies lines of a diff."""
    old = "".join(f"{line[1:]}\n" for line in hunk if line[0] in "- ")
    new = "".join(f"{line[1:]}\n" for line in hunk if line[0] in "+ ")
    text = script.read_text()
    assert text.count(old) == 1, old
    script.write_text(text.replace(old, new))


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
@pytest.mark.parametrize("number", range(3), ids=["no key", "commit first", "no seek"])
def test_breaking_it(number: int, changed: bool, project: Path, start: Start) -> None:
    """Each change applies to the script that the README names, and does what it says."""
    command = blocks(BREAK_IT)[number]
    script = project / re.findall(r"^\*\*.*?\*\*,? in `(\w+\.py)`", BREAK_IT, re.MULTILINE)[number]
    if changed:
        change(script, blocks(BREAK_IT, "diff")[number].splitlines())
    out = run(start, project, command)
    if number == 0:
        partitions = re.findall(r"^ *\d+ partition=\d$", out, re.MULTILINE)
        assert len(partitions) == (3 if changed else 1)
    elif number == 1:
        assert int(out.splitlines()[-1]) == (0 if changed else 1000)
    elif changed:
        assert out == "{}\n"
    else:
        counts = json.loads(out)
        assert sum(number for actions in counts.values() for number in actions.values()) == 100


@pytest.mark.parametrize("last_part", ["with", "without"])
def test_making_it_yours(last_part: str, project: Path, start: Start, witness: Witness) -> None:
    """The lines that the README names are all that is to change; also without the last part."""
    make_it_yours = section("## Make it yours")
    [diff] = blocks(make_it_yours, "diff")
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        names, *hunk = part.splitlines()
        for name in re.findall(r"\w+\.py", names):
            change(project / name, hunk)
    for name in SCRIPTS:
        text = (project / name).read_text()
        if last_part == "without":
            silenced = 'logging.getLogger("kafka").setLevel(logging.ERROR)'
            assert f"`{silenced}`" in make_it_yours
            second = re.compile(r"^# From here to main\(\).*?(?=^def main)", re.M | re.S)
            text, halves = second.subn(f"{silenced}\n\n\n", text)
            text, calls = re.subn(r"connect\(\n *(KafkaConsumer|KafkaProducer),", r"\1(", text)
            assert (halves, calls) == (1, 1)
            if name != "producer.py":
                text = text.replace("import contextlib\n", "")
        if name == "producer.py":
            text = re.sub(r"^(# .*\nUSERS|ACTIONS|GROUP_ID) = .*\n", "", text, flags=re.MULTILINE)
        for word in ("event-watchers", "user_id", "USERS", "alice", '"action"'):
            assert word not in text
        (project / name).write_text(text)
    job = "(python producer.py --count 100 --interval 0 >sent && python processor.py --once) 2>said"
    counts = json.loads(run(start, project, job))
    assert {*counts} == {"Ada", "Bob", "Cleo"}
    assert {*counts["Ada"]} == {"new", "paid", "sent"}
    assert sum(number for statuses in counts.values() for number in statuses.values()) == 100
    job = "python consumer.py >shown & until [ $(wc -l <shown) -ge 100 ]; do sleep 0.1; done"
    run(start, project, f"{job}; kill $!; wait")
    sent, shown = (sorted((project / name).read_text().splitlines()) for name in ("sent", "shown"))
    assert sent == shown
    fields = json.loads(sent[0][sent[0].index("{") :])
    assert list(fields) == ["order_id", "customer", "status", "amount"]
    assert all(line.startswith("--- ") for line in (project / "said").read_text().splitlines())
    assert len((project / "said").read_text().splitlines()) < 6  # kafka-python says little itself
    assert {"order-watchers", "order-counts"} <= {*witness.groups()}

"""The README: its commands run as they stand, its diffs apply, its quotes are exact."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broker import ROOT, Broker
from readme import blocks, copy_project, run, section
from scripts import SCRIPTS, Start
from witness import Witness


@pytest.fixture
def project(tmp_path: Path, broker: Broker) -> Path:
    """A copy in which `python tests/broker.py COMMAND` runs the command with the test's broker.

    That one is just as empty, and a broker of its own would take most of the time of some tests.
    """
    project = copy_project(tmp_path)
    stand_in = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])\n"
    (project / "tests" / "broker.py").write_text(stand_in)
    return project


def test_quoted_loops_are_those_of_the_scripts() -> None:
    quotes = blocks(section("The code"), "python")
    for script, quote in zip(("consumer.py", "processor.py"), quotes, strict=True):
        assert quote in (ROOT / script).read_text()
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
        prose = make_it_yours.rpartition("Now unused")[2]
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

"""The README: its commands run as they stand, and what it tells to change works."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from broker import ROOT, Broker
from events import MALFORMED_VALUES, event
from readme import blocks, copy_project, run, section
from scripts import SCRIPTS, Start, send_events, wait_until
from witness import Witness


@pytest.fixture
def project(tmp_path: Path, broker: Broker) -> Path:
    """A copy in which `python tests/broker.py COMMAND` only runs the command: the test's broker
    is as empty as one of its own, and is there already."""
    project = copy_project(tmp_path)
    stand_in = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])\n"
    (project / "tests" / "broker.py").write_text(stand_in)
    return project


def replace(script: Path, old: str, new: str) -> None:
    text = script.read_text()
    assert text.count(old) == 1, (script.name, old)
    script.write_text(text.replace(old, new), encoding="utf-8")


def test_the_first_command(kafka: None, tmp_path: Path, start: Start) -> None:
    """It creates its own virtual environment: that of the tests is not on its PATH."""
    first_command = blocks(section("Quick start"))[0]
    path = os.environ["PATH"].replace(str(Path(sys.executable).parent), "")
    counts = json.loads(run(start, copy_project(tmp_path), first_command, path))
    assert sum(count for actions in counts.values() for count in actions.values()) == 100


def test_delivery_is_at_least_once(project: Path, start: Start) -> None:
    *_, at_least_once = blocks(section("Things to try"))
    lines = run(start, project, at_least_once).splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:]


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
@pytest.mark.parametrize("number", [0, 1], ids=["no key", "commit first"])
def test_changes_break_something(number: int, changed: bool, project: Path, start: Start) -> None:
    break_it = section("Break it").replace("\n", " ")
    command = blocks(section("Break it"))[number]
    if changed and number == 0:
        [(old, new)] = re.findall("change `(.*?)` to `(.*?)`", break_it)
        replace(project / "producer.py", old, new)
    elif changed:
        [(moved, above)] = re.findall("move `(.*?)` above `(.*?)`", break_it)
        replace(project / "consumer.py", f"            {moved}\n", "")
        replace(project / "consumer.py", f"  {above}\n", f"  {moved}\n            {above}\n")
    out = run(start, project, command)
    if number == 0:
        partitions = re.findall(r"^ *\d+ partition=\d$", out, re.MULTILINE)
        assert len(partitions) == (3 if changed else 1)
    else:
        assert int(out.splitlines()[-1]) == (0 if changed else 1000)


def test_make_it_yours(tmp_path: Path, broker: Broker, start: Start, witness: Witness) -> None:
    """As "Make it yours" lists it: the topic, the groups, the event, its key, the two fields."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
        replace(tmp_path / name, 'TOPIC = "events"', 'TOPIC = "orders"')
        replace(tmp_path / name, f'client_id="{name}"', f'client_id="orders-{name}"')
    replace(tmp_path / "consumer.py", '"event-watchers"', '"order-watchers"')
    processor = tmp_path / "processor.py"
    replace(processor, '"event-watchers"', '"order-counts"')
    replace(processor, 'event["user_id"], event["action"]', 'event["customer"], event["status"]')
    producer = tmp_path / "producer.py"
    replace(producer, '"user_id": random.choice(USER_IDS', '"customer": random.choice(["A", "Ë"]')
    replace(producer, '"action": random.choice(ACTIONS', '"status": random.choice(["new", "paid"]')
    replace(producer, 'event["user_id"]', 'event["customer"]')
    job = "python producer.py --count 100 --interval 0 >sent && python processor.py --once"
    counts = json.loads(run(start, tmp_path, f"({job}) 2>stderr"))
    assert {*counts} == {"A", "Ë"}
    assert {*counts["A"]} == {"new", "paid"}
    assert sum(number for statuses in counts.values() for number in statuses.values()) == 100
    job = "python consumer.py >printed & until [ $(wc -l <printed) -ge 100 ]; do sleep 0.1; done"
    run(start, tmp_path, f"{job}; kill $!; wait")
    sent, printed = ((tmp_path / name).read_bytes().splitlines() for name in ("sent", "printed"))
    assert sorted(sent) == sorted(printed)
    assert all(line.startswith("--- ") for line in (tmp_path / "stderr").read_text().splitlines())
    assert {"order-watchers", "order-counts"} <= {*witness.groups()}


def test_the_recipe(tmp_path: Path, broker: Broker, start: Start, witness: Witness) -> None:
    [recipe] = blocks(section("Make it yours"), "python")
    assert len(recipe.splitlines()) <= 12
    text = (ROOT / "consumer.py").read_text()
    print_events = re.compile(r"def print_events.*?\n\n\n", re.DOTALL)
    copied = (ROOT / "processor.py").read_text().partition("def user_and")[2].partition("\n\n\n")[0]
    text = print_events.sub(lambda _: f"{recipe}\n\ndef user_and{copied}\n\n\n", text, count=1)
    (tmp_path / "watcher.py").write_text(text)
    replace(tmp_path / "watcher.py", '"event-watchers"', '"purchase-watchers"')
    witness.create_topic(3)
    values = [*MALFORMED_VALUES.values(), event("a\x9b", "purchase"), event("bob", "view")]
    witness.write((number % 3, b"key", value) for number, value in enumerate(values))
    watcher = start(command=[sys.executable, str(tmp_path / "watcher.py")])
    wait_until(lambda: watcher.lines, "it reacts to the purchase")
    send_events(start, 100)
    purchases = sum(b"purchase" in (message.value or b"") for message in witness.messages())
    wait_until(lambda: len(watcher.lines) == purchases, "it reacts to every purchase")
    assert watcher.stop() == 0
    assert r"thank you, 'a\x9b'" in watcher.lines
    assert "Traceback" not in watcher.err
    assert watcher.err.count("--- skipped partition=") == len(MALFORMED_VALUES)

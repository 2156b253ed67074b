"""The whole pipeline: whatever the producer sends is printed and counted."""

import re

import pytest
from broker import ROOT
from pipeline import run_pipeline
from scripts import SCRIPTS, Start, assert_clean_stop, assert_plain_stderr, wait_until
from witness import Witness


def test_events_are_sent_printed_and_counted(start: Start, witness: Witness) -> None:
    assert_plain_stderr(*run_pipeline(start, witness))


@pytest.mark.parametrize("first", SCRIPTS)
def test_the_first_script_creates_the_topic_without_an_error(
    first: str, start: Start, witness: Witness
) -> None:
    assert witness.partitions() == []
    script = start(first)
    wait_until(lambda: witness.partitions() == [0, 1, 2], "the topic has three partitions")
    wait_until(lambda: script.lines or script.assigned == [0, 1, 2], "the script is at work")
    assert_clean_stop(script)
    assert not re.search("error|not found|missing", script.err, re.IGNORECASE)


def test_shared_code_is_the_same_in_all_scripts() -> None:
    texts = [(ROOT / script).read_text() for script in SCRIPTS]
    for first_line, end, scripts in (
        ("BOOTSTRAP_SERVERS = ", "log = ", texts),  # the settings
        ("class BrokerStatus", "def main", texts),
        ("    os.set_blocking", r"    \w+ = connect", texts),  # stdout and the log
        ("def polls", "class BrokerStatus", texts[1:]),
    ):
        block = re.compile(rf"^{first_line}.*?^(?={end})", re.MULTILINE | re.DOTALL)
        copies = [block.findall(text) for text in scripts]
        assert len(copies[0]) == 1
        assert all(copy == copies[0] for copy in copies)

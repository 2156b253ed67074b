"""The whole pipeline: whatever the producer sends is printed and counted."""

import re

import pytest
from scripts import SCRIPTS, Start, assert_clean_stop, assert_plain_stderr, run_pipeline, wait_until
from witness import Witness


def test_events_are_sent_printed_and_counted(start: Start, witness: Witness) -> None:
    assert_plain_stderr(*run_pipeline(start, witness))


@pytest.mark.parametrize("first", SCRIPTS)
def test_the_first_script_creates_the_topic(first: str, start: Start, witness: Witness) -> None:
    assert witness.partitions() == []
    script = start(first)
    wait_until(lambda: witness.partitions() == [0, 1, 2], "the topic has three partitions")
    wait_until(lambda: script.lines or script.assigned == [0, 1, 2], "the script is at work")
    assert_clean_stop(script)
    assert not re.search("error|not found|missing|retrying", script.err, re.IGNORECASE)

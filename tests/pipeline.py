"""What the three scripts do together: events are sent, printed and counted."""

from typing import Any

from events import counts_of, event_lines
from scripts import Script, Start, printed_lines, send_events, wait_until
from witness import Witness


def run_pipeline(start: Start, witness: Witness, **options: Any) -> list[Script]:
    """Have a hundred events sent, printed and counted; return the three scripts."""
    producer = send_events(start, 100, **options)
    log = witness.messages()
    assert printed_lines(producer) == event_lines(log)
    assert witness.partitions() == [0, 1, 2]
    consumer = start("consumer.py", **options)
    wait_until(lambda: len(consumer.lines) >= 100, "all events are printed")
    assert consumer.stop() == 0
    assert printed_lines(consumer) == printed_lines(producer)
    processor = start("processor.py", "--once", "--group", "counting", **options)
    assert processor.wait() == 0
    assert processor.snapshots == [counts_of(log)]
    return [producer, consumer, processor]

"""Events as the tests write and expect them: as JSON, as printed lines, as counts."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from scripts import Counts


class Message(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


def event(user_id: Any = "alice", action: Any = "view", **fields: Any) -> bytes:
    """Return the JSON of an event: a good one, unless a given field is malformed."""
    good = {"event_id": "0", "user_id": user_id, "action": action, "timestamp": "2026-01-01"}
    return json.dumps(good | fields).encode()


def event_line(message: Message) -> str:
    """Return the line that producer and consumer print for a message of printable UTF-8."""
    key, value = ("null" if data is None else data.decode() for data in message[2:])
    return f"partition={message.partition} offset={message.offset} key={key} {value}"


def event_lines(messages: Iterable[Message]) -> list[str]:
    """Return the lines of the messages, sorted."""
    return sorted(map(event_line, messages))


def counts_of(messages: Iterable[Message]) -> Counts:
    """Count the messages, which are all good events, as the processor should."""
    total: Counts = {}
    for message in messages:
        assert message.value is not None
        fields = json.loads(message.value)
        actions = total.setdefault(fields["user_id"], {})
        actions[fields["action"]] = actions.get(fields["action"], 0) + 1
    return total


def sum_of_counts(*several: Counts) -> Counts:
    total: dict[str, Counter[str]] = {}
    for counts in several:
        for user_id, actions in counts.items():
            total.setdefault(user_id, Counter()).update(actions)
    return {user_id: dict(actions) for user_id, actions in total.items()}

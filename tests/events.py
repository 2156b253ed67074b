"""Events, the messages that carry them, and their counts."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

Counts = dict[str, dict[str, int]]  # how often each user did each action


class Message(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


def event(user_id: Any = "alice", action: Any = "view", **fields: Any) -> bytes:
    """Return a well-formed event, unless one of the given fields is malformed."""
    defaults = {"event_id": "0", "user_id": user_id, "action": action, "timestamp": "2026-01-01"}
    return json.dumps(defaults | fields).encode()


def event_line(message: Message) -> str:
    """Return the line that producer and consumer print for a message of printable UTF-8."""
    key, value = ("null" if data is None else data.decode() for data in message[2:])
    return f"partition={message.partition} offset={message.offset} key={key} {value}"


def event_lines(messages: Iterable[Message]) -> list[str]:
    """Return the event lines of these messages, sorted."""
    return sorted(map(event_line, messages))


def counts_of(messages: Iterable[Message]) -> Counts:
    """Return the counts of these messages, all of them well-formed events."""
    events = [json.loads(message.value or b"") for message in messages]
    return sum_of_counts(*({event["user_id"]: {event["action"]: 1}} for event in events))


def sum_of_counts(*several: Counts) -> Counts:
    totals: dict[str, Counter[str]] = {}
    for counts in several:
        for user_id, actions in counts.items():
            totals.setdefault(user_id, Counter()).update(actions)
    return {user_id: dict(actions) for user_id, actions in totals.items()}

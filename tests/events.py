"""Events, well-formed and malformed, the messages that carry them, and their counts."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

Snapshot = dict[str, dict[str, int]]  # how often each user did each action


class Message(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


def event(user_id: Any = "alice", action: Any = "view", **fields: Any) -> bytes:
    """Return a well-formed event, unless one of the given fields is malformed."""
    defaults = {"event_id": "0", "user_id": user_id, "action": action, "timestamp": "2026-01-01"}
    return json.dumps(defaults | fields).encode()


# What the processor cannot count, and the consumer prints all the same.
MALFORMED_VALUES: dict[str, bytes | None] = {
    "no value": None,
    "not UTF-8": b"\xff\xfe\xfa",
    "a BOM": b"\xef\xbb\xbf" + event(),
    "not JSON": b"hello",
    "a list": b"[1, 2]",
    "null": b"null",
    "deeply nested": b"[" * 200_000,
    "a number of 6,000 digits": b"1" * 6000,
    "an encoded surrogate": event("@").replace(b"@", b"\xed\xa0\x80"),
    "no user_id": b'{"action": "view"}',
    "half a surrogate pair": event("\ud83d"),  # which jq refuses to read
    **{f"user_id is {value!r}": event(user_id=value) for value in (1, ["alice"])},
    **{f"action is {value!r}": event(action=value) for value in (None, {"a": "view"})},
}


def event_lines(messages: Iterable[Message]) -> list[str]:
    """Return the lines that the scripts print for messages of printable UTF-8, sorted."""
    lines = []
    for m in messages:
        key, value = ("null" if data is None else data.decode() for data in (m.key, m.value))
        lines.append(f"partition={m.partition} offset={m.offset} key={key} {value}")
    return sorted(lines)


def counts_of(messages: Iterable[Message]) -> Snapshot:
    """Return the counts of these messages, all of them well-formed events."""
    counts: Snapshot = {}
    for message in messages:
        event = json.loads(message.value or b"")
        counts.setdefault(event["user_id"], Counter())[event["action"]] += 1
    return counts

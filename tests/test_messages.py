"""Whatever is in the topic: each message is one harmless line, and good events are counted."""

import json
import re
import time
from typing import Any

import pytest
from broker import Broker
from confluent_kafka import Producer
from events import Message, counts_of, event
from kafka import KafkaProducer
from scripts import (
    PARTIAL_ASSIGNMENT,
    TIMEOUT,
    Start,
    assert_few_plain_lines,
    frozen,
    patched,
    wait_until,
)
from witness import TOPIC, Witness

GOOD = [event(user, action) for user in ("alice", "bob") for action in ("view", "click")]
WITHOUT = {
    field: json.dumps({k: v for k, v in json.loads(GOOD[0]).items() if k != field}).encode()
    for field in ("event_id", "user_id", "action", "timestamp")
}
MALFORMED: dict[str, bytes | None] = {
    "no value": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\xfa",
    "a byte order mark": b"\xef\xbb\xbf" + GOOD[0],
    "not JSON": b"hello",
    "a list": b"[1, 2]",
    "a string": b'"alice"',
    "a number": b"7",
    "null": b"null",
    "deep": b"[" * 200_000,
    "900 kB": b"x" * 900_000,
    "surrogate byte": event("@").replace(b"@", b"\xed\xa0\x80"),
    "no user_id": WITHOUT["user_id"],
    "no action": WITHOUT["action"],
    "user_id is null": event(user_id=None),
    "user_id is a list": event(user_id=["alice"]),
    "action is a number": event(action=1.5),
    "action is an object": event(action={"a": "view"}),
}
# Events all the same, although their fields are strange: what is not counted is not looked at.
STRANGE: dict[str, bytes] = {
    **{f"no {field}": WITHOUT[field] for field in ("event_id", "timestamp")},
    "numbers": event(event_id=7, timestamp=1.5, amount=-3, tags=["a"], more={"b": None}),
    "empty user": event(""),
    "lone surrogate": event("\ud800"),
    "astral": event("@").replace(b"@", "🦀".encode()),
    "escape sequences": event("\x1b[2J\x1b]0;owned\x07"),
    "raw control character": event("\x7f").replace(b"\\u007f", b"\x7f"),
    "line separators": event("@").replace(b"@", "a\u2028b\u2029c\u0085d".encode()),
    "right to left": event("@").replace(b"@", "\u202eevil\u2066".encode()),
    "900 kB more": event(extra="x" * 900_000),
    "space and newlines": b"\r\n\t " + event("spaced") + b"\r\n",
    "a field twice": event("first").replace(b"{", b'{"user_id": "zeroth", ', 1),
    "quotes": event('"],\\'),
}
KEYS = [None, b"", b"key", b"\xff", b"\x1b[31m", b"a\rb\nc", "\u202e\u2028🦀".encode()]


def is_harmless(text: str) -> bool:
    """Return whether a terminal would print the text and do nothing else."""
    return all(character.isprintable() for character in text)


@pytest.fixture
def mixed_messages(witness: Witness) -> list[Message]:
    """Write all of the above to the topic, between good events and with every kind of key."""
    witness.create_topic(3)
    values: list[bytes | None] = []
    for value in (*MALFORMED.values(), *STRANGE.values()):
        values += [GOOD[len(values) // 2 % 4], value]
    witness.write(
        (number % 3, KEYS[number % len(KEYS)], value) for number, value in enumerate(values)
    )
    messages = witness.messages()
    assert len(messages) == len(values)
    return messages


def test_consumer_prints_every_message_in_one_harmless_line(
    mixed_messages: list[Message], start: Start
) -> None:
    consumer = start("consumer.py")
    wait_until(lambda: len(consumer.lines) >= len(mixed_messages), "everything is printed")
    assert consumer.stop() == 0
    assert "Traceback" not in consumer.err
    assert len(consumer.lines) == len(mixed_messages)
    assert all(is_harmless(line) for line in consumer.lines)
    by_position = {line.partition(" key=")[0]: line for line in consumer.lines}
    by_value = {}
    for message in mixed_messages:
        line = by_position[f"partition={message.partition} offset={message.offset}"]
        by_value[message.value] = line
        for data, before, after in ((message.key, " key=", " "), (message.value, " ", "")):
            text = "null" if data is None else data.decode(errors="replace")
            if is_harmless(text) and "\ufffd" not in text:
                assert f"{before}{text}{after}" in line  # as it was sent
    for value, expected in (
        (None, " null"),
        (b"\xff\xfe\xfa", r"\xff\xfe\xfa"),
        (STRANGE["raw control character"], r'"user_id": "\x7f"'),
        (STRANGE["line separators"], r"a\u2028b\u2029c\x85d"),
        (STRANGE["right to left"], r"\u202eevil\u2066"),
        (STRANGE["astral"], "🦀"),
    ):
        assert expected in by_value[value]
    for key in (r"\x1b[31m", r"a\rb\nc", "null"):
        assert any(f" key={key} " in line for line in consumer.lines)


def test_processor_counts_good_events_and_skips_malformed_ones(
    mixed_messages: list[Message], start: Start
) -> None:
    processor = start("processor.py")
    wait_until(lambda: processor.snapshots, "counts are printed")
    assert processor.stop() == 0
    good = [m for m in mixed_messages if m.value in GOOD or m.value in STRANGE.values()]
    for snapshot in processor.snapshots:
        assert snapshot == counts_of(good)
    assert all(is_harmless(line) for line in processor.lines)
    skipped = [line for line in processor.err.splitlines() if "malformed" in line]
    assert skipped[-1].startswith(f"--- malformed events skipped: {len(MALFORMED)}; last at ")
    assert "Traceback" not in processor.err


def test_processor_reports_what_is_wrong_with_an_event(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    processor = start("processor.py")
    wait_until(lambda: processor.snapshots, "counts are printed")
    reasons: dict[bytes | None, str] = {
        b"hello": "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        WITHOUT["user_id"]: "KeyError: 'user_id'",
    }
    for offset, (value, reason) in enumerate(reasons.items()):
        witness.write([(2, b"k", value)])
        report = f"skipped: {offset + 1}; last at partition=2 offset={offset}: {reason}\n"
        wait_until(lambda: report in processor.err, f"it reports: {report}")
    assert processor.stop() == 0
    assert processor.snapshots == [{}]


def test_malformed_events_are_reported_for_the_assigned_partitions(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"k", b"hello") for number in range(9))
    processor = start("processor.py")
    wait_until(lambda: "skipped: 9; " in processor.err, "it reports how many there are")
    consumer = start("consumer.py")
    wait_until(lambda: re.search(PARTIAL_ASSIGNMENT, processor.err), "they share the partitions")
    assigned = re.findall(PARTIAL_ASSIGNMENT, processor.err)[-1].split(", ")
    witness.write((number, b"k", b"hello") for number in range(3))
    number = 4 * len(assigned)
    wait_until(
        lambda: f"skipped: {number}; " in processor.err, "it reports those in its partitions"
    )
    assert consumer.stop() == 0
    wait_until(lambda: processor.err.count(" (all)\n") == 2, "the processor is assigned all again")
    witness.write([(0, b"k", b"hello")])
    wait_until(lambda: "skipped: 13; " in processor.err, "there is one more, and no other")
    witness.write([(0, b"k", GOOD[0])])
    wait_until(lambda: len(processor.snapshots[-1]) == 1, "the good one is counted")
    assert processor.stop() == 0
    assert processor.err.count("skipped: 13; ") == 1  # reported when there are more, not again


def test_a_flood_of_malformed_events_does_not_flood_stderr(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    bad = [value for value in MALFORMED.values() if value is None or len(value) < 1000]
    witness.write((number % 3, b"", bad[number % len(bad)]) for number in range(100_000))
    began = time.monotonic()
    processor = start("processor.py")
    wait_until(lambda: processor.snapshots, "counts are printed")
    elapsed = time.monotonic() - began
    assert processor.stop() == 0
    assert "malformed events skipped: 100000; " in processor.err
    assert processor.err.count("malformed") <= 2 + elapsed, processor.err  # once a second


def test_output_that_cannot_be_encoded_is_escaped(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write([(0, "Zoë".encode(), STRANGE["astral"])])
    plain_c = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    consumer = start("consumer.py", environment=plain_c)
    wait_until(lambda: consumer.lines, "the event is printed")
    assert consumer.stop() == 0
    assert r"key=Zo\xeb " in consumer.lines[0]
    assert r"\U0001f980" in consumer.lines[0]
    processor = start("processor.py", environment=plain_c)
    wait_until(lambda: processor.snapshots, "counts are printed")
    assert processor.stop() == 0
    assert processor.snapshots[0] == {"🦀": {"view": 1}}
    command = patched("accented_user", "producer.py", "--count", "3")
    producer = start(command=command, environment=plain_c)
    assert producer.wait() == 0
    assert all(r"key=Zo\xeb " in line for line in producer.lines)


def test_readers_read_every_codec(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    for codec in ("gzip", "snappy", "lz4", "zstd"):  # in large batches
        witness.write(((i % 3, b"key", event(codec)) for i in range(20_000)), compression=codec)
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    wait_until(lambda: len(consumer.lines) >= 80_000, "all events are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    assert processor.snapshots[0] == counts_of(witness.messages())
    for script in (consumer, processor):
        assert script.stop() == 0
        assert_few_plain_lines(script)


def test_readers_skip_aborted_and_open_transactions(start: Start, witness: Witness) -> None:
    witness.create_topic(1)

    def transaction(user_id: str) -> Producer:
        producer = Producer({**witness.settings, "transactional.id": user_id})
        producer.init_transactions(TIMEOUT)
        producer.begin_transaction()
        for _ in range(10):
            producer.produce(TOPIC, event(user_id), b"key", 0)
        producer.flush(TIMEOUT)
        return producer

    transaction("committed").commit_transaction(TIMEOUT)
    transaction("aborted").abort_transaction(TIMEOUT)
    consumer = start("consumer.py")
    wait_until(lambda: len(consumer.lines) == 10, "the committed events are printed")
    counted = {"committed": {"view": 10}}
    # The log ends with the marker of the aborted transaction, which is not an event.
    assert start("processor.py", "--once", "--group", "first").wait() == 0
    open_transaction = transaction("open")
    processor = start("processor.py", "--group", "second")
    wait_until(lambda: processor.snapshots == [counted], "it does not wait for the open one")
    open_transaction.commit_transaction(TIMEOUT)
    counted_later = [counted, counted | {"open": {"view": 10}}]
    wait_until(lambda: processor.snapshots == counted_later, "its events are counted")
    wait_until(lambda: len(consumer.lines) == 20, "its events are printed")
    for script in (consumer, processor):
        assert script.stop() == 0
    assert not any("aborted" in line for line in consumer.lines)


class NotUtf8(str):
    def encode(self, *_: Any) -> bytes:
        return b"\xff"


@pytest.mark.parametrize("damage", ["a byte of the batch", "a header's key is not UTF-8"])
def test_readers_exit_with_one_line_on_what_kafka_python_cannot_read(
    damage: str, start: Start, broker: Broker, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("good"))])
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    wait_until(lambda: consumer.lines and processor.snapshots, "they are running")
    wait_until(lambda: witness.committed() == {0: 1}, "it is committed")
    with frozen(consumer, processor):
        time.sleep(1)  # a fetch that has been sent returns without events
        if "header" in damage:
            producer = KafkaProducer(bootstrap_servers=broker.address)
            producer.send(TOPIC, event("bad"), headers=[(NotUtf8("key"), b"value")]).get(TIMEOUT)
            producer.close()
        else:
            witness.write([(0, b"key", event("damaged"))])
            segment = broker.folder / "data" / f"{TOPIC}-0" / f"{0:020}.log"
            with segment.open("r+b") as file:
                file.seek(segment.read_bytes().index(b"damaged"))
                file.write(b"D")
    for script in (consumer, processor):
        assert script.wait() == 1
        last = script.err.splitlines()[-1]
        assert re.match("--- cannot read events: .*CorruptRecordError", last)
        assert "Traceback" not in script.err
    assert len(consumer.lines) == len(processor.snapshots) == 1
    assert witness.committed() == {0: 1}

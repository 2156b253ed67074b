"""Whatever is on the topic, it is shown in one harmless line each, and good events are counted."""

import json
import re
import time
from typing import Any

import pytest
from broker import Broker
from confluent_kafka import Producer
from harness import (
    PATIENCE,
    TOPIC,
    Message,
    Start,
    Witness,
    assert_plain,
    choosing,
    count,
    event,
    frozen,
    patched,
    until,
)
from kafka import KafkaProducer

GOOD = [event(user, action) for user in ("alice", "bob") for action in ("view", "click")]
WITHOUT = {
    field: json.dumps({k: v for k, v in json.loads(GOOD[0]).items() if k != field}).encode()
    for field in ("event_id", "user_id", "action", "timestamp")
}
WRONG: list[Any] = [None, 1, 1.5, True, ["view"], {"a": "view"}]
MALFORMED: dict[str, bytes | None] = {
    "no value": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\xfa",
    "UTF-16, no BOM": GOOD[0].decode().encode("utf-16-le"),
    "a BOM": b"\xef\xbb\xbf" + GOOD[0],
    "not JSON": b"hello",
    "a list": b"[1, 2]",
    "a string": b'"alice"',
    "a number": b"7",
    "null": b"null",
    "deep": b"[" * 200_000,
    "6,000 digits": b"1" * 6000,
    "900 kB": b"x" * 900_000,
    "surrogate byte": event("@").replace(b"@", b"\xed\xa0\x80"),
    **{f"no {field}": WITHOUT[field] for field in ("user_id", "action")},
    **{
        f"{field} is {wrong!r}": event(**{field: wrong})
        for field in ("user_id", "action")
        for wrong in WRONG
    },
}
# Events all the same, though their fields are strange: what is not counted is not looked at.
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
    """Whether a terminal shows the text and does nothing else."""
    return all(character.isprintable() for character in text)


@pytest.fixture
def mixture(witness: Witness) -> list[Message]:
    """Everything above on the topic, among good events, under every kind of key."""
    witness.create(3)
    values: list[bytes | None] = []
    for value in (*MALFORMED.values(), *STRANGE.values()):
        values += [GOOD[len(values) // 2 % 4], value]
    witness.write(
        (number % 3, KEYS[number % len(KEYS)], value) for number, value in enumerate(values)
    )
    log = witness.log()
    assert len(log) == len(values)
    return log


def test_consumer_shows_everything_in_one_harmless_line(
    mixture: list[Message], start: Start
) -> None:
    consumer = start("consumer.py")
    until(lambda: len(consumer.lines) >= len(mixture), "everything is shown")
    assert consumer.stop() == 0
    assert "Traceback" not in consumer.err
    assert len(consumer.lines) == len(mixture)
    assert all(is_harmless(line) for line in consumer.lines)
    places = {line.partition(" key=")[0]: line for line in consumer.lines}
    by_value = {}
    for message in mixture:
        line = places[f"partition={message.partition} offset={message.offset}"]
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


def test_processor_counts_the_good_and_names_the_malformed(
    mixture: list[Message], start: Start
) -> None:
    processor = start("processor.py")
    until(lambda: processor.snapshots, "counts are shown")
    assert processor.stop() == 0
    good = [m for m in mixture if m.value in GOOD or m.value in STRANGE.values()]
    for snapshot in processor.snapshots:
        assert snapshot == count(good)
    assert all(is_harmless(line) for line in processor.lines)
    skipped = [line for line in processor.err.splitlines() if "malformed" in line]
    assert skipped[-1].startswith(f"--- malformed events skipped: {len(MALFORMED)}, the last at ")
    assert "Traceback" not in processor.err


def test_processor_says_why(start: Start, witness: Witness) -> None:
    witness.create(3)
    processor = start("processor.py")
    until(lambda: processor.snapshots, "counts are shown")
    reasons: dict[bytes | None, str] = {
        b"hello": "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        WITHOUT["user_id"]: "KeyError: 'user_id'",
    }
    for offset, (value, why) in enumerate(reasons.items()):
        witness.write([(2, b"k", value)])
        place = f"{offset + 1}, the last at partition=2 offset={offset}"
        said = f"--- malformed events skipped: {place}: {why}"
        until(lambda: said in processor.err, f"it says: {said}")
    assert processor.stop() == 0
    assert processor.snapshots == [{}]


def test_malformed_events_are_counted_once_however_often_they_are_read(
    start: Start, witness: Witness
) -> None:
    witness.create(3)
    witness.write((number % 3, b"k", b"hello") for number in range(9))
    processor = start("processor.py")
    until(lambda: "skipped: 9, " in processor.err, "it says how many there are")
    consumer = start("consumer.py")
    until(lambda: "; others of" in processor.err, "the consumer has a share")
    share = processor.err.rpartition("partitions of events: ")[2].partition(";")[0]
    witness.write((number, b"k", b"hello") for number in range(3))
    number = 4 * len(re.findall(r"\d", share))
    until(lambda: f"skipped: {number}, " in processor.err, "it counts those of its share")
    assert consumer.stop() == 0
    until(lambda: processor.err.count(": all\n") == 2, "the processor has all again")
    witness.write([(0, b"k", b"hello")])
    until(lambda: "skipped: 13, " in processor.err, "there is one more, and no other")
    witness.write([(0, b"k", GOOD[0])])
    until(lambda: len(processor.snapshots[-1]) == 1, "the good one is counted")
    assert processor.stop() == 0
    assert processor.err.count("skipped: 13, ") == 1  # it is said when there are more, not again


def test_a_flood_of_malformed_events_does_not_flood_stderr(start: Start, witness: Witness) -> None:
    witness.create(3)
    bad = [value for value in MALFORMED.values() if value is None or len(value) < 1000]
    witness.write((number % 3, b"", bad[number % len(bad)]) for number in range(100_000))
    began = time.monotonic()
    processor = start("processor.py")
    until(lambda: processor.snapshots, "counts are shown")
    elapsed = time.monotonic() - began
    assert processor.stop() == 0
    assert "malformed events skipped: 100000, " in processor.err
    assert len(processor.err.splitlines()) < 3 + elapsed * 1.5, processor.err


def test_output_that_cannot_be_encoded_is_escaped(start: Start, witness: Witness) -> None:
    witness.create(3)
    witness.write([(0, "Zoë".encode(), STRANGE["astral"])])
    plain_c = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    consumer = start("consumer.py", environment=plain_c)
    until(lambda: consumer.lines, "the event is shown")
    assert consumer.stop() == 0
    assert r"key=Zo\xeb " in consumer.lines[0]
    assert r"\U0001f980" in consumer.lines[0]
    processor = start("processor.py", environment=plain_c)
    until(lambda: processor.snapshots, "counts are shown")
    assert processor.stop() == 0
    assert processor.snapshots[0] == {"🦀": {"view": 1}}
    lines = choosing(r"'Zo\xeb'")
    producer = start(command=patched(lines, "producer.py", "--count", "3"), environment=plain_c)
    assert producer.wait() == 0
    assert all(r"key=Zo\xeb " in line for line in producer.lines)


def test_every_codec_is_read(start: Start, witness: Witness) -> None:
    witness.create(3)
    for codec in ("gzip", "snappy", "lz4", "zstd"):  # in large batches
        witness.write(((i % 3, b"key", event(codec)) for i in range(20_000)), compression=codec)
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    until(lambda: len(consumer.lines) >= 80_000, "all events are shown")
    until(lambda: processor.snapshots, "all events are counted")
    assert processor.snapshots[0] == count(witness.log())
    for script in (consumer, processor):
        assert script.stop() == 0
        assert_plain(script)


def test_nothing_of_a_transaction_is_read_that_is_not_committed(
    start: Start, witness: Witness
) -> None:
    witness.create(1)

    def transaction(user_id: str) -> Producer:
        producer = Producer({**witness.settings, "transactional.id": user_id})
        producer.init_transactions(PATIENCE)
        producer.begin_transaction()
        for _ in range(10):
            producer.produce(TOPIC, event(user_id), b"key", 0)
        producer.flush(PATIENCE)
        return producer

    transaction("committed").commit_transaction(PATIENCE)
    transaction("aborted").abort_transaction(PATIENCE)
    consumer = start("consumer.py")
    until(lambda: len(consumer.lines) == 10, "the committed events are shown")
    counted = {"committed": {"view": 10}}
    # It ends behind the records with which a transaction ends, which are no events.
    assert start("processor.py", "--once", "--group", "behind").wait() == 0
    open_one = transaction("open")
    beside = start("processor.py", "--group", "beside")
    until(lambda: beside.snapshots == [counted], "it shows counts beside a transaction in progress")
    open_one.commit_transaction(PATIENCE)
    until(lambda: beside.snapshots[1:] == [counted | {"open": {"view": 10}}], "that is committed")
    until(lambda: len(consumer.lines) == 20, "and shown")
    for script in (consumer, beside):
        assert script.stop() == 0
    assert not any("aborted" in line for line in consumer.lines)


class NotUtf8(str):
    def encode(self, *_: Any) -> bytes:
        return b"\xff"


@pytest.mark.parametrize("damage", ["a byte of the batch", "a header's key is not UTF-8"])
def test_what_kafka_python_cannot_read_ends_the_readers_with_a_line(
    damage: str, start: Start, broker: Broker, witness: Witness
) -> None:
    witness.create(1)
    witness.write([(0, b"key", event("good"))])
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    until(lambda: consumer.lines and processor.snapshots, "they are at work")
    until(lambda: witness.committed() == {0: 1}, "it is committed")
    with frozen(consumer, processor):
        time.sleep(1)  # a fetch that is on its way comes back with nothing
        if "header" in damage:
            producer = KafkaProducer(bootstrap_servers=broker.address)
            producer.send(TOPIC, event("bad"), headers=[(NotUtf8("key"), b"value")]).get(PATIENCE)
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
        assert re.match("--- cannot read the events: .*CorruptRecordError", last)
        assert "Traceback" not in script.err
    assert len(consumer.lines) == len(processor.snapshots) == 1
    assert witness.committed() == {0: 1}

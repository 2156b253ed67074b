"""Messages of any content: none controls the terminal, stops a reader or spoils a count."""

import json
import re
import time
from typing import Any

import pytest
import reports
from broker import Broker
from confluent_kafka import Producer
from events import Message, counts_of, event
from kafka import KafkaProducer
from scripts import TIMEOUT, TOPIC, Start, assert_clean_stop, frozen, wait_until
from witness import Witness


def event_without(field: str) -> bytes:
    fields = json.loads(event())
    del fields[field]
    return json.dumps(fields).encode()


ORDINARY = [event(user, action) for user in ("alice", "bob") for action in ("view", "click")]
MALFORMED_EVENTS: dict[str, bytes | None] = {
    "no value": None,
    "not UTF-8": b"\xff\xfe\xfa",
    "a BOM": b"\xef\xbb\xbf" + event(),
    "not JSON": b"hello",
    "a list": b"[1, 2]",
    "null": b"null",
    "deeply nested": b"[" * 200_000,
    "a number of 6,000 digits": b"1" * 6000,
    "an encoded surrogate": event("@").replace(b"@", b"\xed\xa0\x80"),
    "no user_id": event_without("user_id"),
    **{f"user_id is {value!r}": event(user_id=value) for value in (1, ["alice"])},
    **{f"action is {value!r}": event(action=value) for value in (None, {"a": "view"})},
}
# Events with strange fields are well-formed, as long as user_id and action are strings.
STRANGE_EVENTS: dict[str, bytes] = {
    "only what is counted": b'{"user_id": "minimal", "action": "view"}',
    "other types": event(event_id=7, timestamp=1.5, amount=-3, tags=["a"], more={"b": None}),
    "a lone surrogate": event("\ud800"),
    "an emoji": event("@").replace(b"@", "🦀".encode()),
    "escape sequences": event("\x1b[2J\x1b]0;owned\x07"),
    "a raw control character": event("\x7f").replace(b"\\u007f", b"\x7f"),
    "line separators": event("@").replace(b"@", "a\u2028b\u2029c\u0085d".encode()),
    "right to left": event("@").replace(b"@", "\u202eevil\u2066".encode()),
    "900 kB": event(extra="x" * 900_000),
    "white space": b"\r\n\t " + event("spaced") + b"\r\n",
    "a field twice": event("first").replace(b"{", b'{"user_id": "zeroth", ', 1),
}
KEYS = [None, b"", b"key", b"\xff", b"\x1b[31m", b"a\rb\nc", "\u202e\u2028🦀".encode()]


def is_harmless(text: str) -> bool:
    """Return whether a terminal shows the text and does nothing else."""
    return all(character.isprintable() for character in text)


@pytest.fixture
def mixture(witness: Witness) -> list[Message]:
    """The log of a topic with all of the above, alternating with ordinary events."""
    witness.create_topic(3)
    values: list[bytes | None] = []
    for number, value in enumerate((*MALFORMED_EVENTS.values(), *STRANGE_EVENTS.values())):
        values += [ORDINARY[number % len(ORDINARY)], value]
    witness.write((i % 3, KEYS[i % len(KEYS)], value) for i, value in enumerate(values))
    log = witness.messages()
    assert len(log) == len(values)
    return log


def test_every_message_is_printed_as_one_harmless_line(
    mixture: list[Message], start: Start
) -> None:
    consumer = start("consumer.py")
    wait_until(lambda: len(consumer.lines) >= len(mixture), "all messages are printed")
    assert_clean_stop(consumer)
    assert len(consumer.lines) == len(mixture)
    assert all(is_harmless(line) for line in consumer.lines)
    by_position = {line.partition(" key=")[0]: line for line in consumer.lines}
    by_value = {}
    for message in mixture:
        line = by_position[f"partition={message.partition} offset={message.offset}"]
        by_value[message.value] = line
        for data, before, after in ((message.key, " key=", " "), (message.value, " ", "")):
            text = "null" if data is None else data.decode(errors="replace")
            if is_harmless(text) and "\ufffd" not in text:
                assert f"{before}{text}{after}" in line  # as it was sent
    for value, expected in (
        (None, " null"),
        (MALFORMED_EVENTS["not UTF-8"], r"\xff\xfe\xfa"),
        (STRANGE_EVENTS["a raw control character"], r'"user_id": "\x7f"'),
        (STRANGE_EVENTS["line separators"], r"a\u2028b\u2029c\x85d"),
        (STRANGE_EVENTS["right to left"], r"\u202eevil\u2066"),
        (STRANGE_EVENTS["an emoji"], "🦀"),
    ):
        assert expected in by_value[value]
    for key in (r"\x1b[31m", r"a\rb\nc", "null"):
        assert any(f" key={key} " in line for line in consumer.lines)


def test_well_formed_events_are_counted_and_malformed_ones_skipped(
    mixture: list[Message], start: Start
) -> None:
    processor = start("processor.py")
    wait_until(lambda: processor.snapshots, "a snapshot is printed")
    assert_clean_stop(processor)
    well_formed = [*ORDINARY, *STRANGE_EVENTS.values()]
    expected = counts_of(message for message in mixture if message.value in well_formed)
    assert processor.snapshots == [expected]
    assert all(is_harmless(line) for line in processor.lines)
    number, *_ = processor.find(reports.MALFORMED)[-1]
    assert int(number) == len(MALFORMED_EVENTS)


def test_malformed_events_are_reported_once_however_often_they_are_read(
    start: Start, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", b"hello") for number in range(9))
    processor = start("processor.py")
    wait_until(lambda: processor.find(reports.MALFORMED), "they are reported")
    consumer = start("consumer.py")
    wait_until(lambda: processor.assigned != [0, 1, 2], "the consumer has a part")
    assert_clean_stop(consumer)
    wait_until(lambda: processor.assigned == [0, 1, 2], "the processor has all partitions again")
    witness.write([(0, b"key", event_without("user_id")), (0, b"key", event())])
    wait_until(lambda: processor.snapshots[-1] == {"alice": {"view": 1}}, "an event is counted")
    assert_clean_stop(processor)
    *before, last = processor.find(reports.MALFORMED)
    assert last == ("10", "0", "3", "KeyError: 'user_id'")
    numbers = [number for number, *_ in before]
    assert "10" not in numbers  # not reported again with later snapshots
    reason = "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    assert before[numbers.index("9")][3] == reason


def test_a_flood_of_malformed_events_does_not_flood_stderr(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    values = [value for value in MALFORMED_EVENTS.values() if value is None or len(value) < 1000]
    witness.write((number % 3, b"", values[number % len(values)]) for number in range(100_000))
    started = time.monotonic()
    processor = start("processor.py")
    wait_until(lambda: processor.snapshots, "a snapshot is printed")
    seconds = time.monotonic() - started
    assert processor.stop() == 0
    assert processor.find(reports.MALFORMED)[-1][0] == "100000"
    assert len(processor.find(reports.MALFORMED)) <= 2 + seconds  # once a second


def test_what_the_terminals_encoding_lacks_is_escaped(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write([(0, "Zoë".encode(), STRANGE_EVENTS["an emoji"])])
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    consumer, processor = (
        start("consumer.py", environment=ascii_only),
        start("processor.py", "--group", "counting", environment=ascii_only),
    )
    wait_until(lambda: consumer.lines and processor.snapshots, "the event is printed and counted")
    assert_clean_stop(consumer, processor)
    assert r"key=Zo\xeb " in consumer.lines[0]
    assert r"\U0001f980" in consumer.lines[0]
    assert processor.snapshots == [{"🦀": {"view": 1}}]
    producer = start(
        *("producer.py", "--count", "1"),
        environment=ascii_only,
        patches={"writers.choose_user_ids": ["Zoë"]},
    )
    assert producer.wait() == 0
    assert r"key=Zo\xeb " in producer.lines[0]


def test_every_codec_is_read(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    for codec in ("gzip", "snappy", "lz4", "zstd"):  # in large batches
        witness.write(((i % 3, b"key", event(codec)) for i in range(20_000)), compression=codec)
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    wait_until(lambda: len(consumer.lines) >= 80_000, "all events are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    assert processor.snapshots[0] == counts_of(witness.messages())
    assert_clean_stop(consumer, processor)


def test_only_events_of_committed_transactions_are_read(start: Start, witness: Witness) -> None:
    witness.create_topic(1)

    def begin_transaction(user_id: str) -> Producer:
        producer = Producer({**witness.settings, "transactional.id": user_id})
        producer.init_transactions(TIMEOUT)
        producer.begin_transaction()
        for _ in range(10):
            producer.produce(TOPIC, event(user_id), b"key", 0)
        producer.flush(TIMEOUT)
        return producer

    begin_transaction("committed").commit_transaction(TIMEOUT)
    begin_transaction("aborted").abort_transaction(TIMEOUT)
    consumer = start("consumer.py")
    wait_until(lambda: len(consumer.lines) == 10, "the committed events are printed")
    # The log ends with the marker of a transaction's end, which is no event.
    assert start("processor.py", "--once", "--group", "after").wait() == 0
    transaction = begin_transaction("open")
    processor = start("processor.py", "--group", "during")
    counts = {"committed": {"view": 10}}
    wait_until(lambda: processor.snapshots == [counts], "it counts during a transaction as well")
    transaction.commit_transaction(TIMEOUT)
    counts |= {"open": {"view": 10}}
    wait_until(lambda: processor.snapshots[1:] == [counts], "its events are counted")
    wait_until(lambda: len(consumer.lines) == 20, "its events are printed")
    assert_clean_stop(consumer, processor)
    assert not any("aborted" in line for line in consumer.lines)


class NotUtf8(str):
    def encode(self, *_: Any) -> bytes:
        return b"\xff"


@pytest.mark.parametrize("damage", ["a byte of the batch", "a header's key is not UTF-8"])
def test_what_kafka_python_cannot_read_ends_the_readers_with_a_line(
    damage: str, start: Start, broker: Broker, witness: Witness
) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event("good"))])
    consumer, processor = start("consumer.py"), start("processor.py", "--group", "counting")
    wait_until(lambda: consumer.lines and processor.snapshots, "they are at work")
    wait_until(lambda: witness.committed() == {0: 1}, "the event is committed")
    with frozen(consumer, processor):
        time.sleep(1)  # a fetch that is waiting comes back empty
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
        assert re.match(f"{reports.UNREADABLE}", script.err.splitlines()[-1])
        assert "CorruptRecordError" in script.err
        assert "Traceback" not in script.err
    assert len(consumer.lines) == len(processor.snapshots) == 1
    assert witness.committed() == {0: 1}

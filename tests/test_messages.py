"""Messages of any content: none controls the terminal, stops a reader or spoils a count."""

import time
from pathlib import Path
from typing import Any

import pytest
import stderr_lines
from broker import Broker
from confluent_kafka import Producer
from events import MALFORMED_VALUES, counts_of, event
from kafka import KafkaProducer
from scripts import TIMEOUT, TOPIC, Start, assert_clean_stop, frozen, start_readers, wait_until
from witness import Witness

# Events with strange fields are well-formed, as long as user_id and action are strings.
STRANGE_EVENTS = [
    event("\x1b[2J\x1b]0;owned\x07"),
    event("\x7f").replace(b"\\u007f", b"\x7f"),
    event("@").replace(b"@", "🦀a\u2028b\x85\u202eevil".encode()),
    event(extra="x" * 900_000),
    b"\r\n\t " + event("spaced") + b"\r\n",
]
KEYS = [None, b"", b"key", b"\xff", b"\x1b[31m", b"a\rb\nc"]


def test_no_message_stops_a_reader_or_controls_the_terminal(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    values = [*STRANGE_EVENTS, *MALFORMED_VALUES.values(), event("ordinary")]
    witness.write((n % 3, KEYS[n % len(KEYS)], value) for n, value in enumerate(values))
    log = witness.messages()
    consumer, processor = start_readers(start)
    wait_until(lambda: len(consumer.lines) >= len(log), "all messages are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    assert_clean_stop(consumer, processor)
    assert len(consumer.lines) == len(log)
    assert all(line.isprintable() for line in consumer.lines + processor.lines)
    assert any(r'"🦀a\u2028b\x85\u202eevil"' in line for line in consumer.lines)
    malformed = MALFORMED_VALUES.values()
    assert processor.snapshots == [counts_of(m for m in log if m.value not in malformed)]
    [(number, _)] = processor.find(stderr_lines.MALFORMED)
    assert int(number) == len(malformed)


def test_what_the_terminals_encoding_lacks_is_escaped(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write([(0, "Zoë".encode(), event("@").replace(b"@", "🦀".encode()))])
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    consumer, processor = start_readers(start, environment=ascii_only)
    wait_until(lambda: consumer.lines and processor.snapshots, "the event is printed and counted")
    assert_clean_stop(consumer, processor)
    assert r"key=Zo\xeb " in consumer.lines[0]
    assert r"\U0001f980" in consumer.lines[0]
    assert processor.snapshots == [{"🦀": {"view": 1}}]
    own_user_ids = ('"alice", "dave", "carol"', '*["Zoë"] * 1000')
    arguments = ("--count", "1", "--interval", "0")
    producer = start("producer.py", *arguments, edit=own_user_ids, environment=ascii_only)
    assert producer.wait() == 0
    assert r"key=Zo\xeb " in producer.lines[0]


def test_every_codec_is_read(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    for codec in ("gzip", "snappy", "lz4", "zstd"):  # in large batches
        witness.write(((i % 3, b"key", event(codec)) for i in range(3_000)), compression=codec)
    consumer, processor = start_readers(start)
    wait_until(lambda: len(consumer.lines) >= 12_000, "all events are printed")
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


@pytest.mark.parametrize("kind", ["damaged batch", "header's key is not UTF-8", "no zstd library"])
def test_unreadable_messages_end_the_readers(
    kind: str, start: Start, broker: Broker, witness: Witness, tmp_path: Path
) -> None:
    for module in ("cramjam", "zstandard"):  # as after `pip install kafka-python`
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    without_libraries = {"PYTHONPATH": str(tmp_path)} if "library" in kind else {}
    witness.create_topic(1)
    witness.write([(0, b"key", event("good"))])
    readers = consumer, processor = start_readers(start, environment=without_libraries)
    wait_until(lambda: consumer.lines and processor.snapshots, "they are at work")
    wait_until(lambda: witness.committed() == {0: 1}, "the event is committed")
    with frozen(*readers):
        time.sleep(1)  # a fetch that is waiting comes back empty
        if "header" in kind:
            producer = KafkaProducer(bootstrap_servers=broker.address)
            producer.send(TOPIC, event("bad"), headers=[(NotUtf8("key"), b"value")]).get(TIMEOUT)
            producer.close()
        elif "library" in kind:
            witness.write([(0, b"key", event())] * 9, compression="zstd")
        else:
            witness.write([(0, b"key", event("damaged"))])
            segment = broker.folder / "data" / f"{TOPIC}-0" / f"{0:020}.log"
            with segment.open("r+b") as file:
                file.seek(segment.read_bytes().index(b"damaged"))
                file.write(b"D")
    for reader in readers:
        assert reader.wait() == 1
        [reason] = reader.find(stderr_lines.CANNOT_READ)
        assert ("zstd" if "library" in kind else "CorruptRecordError") in reason
        assert "Traceback" not in reader.err
    assert len(consumer.lines) == len(processor.snapshots) == 1
    assert witness.committed() == {0: 1}

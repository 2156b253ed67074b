"""The scripts' functions, without a broker: read this file as their specification."""

import json
import math
import re
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from broker import ROOT
from events import MALFORMED_VALUES, Message, event
from kafka import KafkaConsumer, TopicPartition, errors
from kafka.structs import MemberState
from scripts import SCRIPTS

import consumer
import processor
import producer

Capture = pytest.CaptureFixture[str]
Logs = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
READERS = (consumer, processor)
P0, P1, P2 = (TopicPartition("events", number) for number in range(3))
REFUSED = errors.KafkaConnectionError("refused")
NO_ANSWER = errors.KafkaTimeoutError("no answer")


class Clock:
    """Stands for the module `time` in a script; its time passes only while the script sleeps."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: Patch) -> Clock:
    """Give the scripts a fake clock, and undo what a test does to their global variables."""
    clock = Clock()
    for script in (producer, *READERS):
        monkeypatch.setattr(script, "time", clock)
        monkeypatch.setattr(script, "stop", False)
    return clock


@pytest.fixture
def client() -> Any:
    """A KafkaConsumer without a broker, which is assigned partition 0."""
    client = mock.create_autospec(KafkaConsumer, instance=True)

    def assign(_: Any, listener: Any = mock.Mock()) -> None:  # noqa: B008
        listener.on_partitions_assigned({P0})

    client.subscribe.side_effect = assign
    client.assignment.return_value = {P0}
    client.partitions_for_topic.return_value = {0, 1, 2}
    client.committed.return_value = None
    client.position.return_value = 0
    client.end_offsets.side_effect = lambda partitions, **_: dict.fromkeys(partitions, 0)
    client.group_metadata.return_value.state = MemberState.STABLE
    client._coordinator, client._fetcher = mock.Mock(), mock.Mock()
    return client


def run(reader: Any, client: Any, *polls: Any) -> None:
    """Run the reader's loop until poll() has returned, or raised, these results."""

    def results() -> Any:
        yield from polls
        reader.stop = True
        yield {}

    client.poll.side_effect = results()
    if reader is consumer:
        consumer.consume(client)
    else:
        processor.process(client, once=False)


def batch(partition: TopicPartition, offset: int, *values: bytes | None) -> Any:
    """Return what poll() returns for messages with these values, beginning at the offset."""
    number = partition.partition
    return {partition: [Message(number, n, b"key", v) for n, v in enumerate(values, offset)]}


# What is printed


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("Süd 🦀".encode(), "Süd 🦀"),
        (None, "null"),
        (b"", ""),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"a\r\nb\x1b[2J", r"a\r\nb\x1b[2J"),
        ("\x7f\x9b\u2028\u202e".encode(), r"\x7f\x9b\u2028\u202e"),
    ],
)
def test_printable_text_is_one_harmless_line(data: bytes | None, expected: str) -> None:
    assert consumer.printable(data) == expected


# The producer


def fake_deliveries(*user_ids: str, quiet: bool = False) -> tuple[Any, list[Any]]:
    """Return Deliveries that have sent events of these users, and the futures of all events."""
    futures: list[Any] = []

    def send(*_: Any, **__: Any) -> Any:
        futures.append(SimpleNamespace(is_done=False, exception=None))
        return futures[-1]

    deliveries = producer.Deliveries(mock.Mock(send=mock.Mock(side_effect=send)), quiet)
    for user_id in user_ids:
        deliveries.send(json.loads(event(user_id)))
    return deliveries, futures


def acknowledge(future: Any, partition: int = 0, offset: int = 0) -> None:
    future.value = SimpleNamespace(partition=partition, offset=offset)
    future.is_done = True


def test_an_event_has_the_documented_fields() -> None:
    events = [producer.random_event() for _ in range(100)]
    for sample in events:
        assert list(sample) == ["event_id", "user_id", "action", "timestamp"]
        assert str(UUID(sample["event_id"])) == sample["event_id"]
        assert datetime.fromisoformat(sample["timestamp"]).utcoffset() == timedelta(0)
    assert len({sample["event_id"] for sample in events}) == 100
    assert {sample["action"] for sample in events} == {"view", "click", "add_to_cart", "purchase"}


def test_every_event_is_pending_delivered_or_failed(capsys: Capture) -> None:
    deliveries, futures = fake_deliveries("a", "b", "c", "d")
    acknowledge(futures[3], offset=3)
    acknowledge(futures[0], offset=0)
    futures[1].is_done, futures[1].exception = True, NO_ANSWER
    deliveries.print_acknowledged()
    offsets = re.findall(r"offset=(\d)", capsys.readouterr().out)
    assert offsets == ["0", "3"]  # also those behind one that is pending
    assert (deliveries.sent, deliveries.delivered) == (4, 2)
    assert [pending.key for pending in deliveries.pending] == ["c"]
    assert deliveries.error == NO_ANSWER


def test_events_pending_for_5_s_are_reported(clock: Clock, caplog: Logs) -> None:
    deliveries, futures = fake_deliveries("a", "b")

    def reports_after(seconds: float) -> int:
        clock.now += seconds
        deliveries.print_acknowledged()
        return len(caplog.messages)

    assert [reports_after(seconds) for seconds in (4.9, 0.2, 4.8, 0.3)] == [0, 1, 1, 2]
    assert caplog.messages[0] == "2 events are not acknowledged yet"
    deliveries.send(json.loads(event()))
    for future in futures[:2]:
        acknowledge(future)
    assert reports_after(4.9) == 2  # the third has not been pending for long


@pytest.mark.parametrize(("interval", "number"), [(0.001, 3000), (0.0125, 500), (0.2, 150)])
def test_the_pace_is_the_one_asked_for(interval: float, number: int, clock: Clock) -> None:
    times: list[float] = []
    deliveries: Any = mock.Mock(sent=0, delivered=0, pending=[], error=None)

    def send(_: Any) -> None:
        times.append(clock.now)
        if len(times) == 100:  # Ctrl-Z and fg, or a blocked pipe
            clock.now += 30
        producer.stop = len(times) == number

    deliveries.send = send
    producer.produce(deliveries, math.inf, interval)
    assert times[99] - times[0] == pytest.approx(99 * interval, abs=0.01)
    at_once = [time for time in times[100:] if time < times[100] + 0.005]
    assert 1 / interval - 1 <= len(at_once) <= 1 / interval + 1  # the events of a second
    later = times[100 + len(at_once) :]
    assert later[-1] - later[0] == pytest.approx((len(later) - 1) * interval, abs=0.01)


@pytest.mark.parametrize(("count", "expected"), [(5, 5), (math.inf, 10_000)])
def test_pending_events_are_bounded_and_a_failure_ends_the_run(count: float, expected: int) -> None:
    deliveries, futures = fake_deliveries(quiet=True)
    print_acknowledged = deliveries.print_acknowledged

    def fail_at_first_report() -> None:
        futures[0].is_done, futures[0].exception = True, NO_ANSWER
        print_acknowledged()

    deliveries.print_acknowledged = fail_at_first_report
    producer.produce(deliveries, count, 0)
    assert deliveries.sent == expected
    assert deliveries.error == NO_ANSWER


# The consumer


def test_events_are_printed_then_flushed_then_committed(client: Any, monkeypatch: Patch) -> None:
    order = mock.Mock(**{"write.side_effect": len})
    order.attach_mock(client.commit, "commit")
    monkeypatch.setattr("sys.stdout", order)
    run(consumer, client, batch(P0, 0, b"a", b"b"), {}, {})
    calls = [name for name, *_ in order.mock_calls]
    assert calls.count("commit") == 1  # none for an empty poll()
    assert "write" in calls[: calls.index("commit")]
    assert "write" not in calls[calls.index("flush") :]
    assert calls.index("flush") < calls.index("commit")

    consumer.stop, order.flush.side_effect = False, OSError("No space left on device")
    with pytest.raises(OSError, match="No space"):
        run(consumer, client, batch(P0, 2, b"c"))
    assert client.commit.call_count == 1


def test_a_commit_includes_one_that_failed(client: Any, capsys: Capture, caplog: Logs) -> None:
    client.commit.side_effect = [errors.CommitFailedError("removed"), None]
    run(consumer, client, batch(P0, 0, b"a"), {}, batch(P0, 1, b"b"), {})
    assert client.commit.mock_calls == [mock.call(timeout_ms=mock.ANY)] * 2  # of all positions
    assert not client.seek.called
    assert [line[-1] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
    why = "CommitFailedError: removed"
    assert f"cannot commit ({why}); the last events may be printed again" in caplog.messages


# Recovery, in both readers


@pytest.mark.parametrize("error", [REFUSED, errors.UnknownBrokerIdError(2)], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_errors_rewind_a_reader(reader: Any, error: Exception, client: Any, caplog: Logs) -> None:
    client.committed.return_value = 3
    run(reader, client, batch(P0, 0, b"a", b"b", b"c"), error, {})
    assert client.seek.call_args == mock.call(P0, 3)  # committed by the one, counted by the other
    assert f"cannot read events ({error}); retrying" in caplog.messages


def test_the_consumer_rewinds_until_that_succeeds(client: Any, clock: Clock, caplog: Logs) -> None:
    client.committed.side_effect = [NO_ANSWER, NO_ANSWER, None]
    start = clock.now
    run(consumer, client, REFUSED, {})
    assert client.seek.mock_calls == [mock.call(P0, 0)]  # nothing is committed: to the beginning
    assert clock.now - start == 6
    look_up = f"cannot look up committed offsets ({NO_ANSWER}); retrying"
    assert caplog.messages[:3] == [f"cannot read events ({REFUSED}); retrying", look_up, look_up]


def test_a_consumer_does_nothing_before_the_rewind(client: Any, capsys: Capture) -> None:
    """A poll() takes events and raises, and Ctrl-C comes while the rewind fails."""

    def committed(*_: Any, **__: Any) -> int:
        consumer.stop = True
        raise NO_ANSWER

    client.committed.side_effect = committed
    client.commit.side_effect = NO_ANSWER
    run(consumer, client, batch(P0, 0, b"a"), REFUSED)
    assert client.commit.call_count == 1  # not again, with positions past events not printed
    assert capsys.readouterr().out == "partition=0 offset=0 key=key a\n"


def test_a_processor_prints_nothing_before_the_rewind(client: Any, capsys: Capture) -> None:
    """A poll() takes the three events of the log and raises, when Ctrl-C has come."""

    def poll(**_: Any) -> Any:
        client.position.return_value = 3
        processor.stop = True
        raise REFUSED

    client.poll.side_effect = poll
    client.seek.side_effect = lambda _, offset: client.position.configure_mock(return_value=offset)
    client.end_offsets.side_effect = lambda *_, **__: {P0: 3}
    processor.process(client, once=False)
    assert capsys.readouterr().out == ""  # {} would be a wrong snapshot


def test_a_processor_prints_nothing_without_an_end_offset(client: Any, capsys: Capture) -> None:
    client.end_offsets.side_effect = NO_ANSWER
    run(processor, client, batch(P0, 0, event()))
    assert capsys.readouterr().out == ""


# The processor


def assigned_counts(client: Any, *partitions: TopicPartition) -> processor.Counts:
    counts = processor.Counts(client)
    counts.on_partitions_assigned({*partitions})
    return counts


@pytest.mark.parametrize("value", MALFORMED_VALUES.values(), ids=MALFORMED_VALUES.keys())
def test_a_malformed_event_is_skipped_and_counted_as_such(value: bytes | None, client: Any) -> None:
    counts = assigned_counts(client, P0)
    counts.add(batch(P0, 7, event("alice"), value, event("alice")))
    state = counts.partitions[P0]
    assert state.actions == {("alice", "view"): 2}
    assert (state.malformed, state.next_offset) == (1, 10)
    assert state.malformed_example.startswith("partition=0 offset=8: ")
    assert state.malformed_example.isprintable()


def test_any_exception_makes_an_event_malformed(client: Any, monkeypatch: Patch) -> None:
    mistake = mock.Mock(side_effect=[ZeroDivisionError("of a user's own"), ("alice", "view")])
    monkeypatch.setattr(processor, "user_and_action", mistake)
    counts = assigned_counts(client, P0)
    counts.add(batch(P0, 0, event(), event()))
    state = counts.partitions[P0]
    assert (state.actions, state.malformed, state.next_offset) == ({("alice", "view"): 1}, 1, 2)


def test_a_partition_is_counted_from_its_beginning_at_each_assignment(client: Any) -> None:
    counts = assigned_counts(client, P0, P1)
    client.seek.assert_has_calls([mock.call(P0, 0), mock.call(P1, 0)], any_order=True)
    counts.add(batch(P0, 0, event("alice")) | batch(P1, 0, event("bob")))
    counts.on_partitions_revoked({P1, P2})
    assert json.loads(counts.as_json()) == {"alice": {"view": 1}}
    counts.on_partitions_assigned({P0})  # revoked and assigned again inside one poll()
    assert counts.as_json() == "{}"
    assert client.seek.call_args == mock.call(P0, 0)


def test_json_is_indented_sorted_and_harmless(client: Any) -> None:
    counts = assigned_counts(client, P0, P1)
    users = ["Süd", "\x9b2J", "\x7f", "\u202e", "a\nb", "bob", "🦀"]
    counts.add(batch(P1, 0, *(event(user) for user in users)))
    counts.add(batch(P0, 0, event("bob", "click"), event("bob")))
    text = counts.as_json()
    expected = {user: {"view": 1} for user in users} | {"bob": {"click": 1, "view": 2}}
    assert json.loads(text) == expected
    assert [*json.loads(text)] == sorted(users)
    assert '  "bob": {\n    "click": 1,\n    "view": 2\n  }' in text
    assert text.isascii()
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_line_below_a_snapshot_says_what_it_counts(client: Any) -> None:
    counts = assigned_counts(client)
    assert counts.scope() == "assigned partitions of events: none yet"
    counts.on_partitions_assigned({P1})
    part = "assigned partitions of events: 1; other members have the rest (--group NAME counts all)"
    assert counts.scope() == part
    counts.on_partitions_assigned({P2})
    counts.on_partitions_assigned({P0})
    assert counts.scope() == "assigned partitions of events: 0, 1, 2"
    counts.add(batch(P2, 24, b"{}", b"[]") | batch(P0, 3, event(1), event()))
    malformed = counts.scope().partition("; malformed events skipped: ")[2]
    assert malformed.startswith("3, for example partition=2 offset=25: TypeError: ")
    counts.on_partitions_revoked({P2})
    reason = "TypeError: the fields that are counted must be strings"
    assert counts.scope().endswith(f"1, for example partition=0 offset=3: {reason}")


@pytest.fixture
def shown(monkeypatch: Patch) -> list[Any]:
    """The snapshots and the lines below them, in the order in which they appear."""
    shown: list[Any] = []

    def show(snapshot: str, **_: Any) -> None:
        shown.append(json.loads(snapshot))

    monkeypatch.setattr(processor, "print", show, raising=False)
    monkeypatch.setattr("logging.info", shown.append)
    return shown


def test_the_first_snapshot_is_complete(client: Any, shown: list[Any], clock: Clock) -> None:
    counts, report = processor.Counts(client), processor.Report()
    report.print_if_due(counts)
    assert shown == ["assigned partitions of events: none yet"]
    counts.on_partitions_assigned({P0, P1})
    # The log of partition 0 grows under a producer that the processor cannot outrun. The first
    # events of partition 1 are deleted: until their end is looked up, there is no position.
    ends, positions = {P0: 40, P1: 5}, {P0: 0, P1: None}
    client.end_offsets.side_effect = lambda partitions, **_: {p: ends[p] for p in partitions}
    client.position.side_effect = lambda partition, **_: positions[partition]
    for offset in range(60):
        clock.now += 1
        report.print_if_due(counts)
        counts.add(batch(P0, offset, event()))
        ends[P0] += 10
        positions[P0] = offset + 1
    assert not any(isinstance(what, dict) for what in shown)
    assert shown[1:3] == [f"catching up: {number} offsets to go" for number in (45, 44)]
    positions[P1] = 5
    report.print_if_due(counts, last=True)
    assert shown[-2] == {"alice": {"view": 60}}
    assert shown[-1].startswith("assigned partitions of events: 0, 1; ")


def test_later_snapshots_come_once_a_second(client: Any, shown: list[Any], clock: Clock) -> None:
    counts, report = assigned_counts(client, P0), processor.Report()
    for offset in range(25):
        counts.add(batch(P0, offset, event()))
        report.print_if_due(counts)
        clock.now += 0.1
    snapshots = [what for what in shown if isinstance(what, dict)]
    assert snapshots == [{"alice": {"view": number}} for number in (1, 11, 21)]
    for _ in range(9):  # nothing changes but for the last events
        clock.now += 1
        report.print_if_due(counts)
    assert len(shown) == 8
    counts.add(batch(P0, 25, b"malformed"))
    clock.now += 1
    report.print_if_due(counts)
    assert "malformed events skipped: 1" in shown[8]  # what is counted has changed


@pytest.mark.parametrize("outage", [False, True])
def test_the_last_snapshot_counts_the_events_read_last(
    outage: bool, client: Any, shown: list[Any]
) -> None:
    """The second event is counted, its snapshot is not due yet, and Ctrl-C comes."""

    def polls() -> Any:
        yield batch(P0, 0, event())
        processor.stop = not outage
        yield batch(P0, 1, event())
        processor.stop = True
        raise REFUSED

    client.poll.side_effect = polls()
    processor.process(client, once=False)
    assert shown[0::2] == [{"alice": {"view": 1}}, {"alice": {"view": 2}}]


# The command line and the environment


def test_an_event_a_second_is_sent_by_default(monkeypatch: Patch) -> None:
    produce = mock.Mock()
    for name, value in (("connect", mock.Mock()), ("produce", produce), ("signal", mock.Mock())):
        monkeypatch.setattr(producer, name, value)
    monkeypatch.setattr("sys.argv", ["producer.py"])
    monkeypatch.setattr("sys.stdout", None)  # so that main()'s own is gone after the test
    with pytest.raises(SystemExit):
        producer.main()
    assert produce.call_args.args[1:] == (math.inf, 1)


@pytest.mark.parametrize("option", ["--count", "--interval"])
@pytest.mark.parametrize("value", ["many", "-1", "nan", "inf"])
def test_bad_numbers_are_usage_errors(option: str, value: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr("sys.argv", ["producer.py", option, value])
    monkeypatch.setattr(producer, "connect", mock.Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit) as end:
        producer.main()
    assert end.value.code == 2


@pytest.mark.parametrize("script", [producer, *READERS])
@pytest.mark.parametrize(
    ("server", "settings"),
    [
        ("localhost:abc", {}),
        ("localhost", {"sasl_plain_pasword": "secret"}),
        ("localhost", {"client_id": "secret"}),  # which the scripts set themselves
        ("localhost", {"client_dns_lookup": "secret"}),
    ],
)
def test_malformed_settings_are_reported(
    server: str, settings: dict[str, str], script: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(script, "BOOTSTRAP_SERVERS", server)
    monkeypatch.setattr(script, "CLIENT_SETTINGS", settings)
    with pytest.raises(SystemExit) as end:
        script.connect() if script is producer else script.connect("group")
    line = str(end.value.code)
    assert line.startswith(f"--- cannot connect to {server} (")
    assert line.endswith("compose up -d or python tests/broker.py, or check address and login")
    assert "secret" not in line


def test_what_the_scripts_share_is_the_same_in_each() -> None:
    texts = {name: (ROOT / name).read_text().replace(f'client_id="{name}"', "") for name in SCRIPTS}
    for names, first_line, end in (
        (SCRIPTS, "BOOTSTRAP_SERVERS", r"TOPIC = [^\n]*\n"),
        (SCRIPTS, "stop = ", r"\n"),
        (SCRIPTS, r"    except \(errors.KafkaError, TypeError", r"\n\n"),
        (SCRIPTS, "def request_stop", r"\ndef main"),
        (SCRIPTS, "    logging.basicConfig", r"but for failed connections\n"),
        (SCRIPTS, "    # Under python -u", r"(?=    \w+ = connect)"),
        (SCRIPTS[1:], "def close_socket", r"\n\n\n"),
        (SCRIPTS[1:], "Batches = ", r"auto_offset_reset"),
        (SCRIPTS[1:], "            isolation_level", r"CLIENT_SETTINGS"),
        (SCRIPTS, "            reconnect_backoff_ms", r"CLIENT_SETTINGS"),
        (SCRIPTS[1:], "def poll", r"\n\n\n"),
        (SCRIPTS[1:], "    for signum in", r"    try:"),
        (SCRIPTS[1:], "    except OSError", r"\n\n\n"),
    ):
        block = re.compile(rf"^{first_line}.*?{end}", re.MULTILINE | re.DOTALL)
        copies = [block.findall(texts[name]) for name in names]
        assert len(copies[0]) == 1, first_line
        assert len({copy[0] for copy in copies}) == 1, first_line

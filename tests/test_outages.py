"""Outages, slow lines and long round trips: the scripts wait, report it briefly, and continue."""

import functools
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Broker, free_port
from conftest import RESTARTED_BROKER
from events import counts_of, event, event_lines
from proxy import PRODUCE, Proxy
from scripts import (
    SCRIPTS,
    TIMEOUT,
    Start,
    assert_few_plain_lines,
    patched,
    printed_lines,
    wait_until,
)
from witness import Witness, evenly_assigned

UNREACHABLE = re.compile(r"^--- no connection to (\S+) \(.+\); retrying$", re.MULTILINE)
CONNECTED = re.compile(r"^--- connected to (\S+)$", re.MULTILINE)


@pytest.fixture(params=["directly", "through a proxy"])
def outage_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Broker, str]]:
    """Yield a broker to stop and start, and the address that the clients use."""
    broker = Broker(tmp_path / "broker", environment=RESTARTED_BROKER)
    address = broker.address
    if request.param == "through a proxy":
        address = Proxy(free_port(), broker.port).address
        broker.environment["KAFKA_ADVERTISED_LISTENERS"] = f"PLAINTEXT://{address}"
    with broker:
        yield broker, address


def test_all_scripts_survive_an_outage_of_the_broker(
    start: Start, outage_broker: tuple[Broker, str]
) -> None:
    broker, address = outage_broker
    crash = address == broker.address
    witness = Witness(address)
    producer = start("producer.py", "--interval", "0.01", address=address)
    consumers = [start("consumer.py", address=address) for _ in range(2)]
    processor = start("processor.py", "--group", "counting", address=address)
    scripts = [producer, *consumers, processor]
    wait_until(evenly_assigned(witness, 2), "the consumers share the partitions")
    wait_until(lambda: all(script.lines for script in scripts), "all are running")
    # A crash that lasts longer than a member's session, 10 s; or a short, clean stop.
    (broker.kill if crash else broker.stop)()
    time.sleep(12 if crash else 3)
    before = [len(script.lines) for script in scripts]
    broker.start()
    for script, lines in zip(scripts, before, strict=True):
        wait_until(lambda: len(script.lines) > lines, f"{script.command[1]} works again", 15)
    assert producer.stop() == 0
    messages = witness.messages()
    expected = counts_of(messages)
    wait_until(lambda: len({*printed_lines(*consumers)}) >= len(messages), "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == expected, "all events are counted")
    for script in (*consumers, processor):
        assert script.stop() == 0
    assert producer.err.splitlines()[-1] == f"--- {len(messages)} delivered, 0 failed"
    assert printed_lines(producer) == event_lines(messages)  # each is exactly once in the log
    assert {*printed_lines(*consumers)} == {*printed_lines(producer)}
    for script in scripts:
        assert_few_plain_lines(script)
        # The broker is named once when it becomes unreachable, and once when it is back.
        assert UNREACHABLE.findall(script.err) == CONNECTED.findall(script.err) == [address]


def test_ctrl_c_stops_all_scripts_during_an_outage(start: Start, tmp_path: Path) -> None:
    fail_while = tmp_path / "calls fail"
    broker = Broker(tmp_path / "broker", environment=RESTARTED_BROKER)
    environment = {"FAIL_WHILE": str(fail_while)}
    run = functools.partial(start, address=broker.address, environment=environment)
    with broker:
        producer = run("producer.py", "--interval", "0.01")
        consumer = run(command=patched("failing_calls", "consumer.py"))
        processor = run(command=patched("failing_calls", "processor.py", "--group", "counting"))
        scripts = [producer, consumer, processor]
        wait_until(lambda: consumer.lines and processor.snapshots, "all are running")
    for script in scripts:
        wait_until(lambda: UNREACHABLE.search(script.err), "it has noticed")
    fail_while.touch()
    wait_until(lambda: fail_while.stat().st_size > 10, "both readers have tried")
    for script in scripts:
        script.process.send_signal(signal.SIGINT)
    for script in scripts:
        # Within about 10 s, whatever the broker does; a busy machine may need some more.
        assert script.wait(15) == (1 if script is producer else 0)
        assert_few_plain_lines(script)
    assert re.search(r"^--- waiting up to 9 s for \d+ more acknowledgements$", producer.err, re.M)
    total = rf"--- {len(producer.lines)} delivered, [1-9]\d* failed"
    assert re.fullmatch(total, producer.err.splitlines()[-1])


@pytest.mark.xdist_group("proxy")
def test_producer_reports_once_that_nothing_is_acknowledged(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create_topic(3)
    acknowledges = threading.Event()
    proxy.lets_pass = lambda api_key: api_key != PRODUCE or acknowledges.wait()
    producer = start("producer.py", "--interval", "0.2", address=proxy.address)
    report = re.compile(
        r"^--- oldest event unacknowledged for 5 s; (\d+) events pending$", re.MULTILINE
    )
    wait_until(lambda: report.search(producer.err), "it reports that nothing is acknowledged")
    assert 10 < int(report.findall(producer.err)[0]) < 40
    time.sleep(6)  # long enough for a second report
    assert not producer.lines
    acknowledges.set()
    wait_until(lambda: len(producer.lines) > 50, "it continues")
    assert len(report.findall(producer.err)) == 1
    acknowledges.clear()
    wait_until(lambda: len(report.findall(producer.err)) == 2, "it reports that again")
    acknowledges.set()
    sent = len(producer.lines)
    wait_until(lambda: len(producer.lines) > sent, "it continues once more")
    assert producer.stop() == 0
    assert "connect" not in producer.err
    assert printed_lines(producer) == event_lines(witness.messages())


@pytest.mark.xdist_group("proxy")
def test_a_slow_line_delivers_all_events(start: Start, proxy: Proxy) -> None:
    """As on a line of 200 kB/s: a fetch must arrive within request_timeout_ms."""
    witness = Witness(proxy.address)
    witness.create_topic(30)
    value = event(extra="x" * 10_000)
    witness.write((i % 30, b"key", value) for i in range(1_500))  # 15 MB
    proxy.rate = 2_000_000  # ten times as fast, for a timeout of 3 s instead of 30
    consumer = start(
        command=patched("request_timeout_ms=3000", "consumer.py"), address=proxy.address
    )
    wait_until(lambda: len(consumer.lines) == 1_500, "all events are printed")
    wait_until(lambda: sum(witness.committed().values()) == 1_500, "all are committed")
    assert consumer.stop() == 0


@pytest.mark.xdist_group("proxy")
def test_long_round_trips_do_no_harm(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create_topic(3)
    witness.write((i % 3, b"key", event()) for i in range(300))
    proxy.delay = 1.5
    consumer = start("consumer.py", address=proxy.address)
    processor = start("processor.py", "--once", "--group", "counting", address=proxy.address)
    producer = start("producer.py", "--count", "5", "--interval", "0", address=proxy.address)
    assert producer.wait(2 * TIMEOUT) == 0
    assert processor.wait(2 * TIMEOUT) == 0
    assert processor.snapshots[0]["alice"]["view"] >= 300
    wait_until(lambda: len(consumer.lines) == 305, "all events are printed", 2 * TIMEOUT)
    proxy.delay = 0
    wait_until(lambda: sum(witness.committed().values()) == 305, "all are committed")
    assert consumer.stop() == 0
    for script in (producer, processor, consumer):
        assert "retrying" not in script.err
        assert_few_plain_lines(script)


def test_all_scripts_try_to_connect_every_second(start: Start) -> None:
    """So that they work again within about two seconds of the broker's return."""
    attempts: dict[str, list[float]] = {script: [] for script in SCRIPTS}

    def note_attempts(listener: socket.socket, moments: list[float]) -> None:
        while True:
            connection, _ = listener.accept()
            moments.append(time.monotonic())
            connection.close()

    for script, moments in attempts.items():
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=note_attempts, args=(listener, moments), daemon=True).start()
        start(script, address=f"127.0.0.1:{listener.getsockname()[1]}")
    for moments in attempts.values():
        # In 10 s there are at least 12; if the back-off grows to 30 s, the default, at most 9.
        wait_until(lambda: len(moments) >= 10, "it has tried often enough", timeout=20)

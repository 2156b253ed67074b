"""Outages, errors and slow networks: the scripts wait, then continue, and lose nothing."""

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
from broker import Broker
from broker_settings import FAST_RETURN
from events import counts_of, event, event_lines
from proxy import Proxy, add_proxy
from scripts import (
    SCRIPTS,
    TIMEOUT,
    Start,
    assert_clean_stop,
    assert_plain_stderr,
    printed_lines,
    wait_until,
)
from witness import Witness


@pytest.fixture(params=["directly", "through a proxy"])
def broker_and_address(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Broker, str]]:
    """A broker to stop and start, and the address at which the scripts connect to it."""
    broker = Broker(tmp_path / "broker", environment=FAST_RETURN)
    proxy = add_proxy(broker)
    with broker:
        yield broker, broker.address if request.param == "directly" else proxy.address


def test_all_scripts_continue_after_an_outage(
    start: Start, broker_and_address: tuple[Broker, str]
) -> None:
    broker, address = broker_and_address
    witness = Witness(address)
    producer = start("producer.py", "--interval", "0.01", address=address)
    consumers = [start("consumer.py", address=address) for _ in range(2)]
    processor = start("processor.py", "--group", "counting", address=address)
    scripts = [producer, *consumers, processor]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    wait_until(lambda: all(script.lines for script in scripts), "all are at work")
    if address == broker.address:
        broker.kill()
        time.sleep(12)  # longer than the 10 s of a member's session
    else:
        broker.stop()
        time.sleep(3)
    before = [len(script.lines) for script in scripts]
    broker.start()
    for script, lines in zip(scripts, before, strict=True):
        wait_until(lambda: len(script.lines) > lines, f"{script.command[1]} is at work again", 15)
    assert_clean_stop(producer)
    log = witness.messages()
    expected = counts_of(log)
    wait_until(lambda: len({*printed_lines(*consumers)}) >= len(log), "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == expected, "all events are counted")
    assert_clean_stop(*consumers, processor)
    assert producer.find(reports.DELIVERED) == [(str(len(log)), "0")]
    assert printed_lines(producer) == event_lines(log)  # each is in the log exactly once
    assert {*printed_lines(*consumers)} == {*printed_lines(producer)}
    for script in scripts:
        assert [lost for lost, _ in script.find(reports.NO_CONNECTION)] == [address]
        assert script.find(reports.CONNECTED) == [address]


def test_ctrl_c_during_an_outage(start: Start, tmp_path: Path) -> None:
    failing = tmp_path / "polls fail while this file exists"
    patches = {"readers.fail_while_exists": str(failing)}
    broker = Broker(tmp_path / "broker", environment=FAST_RETURN)
    with broker:
        address = broker.address
        producer = start("producer.py", "--interval", "0.01", address=address)
        consumer = start("consumer.py", address=address, patches=patches)
        processor = start("processor.py", "--group", "counting", address=address, patches=patches)
        wait_until(lambda: consumer.lines and processor.snapshots, "all are at work")
    scripts = [producer, consumer, processor]
    for script in scripts:
        wait_until(lambda: script.find(reports.NO_CONNECTION), "it notices the outage")
    failing.touch()
    wait_until(lambda: failing.stat().st_size > 10, "polls have failed")
    for script in scripts:
        script.process.send_signal(signal.SIGINT)
    for script in scripts:
        # About 10 s whatever the broker does, and some more on a busy machine.
        assert script.wait(15) == (1 if script is producer else 0)
        assert_plain_stderr(script)
    assert producer.find(reports.WAITING)
    [(delivered, failed)] = producer.find(reports.DELIVERED)
    assert int(delivered) == len(producer.lines)
    assert int(failed) > 0


def test_all_scripts_try_to_reconnect_every_second(start: Start) -> None:
    """So that they work again within about two seconds of the broker's return."""

    def note_attempts(listener: socket.socket, attempts: list[socket.socket]) -> None:
        while True:
            connection, _ = listener.accept()
            connection.close()
            attempts.append(connection)

    attempts_of_all: list[list[socket.socket]] = [[], [], []]
    for name, attempts in zip(SCRIPTS, attempts_of_all, strict=True):
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=note_attempts, args=(listener, attempts), daemon=True).start()
        start(name, address=f"127.0.0.1:{listener.getsockname()[1]}")
    for attempts in attempts_of_all:
        # In 10 s there are at least 12; with kafka-python's default, a back-off of 30 s, at most 9.
        wait_until(lambda: len(attempts) >= 10, "it has tried often enough", 20)


def test_an_unresponsive_broker_is_reported_and_another_one_used(
    start: Start, broker: Broker
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unresponsive:
        port = unresponsive.getsockname()[1]
        address = f"127.0.0.1:{port}"
        producer = start(
            "producer.py",
            address=f"{address},{broker.address}",
            patches={"clients.connect_first_to": port},
        )
        wait_until(lambda: producer.lines, "it sends its events to the other one")
        assert_clean_stop(producer)
    [(reported_address, reason)] = producer.find(reports.NO_CONNECTION)
    assert reported_address == address
    assert "RequestTimedOutError" in reason


def test_a_poll_that_raises_loses_no_event(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event(f"user {number % 9}")) for number in range(40_000))
    log = witness.messages()
    patches = {"readers.fail_polls": [1, 3]}
    consumer = start("consumer.py", patches=patches)
    processor = start("processor.py", "--group", "counting", patches=patches)
    wait_until(lambda: len(consumer.lines) >= len(log), "all events are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    assert_clean_stop(consumer, processor)
    for script in (consumer, processor):
        assert not script.find(reports.POLL_FAILED)  # a single failure is not reported
    assert printed_lines(consumer) == event_lines(log)
    assert processor.snapshots[0] == counts_of(log)


def test_a_narrow_bandwidth_delays_events_but_stops_no_consumer(
    start: Start, witness: Witness, proxy: Proxy
) -> None:
    """Here 2 MB/s and 3 s for a response, standing for 200 kB/s and request_timeout_ms of 30 s."""
    witness.create_topic(30)
    value = event(extra="x" * 10_000)
    witness.write((i % 30, b"key", value) for i in range(1_500))  # 15 MB
    proxy.bytes_per_second = 2_000_000
    hurry = {"clients.divide_timeouts": {"request_timeout_ms": 10}}
    consumer = start("consumer.py", address=proxy.address, patches=hurry)
    wait_until(lambda: len(consumer.lines) == 1_500, "all events are printed")
    wait_until(lambda: sum(witness.committed().values()) == 1_500, "all are committed")
    assert_clean_stop(consumer)


def test_a_long_delay_to_the_broker_does_no_harm(
    start: Start, witness: Witness, proxy: Proxy
) -> None:
    witness.create_topic(3)
    witness.write((i % 3, b"key", event()) for i in range(300))
    proxy.delay = 1.5
    address = proxy.address
    consumer = start("consumer.py", address=address)
    processor = start("processor.py", "--once", "--group", "counting", address=address)
    producer = start("producer.py", "--count", "5", "--interval", "0", address=address)
    for script in (producer, processor):
        assert script.wait(2 * TIMEOUT) == 0
    assert processor.snapshots[0]["alice"]["view"] >= 300
    wait_until(lambda: len(consumer.lines) == 305, "all events are printed", 2 * TIMEOUT)
    proxy.delay = 0
    wait_until(lambda: sum(witness.committed().values()) == 305, "all are committed")
    assert_clean_stop(consumer)
    assert_plain_stderr(producer, processor)
    assert not re.search("retrying", producer.err + processor.err + consumer.err)

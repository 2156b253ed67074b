"""Outages: the scripts wait, then continue, and lose nothing."""

import signal
import time

import pytest
import stderr_lines
from broker import Broker
from events import counts_of, event, event_lines
from proxy import Proxy
from scripts import Start, assert_clean_stop, printed_lines, start_readers, wait_until
from witness import Witness

# As after a change of leaders, when kafka-python knows the new one by its number only.
UNKNOWN_ONCE = """    send, due = consumer._client._manager.send, [errors.UnknownBrokerIdError(1)]
    def send_or_raise(request, *arguments, **options):
        if due and type(request).__name__ == "FetchRequest":
            raise due.pop()
        return send(request, *arguments, **options)
    consumer._client._manager.send = send_or_raise
    for signum in"""


@pytest.mark.parametrize("way", ["directly", "through a proxy"])  # the latter as with Docker
def test_all_continue_after_an_outage(
    way: str, start: Start, broker: Broker, witness: Witness, proxy: Proxy
) -> None:
    address = broker.address if way == "directly" else proxy.address
    producer = start("producer.py", "--interval", "0.01", address=address)
    consumers = [start("consumer.py", address=address) for _ in range(2)]
    processor = start("processor.py", "--group", "counting", address=address)
    scripts = [producer, *consumers, processor]
    wait_until(lambda: all(script.lines for script in scripts), "all are at work")
    start_of_outage = time.monotonic()
    if address == broker.address:
        broker.kill()
        time.sleep(14)  # longer than the 10 s of a member's session
    else:
        broker.stop()
        time.sleep(3)
    broker.start()
    for script in scripts:
        lines = len(script.lines)
        # Within about 5 s; with kafka-python's default, a back-off of up to 30 s, 10 s or more.
        wait_until(lambda: len(script.lines) > lines, f"{script.command[1]} is at work again", 9)
    seconds = time.monotonic() - start_of_outage
    for script in scripts:
        failed = script.find(stderr_lines.CONNECTION_FAILED)
        # A line or two for each attempt: after 1 s, 2 s, then every 4 s, each 20 % more or less.
        assert 1 <= len(failed) <= 2 * (3 + seconds / 3.2)
    assert_clean_stop(producer)
    log = witness.messages()
    expected = counts_of(log)
    wait_until(lambda: len({*printed_lines(*consumers)}) >= len(log), "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == expected, "all events are counted")
    assert_clean_stop(*consumers, processor)
    assert producer.find(stderr_lines.DELIVERED) == [(str(len(log)), "0")]
    assert sorted(producer.lines) == event_lines(log)  # each is in the log exactly once
    assert {*printed_lines(*consumers)} == {*producer.lines}


def test_failed_connections_leave_no_sockets_open(start: Start, broker: Broker) -> None:
    readers = start_readers(start, edit=("_backoff_max_ms=4_000", "_backoff_max_ms=50"))
    wait_until(lambda: all(reader.assigned for reader in readers), "they are connected")
    most = max(reader.processes()[0].num_fds() for reader in readers) + 4
    broker.kill()
    for number in range(10, 100, 10):
        for reader in readers:
            wait_until(lambda: len(reader.find(stderr_lines.CONNECTION_FAILED)) >= number, "again")
            assert reader.processes()[0].num_fds() <= most
    broker.start()


def test_an_unknown_leader_is_asked_again(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())])
    readers = start_readers(start, edit=("    for signum in", UNKNOWN_ONCE))
    wait_until(lambda: all(reader.lines for reader in readers), "they read the event")
    assert all(r.find(stderr_lines.RETRYING) == ["UnknownBrokerIdError: 1"] for r in readers)
    assert_clean_stop(*readers)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "frozen"])
def test_ctrl_c_during_an_outage(signum: int, start: Start, broker: Broker) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumer, processor = start_readers(start)
    scripts = [producer, consumer, processor]
    wait_until(lambda: consumer.lines and processor.snapshots, "all are at work")
    assert broker.process is not None
    broker.process.send_signal(signum)
    time.sleep(2)  # so that they notice
    for script in scripts:
        script.process.send_signal(signal.SIGINT)
    for script in scripts:
        # About 10 s whatever the broker does, and some more on a busy machine.
        assert script.wait(15) == (1 if script is producer else 0)
        assert "Traceback" not in script.err
    broker.kill()
    broker.start()
    [(delivered, failed)] = producer.find(stderr_lines.DELIVERED)
    assert int(delivered) == len(producer.lines)
    assert int(failed) > 0

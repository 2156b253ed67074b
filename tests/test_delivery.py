"""The producer: each event is in the log exactly once, and each is accounted for."""

import json
import random
import signal
import time

import stderr_lines
from broker import Broker
from events import event_lines
from proxy import PRODUCE, Proxy
from scripts import Start, frozen, printed_lines, send_events, wait_until
from witness import Witness

from producer import USER_IDS


def test_a_users_events_are_in_one_partition_in_order(start: Start, witness: Witness) -> None:
    send_events(start, 500)
    log = witness.messages()
    events = [json.loads(message.value or b"") for message in log]
    assert [message.key for message in log] == [event["user_id"].encode() for event in events]
    partitions = {message.key: message.partition for message in log}
    # As Kafka's default partitioner, murmur2, has them.
    assert [partitions[user_id.encode()] for user_id in USER_IDS] == [0, 1, 2, 0, 1, 2]
    for user_id in partitions:
        times = [event["timestamp"] for event in events if event["user_id"].encode() == user_id]
        assert times == sorted(times)


def test_an_interrupted_producer_accounts_for_every_event(start: Start, witness: Witness) -> None:
    producers = []
    for interval, signum in (("0", signal.SIGINT), ("0", signal.SIGTERM), ("0.01", signal.SIGINT)):
        producer = start("producer.py", "--interval", interval)
        wait_until(lambda: producer.lines, "it is at work")
        time.sleep(random.uniform(0, 0.5))  # so that the interrupt comes at any moment
        assert producer.stop(signum) == 0
        assert producer.find(stderr_lines.DELIVERED) == [(str(len(producer.lines)), "0")]
        producers.append(producer)
    assert printed_lines(*producers) == event_lines(witness.messages())


def test_an_event_that_is_not_acknowledged_in_time_has_failed(start: Start, broker: Broker) -> None:
    sooner = ("delivery_timeout_ms=120_000", "delivery_timeout_ms=3_000, request_timeout_ms=2_000")
    producer = start("producer.py", "--interval", "0.01", edit=sooner)
    wait_until(lambda: len(producer.lines) > 20, "it is at work")
    with frozen(broker):
        assert producer.wait(40) == 1
    [reason] = producer.find(stderr_lines.STOPPED)
    assert reason.startswith("KafkaTimeoutError")
    [(delivered, failed)] = producer.find(stderr_lines.DELIVERED)
    assert int(delivered) == len(producer.lines)
    assert int(failed) > 0


def test_a_resent_event_is_written_once(start: Start, witness: Witness, proxy: Proxy) -> None:
    witness.create_topic(3)
    losses = iter(range(3))
    proxy.pass_response = lambda api_key: api_key != PRODUCE or next(losses, None) is None
    producer = send_events(start, 20, address=proxy.address)
    assert next(losses, None) is None  # all three were lost
    log = witness.messages()
    assert len(log) == 20
    assert printed_lines(producer) == event_lines(log)


def test_an_exception_in_random_event_is_seen(start: Start, witness: Witness) -> None:
    function = "def random_event() -> dict[str, Any]:\n"
    # Of all exceptions, that of a closed pipe is the one which the script handles elsewhere.
    fails = "    if next(calls, 1):\n        raise BrokenPipeError('mine')\n"  # at the 501st call
    edit = function, f"calls = iter([0] * 500)\n\n\n{function}{fails}"
    producer = start("producer.py", "--interval", "0", edit=edit)
    assert producer.wait() == 1
    account, traceback, *_, reason = producer.err.splitlines()
    assert account == "--- 500 delivered, 0 failed"
    assert (traceback[:9], reason) == ("Traceback", "BrokenPipeError: mine")
    assert printed_lines(producer) == event_lines(witness.messages())

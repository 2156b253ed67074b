"""The producer: each event is in the log exactly once, and each is accounted for."""

import itertools
import json
import random
import signal
import threading
import time
import uuid
from datetime import datetime, timedelta

import reports
from broker import Broker
from confluent_kafka import Producer
from events import event_lines
from proxy import PRODUCE, Proxy
from scripts import (
    TIMEOUT,
    TOPIC,
    Start,
    assert_clean_stop,
    assert_plain_stderr,
    frozen,
    printed_lines,
    send_events,
    wait_until,
)
from witness import Witness

FIRST_USER_IDS = ("sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234")


def test_an_event_has_the_documented_fields(start: Start, witness: Witness) -> None:
    send_events(start, 100)
    events = [json.loads(message.value or b"") for message in witness.messages()]
    for event in events:
        assert list(event) == ["event_id", "user_id", "action", "timestamp"]
        assert str(uuid.UUID(event["event_id"])) == event["event_id"]
        assert datetime.fromisoformat(event["timestamp"]).utcoffset() == timedelta(0)
    assert len({event["event_id"] for event in events}) == len(events) == 100
    assert {event["action"] for event in events} == {"view", "click", "add_to_cart", "purchase"}


def test_a_users_events_are_in_one_partition_in_order(start: Start, witness: Witness) -> None:
    send_events(start, 500)
    log = witness.messages()
    events = [json.loads(message.value or b"") for message in log]
    assert [message.key for message in log] == [event["user_id"].encode() for event in events]
    partitions = {message.key: message.partition for message in log}
    assert len(partitions) == 6
    assert [partitions[user_id.encode()] for user_id in FIRST_USER_IDS] == [0, 1, 2]
    for user_id in partitions:
        times = [event["timestamp"] for event in events if event["user_id"].encode() == user_id]
        assert times == sorted(times)
    # Kafka's default partitioner, in another client, chooses the same partitions.
    client = Producer({**witness.settings, "partitioner": "murmur2_random"})
    for key in partitions:
        client.produce(TOPIC, b"{}", key)
    assert client.flush(TIMEOUT) == 0
    assert {(m.key, m.partition) for m in witness.messages()} == {*partitions.items()}


def test_the_producer_keeps_its_interval(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--count", "12", "--interval", "0.2")
    assert producer.wait() == 0
    times = sorted(json.loads(m.value or b"")["timestamp"] for m in witness.messages())
    moments = [datetime.fromisoformat(time).timestamp() for time in times]
    intervals = sorted(later - earlier for earlier, later in itertools.pairwise(moments))
    assert intervals[0] >= 0.19
    assert intervals[len(intervals) // 2] < 0.4  # the median: a busy machine is late sometimes


def test_an_event_is_printed_as_soon_as_it_is_acknowledged(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "3600")
    wait_until(lambda: producer.lines, "the first event is printed, long before the second is due")
    assert printed_lines(producer) == event_lines(witness.messages())
    assert_clean_stop(producer)
    assert producer.err == "--- 1 delivered, 0 failed\n"


def test_an_interrupted_producer_accounts_for_every_event(start: Start, witness: Witness) -> None:
    dice = random.Random(4)
    producers = []
    for interval in ("0", "0", "0.01"):
        producer = start("producer.py", "--interval", interval)
        wait_until(lambda: producer.lines, "it is at work")
        time.sleep(dice.uniform(0, 0.5))  # so that the interrupt comes at any moment
        assert producer.stop(dice.choice([signal.SIGINT, signal.SIGTERM])) == 0
        assert producer.find(reports.DELIVERED) == [(str(len(producer.lines)), "0")]
        producers.append(producer)
    assert printed_lines(*producers) == event_lines(witness.messages())


def test_a_send_that_raises_is_accounted_for(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0", patches={"writers.fail_send": 50})
    assert producer.wait() == 1
    assert_plain_stderr(producer)
    assert producer.find(reports.DELIVERED) == [("49", "1")]
    [reason] = producer.find(reports.DELIVERY_FAILED)
    assert reason.startswith("Partitioner did not assign a partition")
    assert printed_lines(producer) == event_lines(witness.messages())


def test_an_event_that_is_not_acknowledged_in_time_has_failed(start: Start, broker: Broker) -> None:
    hurry = {"delivery_timeout_ms": 40, "request_timeout_ms": 15}  # 3 s and 2 s
    producer = start(
        "producer.py", "--interval", "0.01", patches={"clients.divide_timeouts": hurry}
    )
    wait_until(lambda: len(producer.lines) > 20, "it is at work")
    with frozen(broker):
        assert producer.wait(40) == 1
    assert_plain_stderr(producer)
    [reason] = producer.find(reports.DELIVERY_FAILED)
    assert reason.startswith("KafkaTimeoutError")
    [(delivered, failed)] = producer.find(reports.DELIVERED)
    assert int(delivered) == len(producer.lines)
    assert int(failed) > 0


def test_an_event_whose_acknowledgement_is_lost_is_written_once(
    start: Start, witness: Witness, proxy: Proxy
) -> None:
    witness.create_topic(3)
    losses = iter(range(3))
    proxy.pass_response = lambda api_key: api_key != PRODUCE or next(losses, None) is None
    producer = send_events(start, 20, address=proxy.address)
    assert next(losses, None) is None  # all three were lost
    log = witness.messages()
    assert len(log) == 20
    assert printed_lines(producer) == event_lines(log)


def test_overdue_acknowledgements_are_reported_once(
    start: Start, witness: Witness, proxy: Proxy
) -> None:
    witness.create_topic(3)
    acknowledge = threading.Event()
    proxy.pass_response = lambda api_key: api_key != PRODUCE or acknowledge.wait()
    producer = start("producer.py", "--interval", "0.2", address=proxy.address)
    [pending] = wait_until(lambda: producer.find(reports.OVERDUE), "it reports pending events")
    assert 10 < int(pending) < 40
    time.sleep(6)  # it would report them again after another 5 s
    assert producer.find(reports.OVERDUE) == [pending]
    assert not producer.lines
    acknowledge.set()
    wait_until(lambda: len(producer.lines) > 50, "it continues")
    assert len(producer.find(reports.OVERDUE)) == 1
    acknowledge.clear()
    wait_until(
        lambda: len(producer.find(reports.OVERDUE)) == 2, "the next outage is reported as well"
    )
    acknowledge.set()
    sent = len(producer.lines)
    wait_until(lambda: len(producer.lines) > sent, "it continues again")
    assert_clean_stop(producer)
    assert "connect" not in producer.err
    assert printed_lines(producer) == event_lines(witness.messages())

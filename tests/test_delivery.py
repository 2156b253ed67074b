"""No event is lost: each is exactly once in the log, and delivered to consumers at least once."""

import contextlib
import os
import random
import re
import shlex
import signal
import sys
import time
from collections import Counter

import pytest
from broker import ROOT, Broker
from events import counts_of, event, event_lines
from kafka import KafkaProducer
from proxy import PRODUCE, Proxy
from scripts import (
    Pipe,
    Start,
    assert_few_plain_lines,
    frozen,
    patched,
    printed_lines,
    python,
    send_events,
    wait_until,
)
from witness import Witness, evenly_assigned

# Run a command with a non-blocking pipe as stdout, as some parents (ssh, node) leave it.
NON_BLOCKING = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK), 1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_restarted_consumer_neither_repeats_nor_skips_events(
    start: Start, witness: Witness
) -> None:
    """It commits what it has printed, and nothing more."""
    producers, consumers = [], []
    for _ in range(2):
        producers.append(send_events(start, 300))
        ends = {message.partition: message.offset + 1 for message in witness.messages()}
        consumers.append(start("consumer.py"))
        wait_until(
            lambda: len(printed_lines(*consumers)) >= 300 * len(producers),
            "the new events are printed",
        )
        wait_until(lambda: witness.committed() == ends, "they are committed")
        producers.append(send_events(start, 300))
        wait_until(
            lambda: len(printed_lines(*consumers)) >= 300 * len(producers), "and those that follow"
        )
        assert consumers[-1].stop() == 0
    assert printed_lines(*consumers) == printed_lines(*producers)


def test_consumers_that_join_and_leave_print_each_event_once(
    start: Start, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.01")
    consumers = [start("consumer.py")]
    for _ in range(3):
        seen = len(printed_lines(*consumers))
        wait_until(lambda: len(printed_lines(*consumers)) > seen + 50, "events are printed")
        consumers.append(start("consumer.py"))
        wait_until(lambda: consumers[-1].lines, "the new one prints some")
        assert consumers[-2].stop() == 0
    assert producer.stop() == 0
    wait_until(
        lambda: len(printed_lines(*consumers)) >= len(producer.lines), "all events are printed"
    )
    assert consumers[-1].stop() == 0
    assert printed_lines(*consumers) == printed_lines(producer)


def test_no_event_is_lost_when_a_consumer_is_killed(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    killed, survivor = start("consumer.py"), start("consumer.py")
    wait_until(evenly_assigned(witness, 2), "both are assigned partitions")
    wait_until(lambda: len(killed.lines) > 50 and len(survivor.lines) > 50, "both print events")
    killed.stop(signal.SIGKILL)
    committed = witness.committed()
    wait_until(evenly_assigned(witness, 1), "the survivor is assigned all partitions", timeout=20)
    assert producer.stop() == 0
    messages = witness.messages()
    everything = {*event_lines(messages)}
    # The last line of the killed one may be cut off; it is not among the complete lines.
    wait_until(lambda: {*killed.lines, *survivor.lines} == everything, "nothing is missing")
    assert survivor.stop() == 0
    assert Counter(survivor.lines).most_common(1)[0][1] == 1
    done = event_lines(m for m in messages if m.offset < committed.get(m.partition, 0))
    assert not {*done} & {*killed.lines} & {*survivor.lines}


def test_no_event_is_lost_when_poll_raises(start: Start, witness: Witness) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"key", event(f"user {number % 9}")) for number in range(40_000))
    messages = witness.messages()
    consumer = start(command=patched("losing_polls", "consumer.py"))
    processor = start(command=patched("losing_polls", "processor.py", "--group", "counting"))
    wait_until(lambda: len(consumer.lines) >= len(messages), "all events are printed")
    wait_until(lambda: processor.snapshots, "all events are counted")
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "poll failed" not in script.err  # an error that passes is not reported
        assert_few_plain_lines(script)
    assert printed_lines(consumer) == event_lines(messages)
    assert processor.snapshots[0] == counts_of(messages)


def test_an_interrupted_producer_accounts_for_every_event(start: Start, witness: Witness) -> None:
    dice = random.Random(4)
    runs = []
    for interval in ("0", "0", "0.01"):
        producer = start("producer.py", "--interval", interval)
        wait_until(lambda: producer.lines, "it is running")
        time.sleep(dice.uniform(0, 0.5))
        assert producer.stop(dice.choice([signal.SIGINT, signal.SIGTERM])) == 0
        assert producer.err.splitlines()[-1] == f"--- {len(producer.lines)} delivered, 0 failed"
        runs.append(producer)
    assert printed_lines(*runs) == event_lines(witness.messages())


def test_events_that_are_not_acknowledged_in_time_have_failed(start: Start, broker: Broker) -> None:
    producer = start(
        command=patched(
            "delivery_timeout_ms=3000 request_timeout_ms=2000", "producer.py", "--interval", "0.01"
        )
    )
    wait_until(lambda: len(producer.lines) > 20, "it is running")
    with frozen(broker):
        assert producer.wait(40) == 1
    assert_few_plain_lines(producer)
    assert "delivery failed: KafkaTimeoutError" in producer.err
    total = rf"--- {len(producer.lines)} delivered, [1-9]\d* failed"
    assert re.fullmatch(total, producer.err.splitlines()[-1])


def test_help_names_the_delivery_timeout(start: Start) -> None:
    script = start("producer.py", "--help", address="nowhere:1")
    assert script.wait() == 0
    assert "not acknowledged within 120 s" in script.out
    assert KafkaProducer.DEFAULT_CONFIG["delivery_timeout_ms"] == 120_000
    assert "delivery_timeout_ms" not in (ROOT / "producer.py").read_text()


def test_an_event_that_cannot_be_sent_has_failed(start: Start, witness: Witness) -> None:
    producer = start(command=patched("failing_send", "producer.py", "--interval", "0"))
    assert producer.wait() == 1
    assert_few_plain_lines(producer)
    assert producer.err.splitlines()[-1] == "--- 49 delivered, 1 failed"
    assert "delivery failed: Partitioner did not assign a partition" in producer.err
    assert printed_lines(producer) == event_lines(witness.messages())


def test_consumer_has_not_committed_what_is_stuck_in_its_output(
    start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create_topic(1)
    # 7 kB: one poll() for the consumer and, because Python buffers 8 kB, one write().
    witness.write([(0, b"key", event())] * 60)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe.end, b"\n" * 4096)
    os.read(pipe.end, 4096)  # the pipe was full; now there is room for half of the events
    consumer = start(command=pipe.as_stdout_of(python("consumer.py")))
    wait_until(pipe.is_full, "the pipe is full again")
    committed = witness.committed().get(0, 0)
    assert consumer.stop(signal.SIGKILL) == -signal.SIGKILL
    *in_pipe, _ = pipe.read().decode().lstrip("\n").split("\n")
    assert 0 < len(in_pipe) < 60
    assert committed <= len(in_pipe)
    successor = start("consumer.py")
    everything = {*event_lines(witness.messages())}
    wait_until(lambda: {*in_pipe, *successor.lines} == everything, "nothing is lost")
    assert successor.stop() == 0


def test_a_lost_commit_is_repeated(start: Start, witness: Witness) -> None:
    witness.create_topic(1)
    witness.write([(0, b"key", event())] * 60)
    consumer = start(command=patched("lost_commits", "consumer.py"))
    wait_until(lambda: len(consumer.lines) == 60, "all events are printed")
    wait_until(
        lambda: witness.committed() == {0: 60}, "they are committed, although no others arrive"
    )
    assert consumer.stop() == 0
    assert len(consumer.lines) == 60
    assert_few_plain_lines(consumer)


@pytest.mark.xdist_group("proxy")
def test_an_event_whose_acknowledgement_is_lost_is_written_once(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create_topic(3)
    to_lose = [1, 2, 3]
    proxy.lets_pass = lambda api_key: api_key != PRODUCE or not (to_lose and to_lose.pop())
    producer = send_events(start, 20, address=proxy.address)
    assert not to_lose
    assert len(witness.messages()) == 20
    assert printed_lines(producer) == event_lines(witness.messages())


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left")]
)
def test_what_cannot_be_printed_is_not_committed(
    redirection: str, reason: str, start: Start, witness: Witness
) -> None:
    send_events(start, 9)
    for name in ("consumer.py", "processor.py"):
        script = start(command=["bash", "-c", f"{shlex.join(python(name))} {redirection}"])
        assert script.wait() != 0
        assert reason in script.err
    assert witness.committed() == {}


def test_no_line_is_lost_in_a_full_pipe(start: Start, witness: Witness, pipe: Pipe) -> None:
    send_events(start, 5000)
    consumer = start(
        command=[sys.executable, "-c", NON_BLOCKING, pipe.path, *python("consumer.py")],
        environment={"PYTHONUNBUFFERED": "1"},  # usual in containers; sys.stdout would drop lines
    )
    wait_until(pipe.is_full, "the pipe is full")
    wait_until(lambda: len(pipe.read().splitlines()) == 5000, "all is printed")
    wait_until(lambda: sum(witness.committed().values()) == 5000, "all is committed")
    assert consumer.stop() == 0
    assert sorted(pipe.read().decode().splitlines()) == event_lines(witness.messages())

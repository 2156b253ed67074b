"""Promises that are seldom seen broken: each test constructs the moment that would break one."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from broker import Broker, free_port
from conftest import CHEAP
from harness import (
    PATIENCE,
    Pipe,
    Proxy,
    Start,
    Witness,
    add,
    assert_plain,
    count,
    event,
    frozen,
    line,
    patched,
    produce,
    python,
    settled,
    shown,
    until,
)

pytestmark = pytest.mark.xdist_group("proxied")  # one worker, and so one broker

# API keys: Kafka's numbers for the kinds of request.
PRODUCE, SYNC_GROUP = 0, 14

SLOW_POLL = """
import time
from kafka import KafkaConsumer
poll = KafkaConsumer.poll
KafkaConsumer.poll = lambda self, **_: time.sleep(0.05) or poll(self, 100, max_records=100)
"""
# A commit that does not reach Kafka, three times.
LOST_COMMITS = """
from kafka import KafkaConsumer, errors
to_lose, commit = [1, 2, 3], KafkaConsumer.commit
def losing_commit(self, **settings):
    if to_lose and to_lose.pop():
        raise errors.KafkaTimeoutError
    return commit(self, **settings)
KafkaConsumer.commit = losing_commit
"""
# Ctrl-C when poll() has just taken the last event.
CTRL_C = """
import os, signal
from kafka import KafkaConsumer
poll = KafkaConsumer.poll
def last_poll(self, **settings):
    polled = poll(self, **settings)
    if any(b"last" in message.value for messages in polled.values() for message in messages):
        os.kill(os.getpid(), signal.SIGINT)
    return polled
KafkaConsumer.poll = last_poll
"""
# To look up where a log begins takes two seconds.
SLOW_RESET = """
from kafka.consumer.fetcher import Fetcher
reset = Fetcher._reset_offsets_for_node
async def slow_reset(self, *arguments):
    await self._manager._net.sleep(2)
    await reset(self, *arguments)
Fetcher._reset_offsets_for_node = slow_reset
"""
# As under a producer that one cannot outrun: whenever one looks, the log has grown.
GROWING = """
from kafka import KafkaConsumer
end_offsets, looks = KafkaConsumer.end_offsets, []
def growing(self, partitions, **settings):
    looks.extend(partitions)
    ends = end_offsets(self, partitions, **settings)
    return {p: ends[p] + 1000 * (looks.count(p) - 1) for p in ends}
KafkaConsumer.end_offsets = growing
"""
# For the script itself, not for kafka-python, the clock stands still.
NO_TIME = """
import sys, time
clock = time.monotonic
time.monotonic = lambda: sys._getframe(1).f_globals["__name__"] != "__main__" and clock()
"""


@pytest.fixture(scope="module")
def proxied_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The way, and the only one, to a broker that creates no topics by itself."""
    broker = Broker(tmp_path_factory.mktemp("broker"), environment=CHEAP)
    proxy = Proxy(free_port(), broker.port)
    broker.environment["KAFKA_ADVERTISED_LISTENERS"] = f"PLAINTEXT://{proxy.address}"
    broker.environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] = "false"
    with broker:
        yield proxy


@pytest.fixture
def proxy(proxied_broker: Proxy) -> Proxy:
    """The same, to a broker on which neither the topic nor a group exists."""
    proxied_broker.reset()
    Witness(proxied_broker.address).clean()
    return proxied_broker


def test_a_consumer_held_up_in_its_output_has_committed_no_more_than_is_there(
    start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create(1)
    # 7 kB: for the consumer one poll() and, as Python buffers 8 kB, one write().
    witness.write([(0, b"key", event())] * 60)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe.end, b"\n" * 4096)
    os.read(pipe.end, 4096)  # the pipe was full; now there is room for half of the events
    consumer = start(command=pipe.fed_by(python("consumer.py")))
    until(pipe.is_full, "the pipe is full again")
    committed = witness.committed().get(0, 0)
    assert consumer.stop(signal.SIGKILL) == -signal.SIGKILL
    *in_pipe, _ = pipe.read().decode().lstrip("\n").split("\n")
    assert 0 < len(in_pipe) < 60
    assert committed <= len(in_pipe)
    successor = start("consumer.py")
    everything = {line(message) for message in witness.log()}
    until(lambda: {*in_pipe, *successor.lines} == everything, "nothing is lost")
    assert successor.stop() == 0


def test_a_commit_that_gets_lost_is_made_up_for(start: Start, witness: Witness) -> None:
    witness.create(1)
    witness.write([(0, b"key", event())] * 60)
    consumer = start(command=patched(LOST_COMMITS, "consumer.py"))
    until(lambda: len(consumer.lines) == 60, "all events are shown")
    until(lambda: witness.committed() == {0: 60}, "they are committed, though no others come")
    assert consumer.stop() == 0
    assert len(consumer.lines) == 60
    assert_plain(consumer)


def test_an_event_whose_confirmation_gets_lost_is_written_once(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create(3)
    to_lose = [1, 2, 3]
    proxy.answers = lambda api_key: api_key != PRODUCE or not (to_lose and to_lose.pop())
    producer = produce(start, 20, address=proxy.address)
    assert not to_lose
    log = witness.log()
    assert len(log) == 20
    assert shown(producer) == sorted(map(line, log))


def test_the_first_counts_wait_for_no_more_than_the_events(start: Start, witness: Witness) -> None:
    witness.create(1)
    witness.write([(0, b"key", event())])
    processor = start(command=patched(NO_TIME, "processor.py"))
    until(lambda: processor.snapshots == [{"alice": {"view": 1}}], "the counts are shown")


def test_the_first_counts_do_not_wait_for_a_log_that_grows(start: Start, witness: Witness) -> None:
    witness.create(1)
    witness.write([(0, b"key", event())] * 300)
    processor = start(command=patched(SLOW_POLL + GROWING, "processor.py"))
    until(lambda: processor.snapshots == [{"alice": {"view": 300}}], "the counts are shown")


def test_the_last_counts_hold_what_was_read_last(start: Start, witness: Witness) -> None:
    witness.create(1)
    witness.write([(0, b"key", event("first"))])
    processor = start(command=patched(CTRL_C, "processor.py"))
    until(lambda: processor.snapshots, "counts are shown")
    witness.write([(0, b"key", event("last"))])
    assert processor.wait() == 0
    assert processor.snapshots[1:] == [{"first": {"view": 1}, "last": {"view": 1}}]


def test_the_first_counts_hold_what_is_left_of_a_log(start: Start, witness: Witness) -> None:
    witness.create(1)
    witness.write([(0, b"key", event("gone"))] * 10)
    witness.delete_before({0: 10})
    witness.write([(0, b"key", event("left"))] * 5)
    processor = start(command=patched(SLOW_RESET, "processor.py"))
    until(lambda: processor.snapshots, "counts are shown")
    assert processor.snapshots[0] == {"left": {"view": 5}}


@pytest.mark.parametrize("script", ["consumer.py", "processor.py"])
def test_a_join_that_outlasts_a_poll_is_completed(script: str, start: Start, proxy: Proxy) -> None:
    def answers(api_key: int) -> bool:
        if api_key == SYNC_GROUP:  # the last step of a join; poll() has long returned by then
            time.sleep(2)
        return True

    witness = Witness(proxy.address)
    reader = start(script, address=proxy.address)
    until(lambda: witness.members() == [[]], "it is the group's leader, with no topic yet")
    proxy.answers = answers
    witness.create(3)
    witness.write([(2, b"key", event())])
    until(lambda: reader.lines, "it has got its partitions", timeout=30)
    assert reader.stop() == 0


def test_every_snapshot_is_whole_while_members_come_and_go(start: Start, witness: Witness) -> None:
    witness.create(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(7500))
    everything = count(witness.log())
    # A partition takes it longer than the second that it lets pass between two snapshots.
    slow = patched(SLOW_POLL, "processor.py")
    first = start(command=slow)
    until(lambda: first.snapshots, "the first counts")
    assert first.snapshots[0] == everything
    assert re.search(r"^--- [\d,]+ events still to read$", first.err, re.MULTILINE)
    second = start(command=slow)
    until(lambda: second.snapshots, "the second counts its share")
    until(
        lambda: add(first.snapshots[-1], second.snapshots[-1]) == everything,
        "the first counts the rest",
    )
    consumer = start("consumer.py")
    until(settled(witness, 3), "the consumer gets its share")
    assert first.stop() == 0
    until(settled(witness, 2), "the others share what the first had")
    assert consumer.stop() == 0
    until(lambda: second.snapshots[-1] == everything, "the second counts everything")
    assert second.stop() == 0
    for snapshot in (*first.snapshots, *second.snapshots):
        assert snapshot == {user: everything[user] for user in snapshot}  # each partition has one


def test_a_frozen_processor_shows_no_counts_before_it_has_caught_up(
    start: Start, witness: Witness
) -> None:
    witness.create(1)
    witness.write([(0, b"key", event())] * 100)
    processor = start(command=patched(SLOW_POLL, "processor.py"))
    until(lambda: processor.snapshots, "it counts")
    with frozen(processor):
        until(lambda: witness.members() == [], "the group has given it up")
        # To read them takes it longer than the second that it lets pass between two snapshots.
        witness.write([(0, b"key", event())] * 11_900)
    until(lambda: processor.snapshots[-1]["alice"]["view"] == 12_000, "it has caught up")
    assert processor.stop() == 0
    # It goes on for up to a second before it learns that it is out of the group.
    counted = [snapshot["alice"]["view"] for snapshot in processor.snapshots]
    assert not [number for number in counted if 6_000 < number < 12_000]


# A tenth of the 30 s in which an answer has to come, for a line that is ten times as fast.
TENTH = """
from kafka import KafkaConsumer
KafkaConsumer.DEFAULT_CONFIG["request_timeout_ms"] = 3_000
"""


def test_a_slow_line_brings_all_events(start: Start, proxy: Proxy) -> None:
    """As one of 200 kB/s: what comes in one fetch must have arrived within request_timeout_ms."""
    witness = Witness(proxy.address)
    witness.create(30)
    value = event(extra="x" * 10_000)
    witness.write((i % 30, b"key", value) for i in range(1_500))  # of 15 MB
    proxy.rate = 2_000_000
    consumer = start(command=patched(TENTH, "consumer.py"), address=proxy.address)
    until(lambda: len(consumer.lines) == 1_500, "all events are shown")
    until(lambda: sum(witness.committed().values()) == 1_500, "all are committed")
    assert consumer.stop() == 0


def test_a_long_way_takes_longer_and_does_no_harm(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create(3)
    witness.write((i % 3, b"key", event()) for i in range(300))
    proxy.delay = 1.5
    consumer = start("consumer.py", address=proxy.address)
    processor = start("processor.py", "--once", "--group", "counting", address=proxy.address)
    producer = start("producer.py", "--count", "5", "--interval", "0", address=proxy.address)
    assert producer.wait(2 * PATIENCE) == 0
    assert processor.wait(2 * PATIENCE) == 0
    assert processor.snapshots[0]["alice"]["view"] >= 300
    until(lambda: len(consumer.lines) == 305, "all events are shown", 2 * PATIENCE)
    proxy.delay = 0
    until(lambda: sum(witness.committed().values()) == 305, "all are committed")
    assert consumer.stop() == 0
    for script in (producer, processor, consumer):
        assert "trying again" not in script.err
        assert_plain(script)


def test_while_nothing_is_confirmed_the_producer_says_so_once(start: Start, proxy: Proxy) -> None:
    witness = Witness(proxy.address)
    witness.create(3)
    confirms = threading.Event()
    proxy.answers = lambda api_key: api_key != PRODUCE or confirms.wait()
    producer = start("producer.py", "--interval", "0.2", address=proxy.address)
    said = re.compile(r"^--- nothing confirmed for 5 s; (\d+) events wait$", re.MULTILINE)
    until(lambda: said.search(producer.err), "it says that nothing is confirmed")
    assert 10 < int(said.findall(producer.err)[0]) < 40
    time.sleep(6)  # in which it would say so again
    assert not producer.lines
    confirms.set()
    until(lambda: len(producer.lines) > 50, "it goes on")
    assert len(said.findall(producer.err)) == 1
    confirms.clear()
    until(lambda: len(said.findall(producer.err)) == 2, "it says so anew")
    confirms.set()
    sent = len(producer.lines)
    until(lambda: len(producer.lines) > sent, "it goes on again")
    assert producer.stop() == 0
    assert "connect" not in producer.err
    assert shown(producer) == sorted(map(line, witness.log()))

"""Three brokers, each partition on all of them: the loss of one is no loss of Kafka."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Cluster, free_port
from conftest import QUICK_RETURN
from harness import (
    Start,
    Witness,
    add,
    assert_plain,
    count,
    event,
    failing,
    frozen,
    line,
    patched,
    settled,
    shown,
    until,
)

pytestmark = pytest.mark.xdist_group("cluster")  # one worker, and so one cluster

# A broker that is slow, on a busy machine, is not dead yet.
ENVIRONMENT = QUICK_RETURN | {"KAFKA_BROKER_SESSION_TIMEOUT_MS": "4000"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    with Cluster(tmp_path_factory.mktemp("brokers"), ports, ENVIRONMENT) as cluster:
        yield cluster


@pytest.fixture
def broker(cluster: Cluster) -> Cluster:
    """The brokers, on which neither topic nor group exists."""
    Witness(cluster.address).clean()
    return cluster


def test_each_of_three_brokers_is_killed_in_turn(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.05")
    until(lambda: producer.lines, "the topic is there")
    assert witness.copies() == [3, 3, 3]
    consumers = [start("consumer.py") for _ in range(2)]
    processor = start("processor.py", "--group", "counting")
    scripts = [producer, *consumers, processor]
    until(settled(witness, 2), "the consumers share the partitions")
    until(lambda: processor.snapshots, "the processor is connected to all three")
    for broker in cluster.brokers:
        broker.kill()
        before = [len(script.lines) for script in scripts]
        for script, lines in zip(scripts, before, strict=True):
            until(lambda: len(script.lines) > lines + 5, f"{script.command[1]} goes on")
        broker.start()
        until(lambda: witness.copies(in_sync=True) == [3, 3, 3], "the cluster is whole again")
    assert producer.stop() == 0
    log = witness.log()
    until(lambda: {*shown(*consumers)} >= {*producer.lines}, "all events are shown")
    until(lambda: processor.snapshots[-1] == count(log), "all events are counted")
    for script in scripts[1:]:
        assert script.stop() == 0
    assert producer.err.splitlines()[-1] == f"--- {len(log)} delivered, 0 failed"
    assert shown(producer) == sorted(map(line, log))  # each confirmed event is there, once
    for script in scripts:
        assert_plain(script)
        for broker in cluster.brokers:
            # By its own address: once when it is gone, and once when it is back.
            told = rf"^--- (no connection|connected) to {broker.address} "
            said = re.findall(told, script.err, re.MULTILINE)
            assert said == (["no connection", "connected"] * len(said))[: len(said)]
    for script in (producer, processor):  # connected to all three, which lead a partition each
        assert all(f"--- no connection to {b.address} (" in script.err for b in cluster.brokers)


def test_a_partition_without_a_leader_is_waited_for(
    start: Start, cluster: Cluster, witness: Witness, tmp_path: Path
) -> None:
    sign = tmp_path / "poll() raises"
    witness.create(3)  # one copy of each partition, so each broker has one
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    everything = count(witness.log())
    cluster.brokers[2].kill()
    consumer = start("consumer.py")
    processor = start(command=patched(failing(sign), "processor.py", "--group", "counting"))
    until(lambda: len(consumer.lines) == 20, "what has a leader is shown")
    living = {int(text[len("partition=")]) for text in consumer.lines}
    until(lambda: "cannot go on (" in processor.err, "it says that it cannot go on")
    cluster.brokers[2].start()
    until(lambda: processor.snapshots, "it counts when the leader is back")
    assert processor.snapshots[0] == everything
    until(lambda: len(consumer.lines) == 30, "the rest is shown")

    # What is counted already stays so when the leader goes, also after an error.
    cluster.brokers[2].kill()
    sign.touch()
    until(lambda: sign.stat().st_size > 0, "a poll() has raised")
    sign.unlink()
    witness.write((partition, b"key", event(f"user {partition}")) for partition in living)
    added = {f"user {partition}": {"view": 1} for partition in living}
    until(lambda: processor.snapshots[-1] == add(everything, added), "it counts the others' events")
    cluster.brokers[2].start()
    for script in (consumer, processor):
        assert script.stop() == 0
        assert_plain(script)


# Has the script try this address first, of those that it is given, and then any.
FIRST = """
import random
choice, first = random.choice, [{port}]
def choose(values):
    port = first.pop() if first and hasattr(values[0], "port") else None
    return next((value for value in values if port and value.port == port), choice(values))
random.choice = choose
"""


def test_one_address_of_three_is_silent(start: Start, cluster: Cluster, witness: Witness) -> None:
    """As where a host is down. It is tried first, and then one of the others."""
    producer = start("producer.py", "--count", "1")
    assert producer.wait() == 0  # the topic is there, each partition on all three
    silent = cluster.brokers[1]
    with frozen(silent):
        others = ",".join(b.address for b in cluster.brokers if b is not silent)
        # A new witness each time: one that knows all three may ask the silent one.
        until(lambda: Witness(others).copies(in_sync=True) == [2, 2, 2], "the others have noticed")
        first = FIRST.format(port=silent.port)
        producer = start(command=patched(first, "producer.py"))
        said = rf"--- no connection to {silent.address} \(.*RequestTimedOutError.*\); trying again"
        until(lambda: re.match(said, producer.err), "it names the one that is silent")
        until(lambda: producer.lines, "it sends by way of another")
        assert producer.stop() == 0
    until(lambda: witness.copies(in_sync=True) == [3, 3, 3], "the cluster is whole again")


# Gives up on a request after three seconds instead of half a minute.
HASTY = """
from kafka import KafkaProducer
KafkaProducer.DEFAULT_CONFIG.update(request_timeout_ms=3_000)
"""


def test_two_of_three_are_dead(start: Start, cluster: Cluster, witness: Witness) -> None:
    producer = start(command=patched(HASTY, "producer.py", "--interval", "0.1"))
    until(lambda: len({line.split()[0] for line in producer.lines}) == 3, "it knows all three")
    living, *dead = cluster.brokers
    for broker in dead:
        broker.kill()
    until(lambda: "nothing confirmed for 5 s; " in producer.err, "it says that it cannot go on")
    time.sleep(8)  # in which requests to the one that lives time out
    for broker in dead:
        broker.start()
    lines = len(producer.lines)
    until(lambda: len(producer.lines) > lines, "it goes on when they are back")
    until(lambda: witness.copies(in_sync=True) == [3, 3, 3], "the cluster is whole again")
    assert producer.stop() == 0
    assert shown(producer) == sorted(map(line, witness.log()))
    assert producer.err.count("nothing confirmed") == 1
    gone = re.findall(r"^--- no connection to (\S+) ", producer.err, re.MULTILINE)
    assert {*gone} == {broker.address for broker in dead}
    assert living.address not in producer.err
    assert_plain(producer)

"""Three brokers, a replica of each partition on all of them: nothing depends on a single one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
from broker import Cluster, free_port
from broker_settings import FAST_RETURN
from events import counts_of, event, event_lines, sum_of_counts
from scripts import Script, Start, assert_clean_stop, printed_lines, wait_until
from witness import Witness

# A broker that is slow, as the machine is busy, is not to be declared dead.
SETTINGS = FAST_RETURN | {"KAFKA_BROKER_SESSION_TIMEOUT_MS": "4000"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    with Cluster(tmp_path_factory.mktemp("brokers"), ports, SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def broker(cluster: Cluster) -> Cluster:
    """The three brokers, without topics and groups, instead of a single one."""
    Witness(cluster.address).delete_everything()
    return cluster


def has_printed_partitions(script: Script, number: int) -> bool:
    """Return whether the script has printed events of this many partitions."""
    return len({line.partition(" ")[0] for line in script.lines}) == number


def test_killing_each_broker_in_turn_loses_nothing(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.05")
    wait_until(lambda: producer.lines, "the topic is there")
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "it has all replicas")
    consumers = [start("consumer.py") for _ in range(2)]
    processor = start("processor.py", "--group", "counting")
    scripts = [producer, *consumers, processor]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    wait_until(lambda: processor.snapshots, "the processor is connected to all brokers")
    for broker in cluster.brokers:
        broker.kill()
        before = [len(script.lines) for script in scripts]
        for script, lines in zip(scripts, before, strict=True):
            wait_until(lambda: len(script.lines) > lines + 5, f"{script.command[1]} continues")
        broker.start()
        wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "the cluster is whole again")
    assert_clean_stop(producer)
    log = witness.messages()
    sent = {*printed_lines(producer)}
    wait_until(lambda: {*printed_lines(*consumers)} >= sent, "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == counts_of(log), "all events are counted")
    assert_clean_stop(*consumers, processor)
    assert producer.find(reports.DELIVERED) == [(str(len(log)), "0")]
    assert printed_lines(producer) == event_lines(log)  # each is in the log exactly once
    for script in scripts:
        for broker in cluster.brokers:
            # It is named when it becomes unreachable, and again when it is back.
            status = rf"^--- (no connection|connected) to {broker.address}\b"
            found = script.find(status)
            assert found == (["no connection", "connected"] * len(found))[: len(found)]
    for script in (producer, processor):  # connected to all, as each is the leader of a partition
        lost = {address for address, _ in script.find(reports.NO_CONNECTION)}
        assert lost == {broker.address for broker in cluster.brokers}


def test_a_partition_without_a_leader_is_waited_for(
    start: Start, cluster: Cluster, witness: Witness, tmp_path: Path
) -> None:
    failing = tmp_path / "polls fail while this file exists"
    witness.create_topic(3)  # with a single replica of each partition, each on another broker
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    everything = counts_of(witness.messages())
    cluster.brokers[2].kill()
    consumer = start("consumer.py")
    patches = {"readers.fail_while_exists": str(failing)}
    processor = start("processor.py", "--group", "counting", patches=patches)
    wait_until(lambda: len(consumer.lines) == 20, "events of the other partitions are printed")
    with_leader = {int(line[len("partition=")]) for line in consumer.lines}
    wait_until(lambda: processor.find(reports.CATCHING_UP), "it reports that it cannot count yet")
    assert not processor.snapshots
    cluster.brokers[2].start()
    wait_until(lambda: processor.snapshots, "it counts when the leader is back")
    assert processor.snapshots[0] == everything
    wait_until(lambda: len(consumer.lines) == 30, "the remaining events are printed")

    # What is counted already is kept when the leader is lost, also after an error.
    cluster.brokers[2].kill()
    failing.touch()
    wait_until(lambda: failing.stat().st_size > 0, "a poll has failed")
    failing.unlink()
    witness.write((partition, b"key", event(f"user {partition}")) for partition in with_leader)
    added = {f"user {partition}": {"view": 1} for partition in with_leader}
    expected = sum_of_counts(everything, added)
    wait_until(lambda: processor.snapshots[-1] == expected, "it counts the other partitions")
    cluster.brokers[2].start()
    assert_clean_stop(consumer, processor)


def test_without_enough_in_sync_replicas_the_producer_waits(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    hurry = {"clients.divide_timeouts": {"request_timeout_ms": 10}}
    producer = start("producer.py", "--interval", "0.1", patches=hurry)
    wait_until(lambda: has_printed_partitions(producer, 3), "it is connected to all brokers")
    remaining, *dead = cluster.brokers
    for broker in dead:
        broker.kill()
    wait_until(lambda: producer.find(reports.OVERDUE), "it reports pending events")
    time.sleep(8)  # meanwhile requests to the remaining broker time out
    for broker in dead:
        broker.start()
    lines = len(producer.lines)
    wait_until(lambda: len(producer.lines) > lines, "it continues when they are back")
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "the cluster is whole again")
    assert_clean_stop(producer)
    assert printed_lines(producer) == event_lines(witness.messages())
    assert len(producer.find(reports.OVERDUE)) == 1
    lost = {address for address, _ in producer.find(reports.NO_CONNECTION)}
    assert lost == {broker.address for broker in dead}
    assert remaining.address not in producer.err


def test_events_that_are_stuck_while_others_are_delivered_are_reported(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    witness.create_topic(3)  # with a single replica of each partition, each on another broker
    producer = start("producer.py", "--interval", "0.02")
    wait_until(lambda: has_printed_partitions(producer, 3), "it is connected to all brokers")
    cluster.brokers[2].kill()
    wait_until(lambda: producer.find(reports.OVERDUE), "it reports pending events")
    lines = len(producer.lines)
    wait_until(lambda: len(producer.lines) > lines + 300, "it sends to the other partitions")
    cluster.brokers[2].start()
    wait_until(lambda: witness.in_sync_replicas() == [1, 1, 1], "all partitions have a leader")
    assert_clean_stop(producer)
    assert len(producer.find(reports.OVERDUE)) == 1
    assert printed_lines(producer) == event_lines(witness.messages())

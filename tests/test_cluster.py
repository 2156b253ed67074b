"""Three brokers, a replica of each partition on all of them: nothing depends on a single one."""

from collections.abc import Iterator

import pytest
import stderr_lines
from broker import Cluster, free_port
from broker_settings import FAST_RETURN
from events import counts_of, event, event_lines
from scripts import Start, assert_clean_stop, printed_lines, wait_until
from witness import Witness


@pytest.fixture(scope="module")
def cluster(kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    with Cluster(tmp_path_factory.mktemp("brokers"), ports, FAST_RETURN) as cluster:
        yield cluster


@pytest.fixture
def broker(cluster: Cluster) -> Cluster:
    """The three brokers, without topics and groups, instead of a single one."""
    Witness(cluster.address).delete_everything()
    return cluster


def test_killing_brokers_loses_nothing(start: Start, cluster: Cluster, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.05")
    wait_until(lambda: producer.lines, "the topic is there")
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "it has all replicas")
    consumers = [start("consumer.py") for _ in range(2)]
    processor = start("processor.py", "--group", "counting")
    scripts = [producer, *consumers, processor]
    wait_until(lambda: witness.group_is_balanced(2), "the consumers share the partitions")
    wait_until(lambda: processor.snapshots, "the processor is connected to all brokers")
    first, *others = cluster.brokers
    first.kill()
    for script in scripts:
        lines = len(script.lines)
        wait_until(lambda: len(script.lines) > lines + 5, f"{script.command[1]} continues")
    first.start()
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "the cluster is whole again")
    for broker in others:  # there are no longer enough in-sync replicas
        broker.kill()
    wait_until(lambda: producer.find(stderr_lines.NOT_ACKNOWLEDGED), "it reports pending events")
    for broker in others:
        broker.start()
    lines = len(producer.lines)
    wait_until(lambda: len(producer.lines) > lines, "it continues when they are back")
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "the cluster is whole again")
    assert_clean_stop(producer)
    log = witness.messages()
    sent = {*printed_lines(producer)}
    wait_until(lambda: {*printed_lines(*consumers)} >= sent, "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == counts_of(log), "all events are counted")
    assert_clean_stop(*consumers, processor)
    assert producer.find(stderr_lines.DELIVERED) == [(str(len(log)), "0")]
    assert printed_lines(producer) == event_lines(log)  # each is in the log exactly once


def test_a_missing_leader_is_waited_for(start: Start, cluster: Cluster, witness: Witness) -> None:
    witness.create_topic(3)  # with a single replica of each partition, each on another broker
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    cluster.brokers[2].kill()
    # kafka-python tries addresses at random: it may choose none but that of the dead one for 10 s.
    others = cluster.address.rpartition(",")[0]
    consumer = start("consumer.py", address=others)
    processor = start("processor.py", "--group", "counting", address=others)
    wait_until(lambda: len(consumer.lines) == 20, "events of the other partitions are printed")
    with_leader = {int(line[len("partition=")]) for line in consumer.lines}
    wait_until(lambda: processor.find(stderr_lines.RETRYING), "it reports that it cannot count yet")
    assert not processor.snapshots
    cluster.brokers[2].start()
    wait_until(lambda: processor.snapshots, "it counts when the leader is back")
    assert processor.snapshots[0] == {f"user {number}": {"view": 10} for number in range(3)}
    wait_until(lambda: len(consumer.lines) == 30, "the remaining events are printed")
    cluster.brokers[2].kill()  # what is counted already is kept
    witness.write((partition, b"key", event(f"user {partition}")) for partition in with_leader)
    expected = {f"user {number}": {"view": 10 + (number in with_leader)} for number in range(3)}
    wait_until(lambda: processor.snapshots[-1] == expected, "it counts the other partitions")
    assert_clean_stop(consumer, processor)

"""Three brokers with three replicas of each partition: losing one of them loses nothing."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Cluster, free_port
from conftest import RESTARTED_BROKER
from events import counts_of, event, event_lines, sum_of_counts
from scripts import Start, assert_few_plain_lines, frozen, patched, printed_lines, wait_until
from witness import Witness, evenly_assigned

pytestmark = pytest.mark.xdist_group("cluster")  # one process, and so one cluster

# On a busy machine, a broker that does not answer for a while is slow rather than dead.
ENVIRONMENT = RESTARTED_BROKER | {"KAFKA_BROKER_SESSION_TIMEOUT_MS": "4000"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    with Cluster(tmp_path_factory.mktemp("brokers"), ports, ENVIRONMENT) as cluster:
        yield cluster


@pytest.fixture
def broker(cluster: Cluster) -> Cluster:
    """The cluster, on which neither the topic nor a group exists."""
    Witness(cluster.address).delete_everything()
    return cluster


def test_nothing_is_lost_when_each_broker_is_killed_in_turn(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    producer = start("producer.py", "--interval", "0.05")
    wait_until(lambda: producer.lines, "the topic exists")
    assert witness.replicas() == [3, 3, 3]
    consumers = [start("consumer.py") for _ in range(2)]
    processor = start("processor.py", "--group", "counting")
    scripts = [producer, *consumers, processor]
    wait_until(evenly_assigned(witness, 2), "the consumers share the partitions")
    wait_until(lambda: processor.snapshots, "the processor is connected to all three")
    for broker in cluster.brokers:
        broker.kill()
        before = [len(script.lines) for script in scripts]
        for script, lines in zip(scripts, before, strict=True):
            wait_until(lambda: len(script.lines) > lines + 5, f"{script.command[1]} continues")
        broker.start()
        wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "all replicas are in sync")
    assert producer.stop() == 0
    messages = witness.messages()
    wait_until(lambda: {*printed_lines(*consumers)} >= {*producer.lines}, "all events are printed")
    wait_until(lambda: processor.snapshots[-1] == counts_of(messages), "all events are counted")
    for script in scripts[1:]:
        assert script.stop() == 0
    assert producer.err.splitlines()[-1] == f"--- {len(messages)} delivered, 0 failed"
    assert printed_lines(producer) == event_lines(messages)  # each is exactly once in the log
    for script in scripts:
        assert_few_plain_lines(script)
        for broker in cluster.brokers:
            # By its own address: once when it becomes unreachable, and once when it is back.
            report = rf"^--- (no connection|connected) to {broker.address}\b"
            reports = re.findall(report, script.err, re.MULTILINE)
            assert reports == (["no connection", "connected"] * len(reports))[: len(reports)]
    for script in (producer, processor):  # each broker leads a partition
        assert all(f"--- no connection to {b.address} (" in script.err for b in cluster.brokers)


def test_readers_wait_for_a_partition_without_a_leader(
    start: Start, cluster: Cluster, witness: Witness, tmp_path: Path
) -> None:
    fail_while = tmp_path / "poll() raises"
    witness.create_topic(3)  # one replica of each partition, each on another broker
    witness.write((number % 3, b"key", event(f"user {number % 3}")) for number in range(30))
    everything = counts_of(witness.messages())
    cluster.brokers[2].kill()
    consumer = start("consumer.py")
    processor = start(
        command=patched("failing_calls", "processor.py", "--group", "counting"),
        environment={"FAIL_WHILE": str(fail_while)},
    )
    wait_until(lambda: len(consumer.lines) == 20, "what has a leader is printed")
    living = {int(line[len("partition=")]) for line in consumer.lines}
    report = "--- catching up: a log end offset cannot be looked up yet\n"
    wait_until(lambda: report in processor.err, "it reports why there is no snapshot")
    cluster.brokers[2].start()
    wait_until(lambda: processor.snapshots, "it counts when the leader is back")
    assert processor.snapshots[0] == everything
    wait_until(lambda: len(consumer.lines) == 30, "the rest is printed")

    # What has been counted is not lost with the leader, nor by an error.
    cluster.brokers[2].kill()
    fail_while.touch()
    wait_until(lambda: fail_while.stat().st_size > 3, "several polls have raised")
    assert "--- poll failed (KafkaTimeoutError); retrying\n" in processor.err
    fail_while.unlink()
    witness.write((partition, b"key", event(f"user {partition}")) for partition in living)
    added = {f"user {partition}": {"view": 1} for partition in living}
    expected = sum_of_counts(everything, added)
    wait_until(lambda: processor.snapshots[-1] == expected, "it counts in the other partitions")
    cluster.brokers[2].start()
    for script in (consumer, processor):
        assert script.stop() == 0
        assert_few_plain_lines(script)


def test_one_of_three_addresses_is_unresponsive(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    """As if its host were down. It is tried first, then one of the others."""
    producer = start("producer.py", "--count", "1")
    assert producer.wait() == 0  # the topic exists, with three replicas of each partition
    frozen_broker = cluster.brokers[1]
    with frozen(frozen_broker):
        others = ",".join(b.address for b in cluster.brokers if b is not frozen_broker)
        # A new witness each time: one that knows all three may ask the frozen one.
        wait_until(
            lambda: Witness(others).in_sync_replicas() == [2, 2, 2], "the others have noticed"
        )
        environment = {"FIRST_PORT": str(frozen_broker.port)}
        producer = start(command=patched("first_address", "producer.py"), environment=environment)
        report = (
            rf"--- no connection to {frozen_broker.address} \(.*RequestTimedOutError.*\); retrying"
        )
        wait_until(lambda: re.match(report, producer.err), "it names the frozen broker")
        wait_until(lambda: producer.lines, "it sends to another one")
        assert producer.stop() == 0
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "all replicas are in sync")


def test_producer_waits_while_two_of_three_brokers_are_down(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    producer = start(command=patched("request_timeout_ms=3000", "producer.py", "--interval", "0.1"))
    wait_until(lambda: len({line.split()[0] for line in producer.lines}) == 3, "it knows all three")
    living, *dead = cluster.brokers
    for broker in dead:
        broker.kill()
    wait_until(lambda: "oldest event unacknowledged for 5 s; " in producer.err, "it reports that")
    time.sleep(8)  # requests to the remaining broker time out
    for broker in dead:
        broker.start()
    lines = len(producer.lines)
    wait_until(lambda: len(producer.lines) > lines, "it continues when they are back")
    wait_until(lambda: witness.in_sync_replicas() == [3, 3, 3], "all replicas are in sync")
    assert producer.stop() == 0
    assert printed_lines(producer) == event_lines(witness.messages())
    assert producer.err.count("oldest event unacknowledged") == 1
    unreachable = re.findall(r"^--- no connection to (\S+) ", producer.err, re.MULTILINE)
    assert {*unreachable} == {broker.address for broker in dead}
    assert living.address not in producer.err
    assert_few_plain_lines(producer)


def test_producer_reports_events_that_are_stuck_while_others_are_not(
    start: Start, cluster: Cluster, witness: Witness
) -> None:
    witness.create_topic(3)  # one replica of each partition, each on another broker
    producer = start("producer.py", "--interval", "0.02")
    wait_until(lambda: len({line.split()[0] for line in producer.lines}) == 3, "it knows all three")
    cluster.brokers[2].kill()
    report = re.compile(
        r"^--- oldest event unacknowledged for 5 s; \d+ events pending$", re.MULTILINE
    )
    wait_until(lambda: report.search(producer.err), "it reports that")
    sent = len(producer.lines)
    wait_until(lambda: len(producer.lines) > sent + 300, "it delivers to the other partitions")
    cluster.brokers[2].start()
    wait_until(lambda: witness.in_sync_replicas() == [1, 1, 1], "all partitions have a leader")
    assert producer.stop() == 0
    assert len(report.findall(producer.err)) == 1
    assert printed_lines(producer) == event_lines(witness.messages())

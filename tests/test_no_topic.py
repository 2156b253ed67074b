"""A cluster that does not create topics, as most managed ones."""

import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Broker
from conftest import CHEAP
from harness import NONE_YET, TOPIC, Start, Witness, assert_plain, frozen, produce, until

pytestmark = pytest.mark.xdist_group("no topic")  # one worker, and so one broker


@pytest.fixture(scope="module")
def lasting_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    environment = CHEAP | {"KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false"}
    with Broker(tmp_path_factory.mktemp("broker"), environment=environment) as broker:
        yield broker


def test_the_topic_comes_late(start: Start, witness: Witness) -> None:
    readers = [start("consumer.py"), start("processor.py", "--group", "counting")]
    producer = start("producer.py")
    assert producer.wait(30) == 1
    assert producer.out == ""
    match = re.fullmatch(r"--- Kafka shows no topic events; to create it: `(.*)`\n", producer.err)
    assert match
    for reader in readers:
        until(lambda: NONE_YET in reader.err, "it says why it waits")
    command = shlex.split(match[1])
    assert command[0] == "python"
    admin = start(command=[sys.executable, *command[1:]])
    assert admin.wait() == 0, admin.err
    assert witness.partitions() == [0, 1, 2]
    sent = produce(start, 50)
    consumer, processor = readers
    until(lambda: sorted(consumer.lines) == sorted(sent.lines), "all events are shown")
    until(lambda: processor.snapshots, "they are counted")
    for reader in readers:
        assert reader.stop() == 0
        assert_plain(reader)
        assert reader.err.count(NONE_YET) == 1


def test_a_signal_ends_the_wait_for_the_topic(start: Start, broker: Broker) -> None:
    producer = start("producer.py")
    until(producer.connected, "it is connected")
    assert producer.stop(timeout=9) == -2  # at once, not with 1 after the 15 s
    assert "Traceback" not in producer.err


def test_ctrl_c_when_the_topic_has_just_been_deleted(start: Start, witness: Witness) -> None:
    witness.create(3)
    producer = start("producer.py", "--interval", "0.01")
    until(lambda: len(producer.lines) > 20, "it is at it")
    witness.delete(TOPIC)

    def stands_still() -> bool:
        lines = len(producer.lines)
        time.sleep(1)
        return len(producer.lines) == lines

    until(stands_still, "it can send no more")
    assert producer.stop(timeout=20) == 1
    assert_plain(producer)
    assert re.fullmatch(r"--- \d+ delivered, \d+ failed", producer.err.splitlines()[-1])


def test_ctrl_c_where_there_is_no_topic_and_the_broker_is_frozen(
    start: Start, broker: Broker, witness: Witness
) -> None:
    readers = [start("consumer.py"), start("processor.py", "--group", "counting")]
    until(lambda: witness.members() and witness.members("counting"), "they are in their groups")
    with frozen(broker):
        time.sleep(3)  # the time in which they say that they have nothing
        for reader in readers:
            reader.process.send_signal(signal.SIGINT)
        for reader in readers:
            assert reader.wait(15) == 0
            assert_plain(reader)


def test_no_group_comes_about(start: Start, tmp_path: Path) -> None:
    """One broker, whose topic for the groups' offsets is to have three copies: Kafka's default."""
    environment = {"KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "3"}
    with Broker(tmp_path, environment=environment) as broker:
        readers = [start(name, address=broker.address) for name in ("consumer.py", "processor.py")]
        for reader in readers:
            until(lambda: NONE_YET in reader.err, "it says that it has nothing, and why", 20)
            assert reader.stop(timeout=15) == 0
            assert_plain(reader)

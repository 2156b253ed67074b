"""Nothing lost, nothing counted twice: members and brokers that come, go and crash."""

import functools
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import ROOT, Broker, free_port
from confluent_kafka import Consumer
from conftest import QUICK_RETURN
from harness import (
    GROUP,
    PART,
    TOPIC,
    Pipe,
    Proxy,
    Script,
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
from kafka import KafkaProducer

LOST = re.compile(r"^--- no connection to (\S+) \(.+\); trying again$", re.MULTILINE)
BACK = re.compile(r"^--- connected to (\S+) again$", re.MULTILINE)


def test_another_consumer_takes_over_from_a_killed_one(start: Start, witness: Witness) -> None:
    producer = start("producer.py", "--interval", "0.01")
    dead, survivor = start("consumer.py"), start("consumer.py")
    until(settled(witness, 2), "they share the partitions")
    until(lambda: len(dead.lines) > 50 and len(survivor.lines) > 50, "they are at it")
    dead.stop(signal.SIGKILL)
    committed = witness.committed()
    until(settled(witness, 1), "the survivor has all partitions", timeout=20)
    assert producer.stop() == 0
    log = witness.log()
    everything = {line(message) for message in log}
    # The dead one's last line may be cut off; it is not among the complete lines.
    until(lambda: {*dead.lines, *survivor.lines} == everything, "nothing is missing")
    assert survivor.stop() == 0
    assert Counter(survivor.lines).most_common(1)[0][1] == 1
    done = {line(m) for m in log if m.offset < committed.get(m.partition, 0)}
    assert not done & {*dead.lines} & {*survivor.lines}


@pytest.fixture(params=["directly", "through a proxy"])
def outage_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Broker, str]]:
    """A broker to stop and start, and the address at which the clients find it."""
    broker = Broker(tmp_path / "broker", environment=QUICK_RETURN)
    address = broker.address
    if request.param == "through a proxy":
        address = Proxy(free_port(), broker.port).address
        broker.environment["KAFKA_ADVERTISED_LISTENERS"] = f"PLAINTEXT://{address}"
    with broker:
        yield broker, address


def test_everybody_outlives_an_outage_of_the_broker(
    start: Start, outage_broker: tuple[Broker, str]
) -> None:
    broker, address = outage_broker
    crash = address == broker.address
    witness = Witness(address)
    producer = start("producer.py", "--interval", "0.01", address=address)
    consumers = [start("consumer.py", address=address) for _ in range(2)]
    processor = start("processor.py", "--group", "counting", address=address)
    scripts = [producer, *consumers, processor]
    until(settled(witness, 2), "the consumers share the partitions")
    until(lambda: all(script.lines for script in scripts), "all are at work")
    # A crash for longer than the session of a group's member, 10 s; or a short, clean stop.
    (broker.kill if crash else broker.stop)()
    time.sleep(12 if crash else 3)
    before = [len(script.lines) for script in scripts]
    broker.start()
    for script, lines in zip(scripts, before, strict=True):
        until(lambda: len(script.lines) > lines, f"{script.command[1]} is at work again", 15)
    assert producer.stop() == 0
    log = witness.log()
    expected = count(log)
    until(lambda: len({*shown(*consumers)}) >= len(log), "all events are shown")
    until(lambda: processor.snapshots[-1] == expected, "all events are counted")
    for script in (*consumers, processor):
        assert script.stop() == 0
    assert producer.err.splitlines()[-1] == f"--- {len(log)} delivered, 0 failed"
    assert shown(producer) == sorted(map(line, log))  # each confirmed event is in the log, once
    assert {*shown(*consumers)} == {*shown(producer)}
    for script in scripts:
        assert_plain(script)
        # Named, once when it went and once when it was back.
        assert LOST.findall(script.err) == BACK.findall(script.err) == [address]


def test_ctrl_c_during_an_outage(start: Start, tmp_path: Path) -> None:
    sign = tmp_path / "calls fail"
    broker = Broker(tmp_path / "broker", environment=QUICK_RETURN)
    run = functools.partial(start, address=broker.address)
    with broker:
        producer = run("producer.py", "--interval", "0.01")
        consumer = run(command=patched(failing(sign), "consumer.py"))
        processor = run(command=patched(failing(sign), "processor.py", "--group", "counting"))
        scripts = [producer, consumer, processor]
        until(lambda: consumer.lines and processor.snapshots, "all are at work")
    for script in scripts:
        until(lambda: LOST.search(script.err), "it has noticed")
    sign.touch()
    until(lambda: sign.stat().st_size > 10, "they have tried")
    for script in scripts:
        script.process.send_signal(signal.SIGINT)
    for script in scripts:
        # Within about 10 s, whatever the broker does; and some for a machine that stumbles.
        assert script.wait(15) == (1 if script is producer else 0)
        assert_plain(script)
    tally = rf"--- {len(producer.lines)} delivered, [1-9]\d* failed"
    assert re.fullmatch(tally, producer.err.splitlines()[-1])


def test_members_come_and_go_and_crash_at_random(start: Start, witness: Witness) -> None:
    dice = random.Random(20261123)
    producer = start("producer.py", "--interval", "0.02")
    members = [start("consumer.py"), start("processor.py")]
    gone: list[Script] = []
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if len(members) < 2 or (len(members) < 6 and dice.random() < 0.6):
            members.append(start(dice.choice(["consumer.py", "processor.py"])))
        else:
            member = members.pop(dice.randrange(len(members)))
            how = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            until(member.connected, "it is up")
            # A signal that comes before it has connected ends Python itself.
            assert member.stop(how) in ((-how,) if how == signal.SIGKILL else (0, -how))
            gone.append(member)
        time.sleep(dice.uniform(0.2, 2))
    assert producer.stop() == 0
    log = witness.log()
    processors = [member for member in members if "processor.py" in member.command[1]]
    processors.append(start("processor.py"))
    consumers = [m for m in (*members, *gone) if "consumer.py" in m.command[1]]
    for consumer in consumers:
        if consumer in members:
            until(lambda: consumer.err, "it is in the group")
            assert consumer.stop() == 0
    until(settled(witness, len(processors)), "the processors hold everything")
    until(
        lambda: add(*(p.snapshots[-1] for p in processors if p.snapshots)) == count(log),
        "their counts add up",
    )
    for processor in processors:
        assert processor.stop() == 0
    consumers.append(start("consumer.py"))
    everything = {line(message) for message in log}
    until(lambda: {*shown(*consumers)} >= everything, "every event was shown")
    for member in (*members, *gone):
        assert_plain(member)


def test_an_interrupted_producer_accounts_for_every_event(start: Start, witness: Witness) -> None:
    dice = random.Random(4)
    runs = []
    for interval in ("0", "0", "0.01"):
        producer = start("producer.py", "--interval", interval)
        until(lambda: producer.lines, "it is at it")
        time.sleep(dice.uniform(0, 0.5))
        assert producer.stop(dice.choice([signal.SIGINT, signal.SIGTERM])) == 0
        assert producer.err.splitlines()[-1] == f"--- {len(producer.lines)} delivered, 0 failed"
        runs.append(producer)
    assert shown(*runs) == sorted(map(line, witness.log()))


# Runs the producer with a delivery time-out of three seconds instead of two minutes.
IMPATIENT = """
from kafka import KafkaProducer
KafkaProducer.DEFAULT_CONFIG.update(delivery_timeout_ms=3_000, request_timeout_ms=2_000)
"""


def test_producer_gives_up_on_a_broker_that_answers_no_more(start: Start, broker: Broker) -> None:
    producer = start(command=patched(IMPATIENT, "producer.py", "--interval", "0.01"))
    until(lambda: len(producer.lines) > 20, "it is at it")
    with frozen(broker):
        assert producer.wait(40) == 1
    assert_plain(producer)
    assert "not delivered: KafkaTimeoutError" in producer.err
    tally = rf"--- {len(producer.lines)} delivered, [1-9]\d* failed"
    assert re.fullmatch(tally, producer.err.splitlines()[-1])


def test_the_delivery_time_out_is_the_one_that_help_tells(start: Start) -> None:
    script = start("producer.py", "--help", address="nowhere:1")
    assert script.wait() == 0
    assert "after 120 s has failed" in script.out
    assert KafkaProducer.DEFAULT_CONFIG["delivery_timeout_ms"] == 120_000
    assert "delivery_timeout_ms" not in (ROOT / "producer.py").read_text()


# Runs the producer with a send() that fails as it may when the topic has just been deleted.
VANISHING = """
from kafka import KafkaProducer
sent, send = [], KafkaProducer.send
def vanishing_send(self, *arguments, **keywords):
    sent.append(1)
    if len(sent) == 50:
        raise ValueError("Partitioner did not assign a partition for topic events!")
    return send(self, *arguments, **keywords)
KafkaProducer.send = vanishing_send
"""


def test_a_send_that_raises_is_accounted_for(start: Start, witness: Witness) -> None:
    producer = start(command=patched(VANISHING, "producer.py", "--interval", "0"))
    assert producer.wait() == 1
    assert_plain(producer)
    assert producer.err.splitlines()[-1] == "--- 49 delivered, 1 failed"
    assert "not delivered: Partitioner did not assign a partition" in producer.err
    assert shown(producer) == sorted(map(line, witness.log()))


# Runs the consumer as a member that is out of its group after two seconds without poll().
HURRIED = """
from kafka import KafkaConsumer
KafkaConsumer.DEFAULT_CONFIG["max_poll_interval_ms"] = 2_000
"""


def test_a_consumer_held_up_for_too_long_says_that_events_are_shown_again(
    start: Start, witness: Witness, pipe: Pipe
) -> None:
    witness.create(1)
    witness.write([(0, b"key", event())] * 3000)
    consumer = start(command=pipe.fed_by(patched(HURRIED, "consumer.py")))
    until(pipe.is_full, "the pipe is full")
    until(lambda: witness.members() == [], "the group has given it up")
    until(lambda: pipe.read().count(b"\n") > 3000, "its events are shown again")
    assert "the group went on without this one" in consumer.err
    until(lambda: pipe.read().count(b"\n") >= 6000, "all of them")
    assert consumer.stop() == 0
    assert witness.committed() == {0: 3000}


# Runs a script with a poll() that raises when it has taken events, the first and the third time; as
# happens when a leader is named that the client does not know yet. They are then in nobody's hands.
LOSING_POLLS = """
from kafka import KafkaConsumer, errors
poll, taken = KafkaConsumer.poll, []
def losing_poll(self, **settings):
    polled = poll(self, **settings)
    taken.extend([1] if polled else [])
    if polled and len(taken) in (1, 3):
        raise errors.UnknownBrokerIdError(2)
    return polled
KafkaConsumer.poll = losing_poll
"""


def test_a_poll_that_raises_loses_nothing(start: Start, witness: Witness) -> None:
    witness.create(3)
    witness.write((number % 3, b"key", event(f"user {number % 9}")) for number in range(40_000))
    log = witness.log()
    consumer = start(command=patched(LOSING_POLLS, "consumer.py"))
    processor = start(command=patched(LOSING_POLLS, "processor.py", "--group", "counting"))
    until(lambda: len(consumer.lines) >= len(log), "all events are shown")
    until(lambda: processor.snapshots, "all events are counted")
    for script in (consumer, processor):
        assert script.stop() == 0
        assert "cannot go on" not in script.err  # what passes is not worth a line
        assert_plain(script)
    assert shown(consumer) == sorted(map(line, log))
    assert processor.snapshots[0] == count(log)


def test_a_group_of_another_protocol_is_named_and_waited_for(
    start: Start, witness: Witness
) -> None:
    witness.create(3)
    witness.write([(0, b"key", event())])
    stranger = Consumer(
        {**witness.settings, "group.id": GROUP, "partition.assignment.strategy": "range"}
    )
    stranger.subscribe([TOPIC])
    until(lambda: stranger.poll(0.1) or stranger.assignment(), "the stranger has joined")
    consumer = start("consumer.py")
    until(lambda: "InconsistentGroupProtocolError" in consumer.err, "it says why it has to wait")
    stranger.close()
    until(lambda: consumer.lines, "it goes on when the stranger has left")
    assert consumer.stop() == 0
    assert_plain(consumer)


def test_beside_a_member_of_the_new_protocol_it_says_what_it_counts(
    start: Start, witness: Witness
) -> None:
    """librdkafka's group.protocol=consumer (KIP-848): the coordinator speaks both at once."""
    witness.create(3)
    witness.write((i % 3, b"key", event(f"user {i % 3}")) for i in range(30))
    stranger = Consumer({**witness.settings, "group.id": GROUP, "group.protocol": "consumer"})
    stranger.subscribe([TOPIC])
    until(lambda: stranger.poll(0.1) or len(stranger.assignment()) == 3, "the stranger has all")
    processor = start("processor.py")

    def shares() -> bool:
        stranger.poll(0.1)
        return bool(re.search(PART, processor.err) and processor.snapshots)

    until(shares, "it says what it counts, and shows counts")
    held = re.findall(PART, processor.err)[-1].split(", ")
    assert processor.snapshots[-1].keys() == {f"user {partition}" for partition in held}
    stranger.close()
    until(lambda: processor.err.endswith("0, 1, 2: all\n"), "it counts all when that has left")
    assert processor.stop() == 0

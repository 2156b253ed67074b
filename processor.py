"""Counts events by two of their fields, in the partitions that it holds, and shows that as JSON.

python processor.py --group mine   in a group of its own it holds all partitions
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"  # of the readers
# For a cluster that asks who you are: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, … (README)
NAMES = ["SECURITY_PROTOCOL", "SASL_MECHANISM", "SASL_PLAIN_USERNAME", "SASL_PLAIN_PASSWORD"]
NAMES += ["SSL_CAFILE", "SSL_CERTFILE", "SSL_KEYFILE", "SSL_PASSWORD"]
SECURITY = {n.lower(): os.environ[f"KAFKA_{n}"] for n in NAMES if f"KAFKA_{n}" in os.environ}
NONE = "none yet: others of the group have them, or there is no topic, no right to it, or no group"
log = logging.getLogger("processor.py")
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


def join(group: str) -> KafkaConsumer:
    """A client that becomes a member of the group when it polls."""
    return connect(
        KafkaConsumer,
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # tells the members of a group apart from outside
        group_id=group,
        auto_offset_reset="earliest",  # where events are gone: from the first that is left
        enable_auto_commit=False,  # what it counts is still the consumers' to read
        isolation_level="read_committed",  # no events of a transaction that was aborted
        partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
        session_timeout_ms=10_000,  # a member that died is noticed after this
        heartbeat_interval_ms=500,  # a member that came or left is noticed after this
        metadata_max_age_ms=10_000,  # new partitions are noticed after this
        fetch_max_bytes=2 * 1024 * 1024,  # what takes 30 s (request_timeout_ms) begins anew
        fetch_max_wait_ms=100,  # so long a fetch of empty partitions alone holds up the others
        max_poll_records=5_000,  # so many events are counted between two looks at the rest
        reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
        **SECURITY,
    )


def what_counts(value: Any) -> tuple[str, str]:
    """The two fields by which an event is counted; without them it raises what add() catches."""
    event = json.loads(value.decode())
    who, what = event["user_id"], event["action"]
    if not (isinstance(who, str) and isinstance(what, str)):
        raise TypeError("what is counted must be a string")
    return who, what


@dataclass
class Held:  # what there is to know of a partition that this processor holds
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    next_offset: int = 0  # of the event to count next
    goal: int | None = None  # where the log ended when the partition was given; None: not asked
    malformed: int = 0


class Counts(ConsumerRebalanceListener):
    """The counts of each partition held, from its first event on: the log is their only state."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.held: dict[TopicPartition, Held] = {}
        self.last_malformed = ""  # where that was, and why; empty when it has been said

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        for partition in revoked:
            self.held.pop(partition, None)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        for partition in assigned:  # those that it did not hold
            self.held[partition] = Held()
            self.consumer.seek(partition, 0)  # whatever the group has committed

    def add(self, partition: TopicPartition, messages: list[Any]) -> None:
        held = self.held[partition]
        if messages[0].offset < held.next_offset:  # the topic was deleted and created anew
            self.on_partitions_assigned({partition})
            return
        for message in messages:
            try:
                held.counts[what_counts(message.value)] += 1
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as why:
                held.malformed += 1
                place = f"partition={message.partition} offset={message.offset}"
                self.last_malformed = f"{place}: {type(why).__name__}: {why}"
        held.next_offset = messages[-1].offset + 1

    def left(self) -> int:
        """How many events are left to read of those that were there when partitions were given."""
        left = 0
        for partition, held in self.held.items():
            if held.goal is None:
                # One by one: of several, kafka-python 3.0.12 raises KeyError if one has no leader.
                held.goal = self.consumer.end_offsets([partition], timeout_ms=5_000)[partition]
            # position() is past the last event where others behind it are gone or aborted.
            position = self.consumer.position(partition, timeout_ms=0) or 0
            left += max(0, held.goal - position)
        return left


def count_events(consumer: KafkaConsumer, once: bool) -> None:
    """Polls, counts what has come, and reports, until told to stop or, `once`, having reported."""
    counts, failures, last_round = Counts(consumer), 0, False
    consumer.subscribe([TOPIC], listener=counts)  # told which partitions come and go
    said, share, printed, next_report = None, "", "", time.monotonic() + 2
    while not (last_round or (once and printed)):
        last_round = bool(stopping)
        try:
            if failures:  # back to what is counted: a poll() that raised may have lost events
                for partition, known in counts.held.items():
                    consumer.seek(partition, known.next_offset)
            if consumer._coordinator.rebalance_in_progress():
                consumer._coordinator.request_rejoin()  # or it forgets a long join: KAFKA-9815
            for partition, messages in consumer.poll(timeout_ms=250).items():
                counts.add(partition, messages)
            left, now = counts.left(), time.monotonic()
            held = sorted(partition for _, partition in consumer.assignment())
            if held != said and (held or now > next_report):  # to join takes a moment
                said, share = held, share_of(consumer, held)
                log.info(share)
            failures = 0
        except errors.CorruptRecordError as why:  # the next poll() would never end
            sys.exit(f"--- cannot read the events: {why}")
        except errors.KafkaError as error:
            failures += 1
            if failures == 3:  # most errors pass sooner
                log.warning("cannot go on (%s); trying again", error)
            time.sleep(0.5)
            continue
        first = not (left or printed)  # the first counts are shown as soon as they are whole
        if (held or printed) and (first or last_round or now >= next_report):
            printed = report(counts, left, printed, share)
            next_report = now + min(30, max(1, 15 * (time.monotonic() - now)))  # 1/16 of its time


def share_of(consumer: KafkaConsumer, held: list[int]) -> str:
    """The line that says which partitions it counts, and if these are not all, how to count all."""
    if held and len(held) == len(consumer.partitions_for_topic(TOPIC)):
        return f"counting partitions of {TOPIC}: {', '.join(map(str, held))}: all"
    mine = f"{', '.join(map(str, held))}; others of the group have the rest" if held else NONE
    return f"counting partitions of {TOPIC}: {mine} (all: --group NAME)"


def report(counts: Counts, left: int, printed: str, share: str) -> str:
    """Shows the counts, if they are whole and not those `printed` last; returns the last shown."""
    if counts.last_malformed:
        number = sum(held.malformed for held in counts.held.values())
        log.warning("malformed events skipped: %d, the last at %s", number, counts.last_malformed)
        counts.last_malformed = ""
    if left:
        log.info("%s events still to read", f"{left:,}")
        return printed
    total: dict[str, Counter[str]] = {}
    for held in counts.held.values():
        for (who, what), number in held.counts.items():
            total.setdefault(who, Counter())[what] += number
    text = json.dumps(total, indent=2, sort_keys=True)  # escapes what could drive the terminal
    if text != printed:
        print(text, flush=True)
        if "--group" in share and sys.stdout.isatty() and sys.stderr.isatty():
            log.info(share)  # the counts have scrolled it away
    return text


# From here to main(), the same in all three scripts: what keeps them alive on a bad day.
class BrokerNews(logging.Handler):
    """Says which broker is gone, and when it is back, by what kafka-python 3.0.12 logs."""

    addresses, gone = dict[Any, str](), set[str]()

    def emit(self, record: Any) -> None:
        match record.msg, record.args:
            case "Initializing connection for node_id %s at %s:%s (rack=%s)", (name, host, port, _):
                self.addresses[name] = f"{host}:{port}"
            case "%s: Connected", (node,) if self.addresses.get(node.node_id) in self.gone:
                self.gone.remove(self.addresses[node.node_id])
                log.info("connected to %s again", self.addresses[node.node_id])
            case "%s: Connection lost: %s", (node, why):
                address = self.addresses.get(node.node_id, "Kafka")
                # One that is only slow to answer is not gone; if it is, connecting anew will tell.
                slow = node.init_future.succeeded() and isinstance(why, errors.RequestTimedOutError)
                if address not in self.gone and not slow:
                    self.gone.add(address)
                    log.warning("no connection to %s (%s); trying again", address, why)


def connect(client: Any, **settings: Any) -> Any:
    """A connected client; without one in 10 s it ends the script with status 1."""
    if sys.stdout is None:
        sys.exit("--- no stdout to write to")
    os.set_blocking(1, True)  # wait for a full pipe, also where a parent (ssh, node) does not
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # buffered, always
    logging.getLogger("kafka").addHandler(BrokerNews())
    logging.getLogger("kafka").propagate = False
    # Each try takes one of several addresses, picked at random, which may be silent all the time.
    for seconds in (1, 1, 1, 1, 2, 4) if "," in BOOTSTRAP_SERVERS else (10,):
        with contextlib.suppress(errors.KafkaTimeoutError):
            return client(bootstrap_timeout_ms=seconds * 1_000, **settings)
    sys.exit(f"--- no Kafka at {BOOTSTRAP_SERVERS}: docker compose up -d or python tests/broker.py")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="show the counts once, and end")
    options = parser.parse_args()
    if not options.group.isprintable():  # nor are bytes that are not UTF-8
        parser.error("--group: not a name")
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to finish yet
    consumer = join(options.group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    try:
        count_events(consumer, options.once)
    except BrokenPipeError:  # | head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
    finally:
        if stopping:
            log.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # tells the group, so that others take over at once


if __name__ == "__main__":
    main()

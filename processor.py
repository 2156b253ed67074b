"""Count each user's actions in the assigned partitions, and print the counts as JSON.

python processor.py --group mine   alone in a group, it is assigned all partitions
"""

import contextlib
import json
import logging
import os
import signal
import ssl
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"  # shared by consumer.py and processor.py; unused in producer.py
SECURITY_SETTINGS = {  # for a secured cluster, from KAFKA_SECURITY_PROTOCOL and so on (README)
    name: os.environ[f"KAFKA_{name.upper()}"]
    for name in (
        *("security_protocol", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password"),
        *("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    )
    if f"KAFKA_{name.upper()}" in os.environ
}
log = logging.getLogger("processor.py")
stop_requests: list[float] = []  # the times of Ctrl-C and SIGTERM, which stop the loop
NO_PARTITIONS = "none; other members have them all, or the topic is missing, or access is denied"
Batches = dict[TopicPartition, list[Any]]  # what a poll() returns: messages by partition


def create_consumer(group: str, **settings: Any) -> KafkaConsumer:
    """Return a connected client, which joins the group when it polls."""
    return KafkaConsumer(
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # the member's name in `kafka.admin groups describe`
        group_id=group,
        auto_offset_reset="earliest",  # if the first events are deleted, start with what is left
        enable_auto_commit=False,  # a commit would make the group's consumers skip events
        isolation_level="read_committed",  # skip the events of aborted transactions
        partition_assignment_strategy=[CooperativeStickyAssignor],  # reassign as few as possible
        session_timeout_ms=10_000,  # after this, a crashed member's partitions are reassigned
        heartbeat_interval_ms=500,  # a rebalance is noticed after at most this
        max_poll_interval_ms=30_000,  # a member that does not poll for this long is removed
        metadata_max_age_ms=10_000,  # new partitions are noticed after at most this
        fetch_max_bytes=2 * 1024 * 1024,  # at 200 kB/s, arrives within the 30 s time-out
        fetch_max_wait_ms=100,  # after this, a fetch that finds no events is answered
        max_poll_records=5_000,  # at most this many events are counted after each poll()
        reconnect_backoff_max_ms=1_000,  # reconnect within a second of the broker's return
        **SECURITY_SETTINGS,
        **settings,
    )


def process(consumer: KafkaConsumer, once: bool) -> None:
    """Count the events that poll() returns and print snapshots; if `once`, only the first."""
    counts = Counts(consumer)
    report = Report(consumer, counts)
    consumer.subscribe([TOPIC], listener=counts)
    for batches in polls(consumer, counts.rewind):
        counts.add(batches)
        report.report_assignment()
        report.print_snapshot_if_due()
        if once and report.last_snapshot:
            break
    report.print_snapshot(counts.remaining())


def user_and_action(value: Any) -> tuple[str, str]:
    """Return the two fields by which an event is counted; raise an exception if it is malformed."""
    event = json.loads(value.decode())
    user_id, action = event["user_id"], event["action"]
    if not (isinstance(user_id, str) and isinstance(action, str)):
        raise TypeError("the fields that are counted must be strings")
    return user_id, action


@dataclass
class PartitionState:
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    next_offset: int = 0  # of the event to count next
    end_offset: int | None = None  # the log end offset at assignment; None: not looked up yet
    malformed: int = 0


class Counts(ConsumerRebalanceListener):
    """The counts of each assigned partition, rebuilt from the log at each assignment."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.partitions: dict[TopicPartition, PartitionState] = {}
        self.assignment_reported, self.last_rebalance = False, time.monotonic()
        self.last_malformed = ""  # its position and what is wrong; empty once it is reported

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self.assignment_reported, self.last_rebalance = False, time.monotonic()
        for partition in assigned:
            self.start_over(partition)

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self.assignment_reported, self.last_rebalance = False, time.monotonic()
        for partition in revoked:
            self.partitions.pop(partition, None)

    def start_over(self, partition: TopicPartition) -> None:
        self.partitions[partition] = PartitionState()
        self.consumer.seek(partition, 0)  # wherever the group's committed offset is

    def add(self, batches: Batches) -> None:
        for partition, messages in batches.items():
            state = self.partitions[partition]
            if messages[0].offset < state.next_offset:  # the topic was deleted and created again
                self.start_over(partition)
                continue
            for message in messages:
                try:
                    state.counts[user_and_action(message.value)] += 1
                except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                    state.malformed += 1
                    position = f"partition={message.partition} offset={message.offset}"
                    self.last_malformed = f"{position}: {type(error).__name__}: {error}"
            state.next_offset = messages[-1].offset + 1

    def by_user(self) -> dict[str, Counter[str]]:
        """Return how often each user did each action, in all assigned partitions."""
        totals: dict[str, Counter[str]] = {}
        for state in self.partitions.values():
            for (user_id, action), count in state.counts.items():
                totals.setdefault(user_id, Counter())[action] += count
        return totals

    def remaining(self) -> int | None:
        """Return how many of the events that were in the log at assignment are still to be counted.

        Return None while a log end offset cannot be looked up.
        """
        remaining = 0
        with contextlib.suppress(errors.KafkaError):
            for partition, state in self.partitions.items():
                if state.end_offset is None:  # one by one: one that fails would fail them all
                    offsets = self.consumer.end_offsets([partition], timeout_ms=5_000)
                    state.end_offset = offsets[partition]
                # Unlike next_offset, the position moves on past deleted and aborted events.
                position = self.consumer.position(partition, timeout_ms=0) or 0
                remaining += max(0, state.end_offset - position)
            return remaining
        return None

    def rewind(self) -> None:
        """Seek to the next event to count in each partition."""
        for partition, state in self.partitions.items():
            self.consumer.seek(partition, state.next_offset)


class Report:
    """What has been reported: the assignment and the last snapshot."""

    def __init__(self, consumer: KafkaConsumer, counts: Counts) -> None:
        self.consumer, self.counts = consumer, counts
        self.reminder = ""  # the line that reports a partial assignment; empty if it is complete
        self.last_snapshot, self.next_snapshot = "", time.monotonic() + 1

    def report_assignment(self) -> None:
        """Report the assignment once after each change; an empty one only if it lasts for 5 s."""
        assigned = sorted(number for _, number in self.counts.partitions)
        settled = assigned or time.monotonic() > self.counts.last_rebalance + 5
        if self.counts.assignment_reported or not settled:
            return
        self.counts.assignment_reported = True
        numbers = ", ".join(map(str, assigned))
        if assigned and len(assigned) == len(self.consumer.partitions_for_topic(TOPIC)):
            self.reminder = ""
            log.info("counting partitions of %s: %s (all)", TOPIC, numbers)
        else:
            which = f"{numbers}; other members have the rest" if assigned else NO_PARTITIONS
            self.reminder = f"counting partitions of {TOPIC}: {which}"
            self.reminder += " (--group NAME counts all)"
            log.info(self.reminder)

    def print_snapshot_if_due(self) -> None:
        """Print the first snapshot as soon as the counts are complete, later ones once a second."""
        remaining, started = self.counts.remaining(), time.monotonic()
        if started >= self.next_snapshot or (remaining == 0 and not self.last_snapshot):
            self.print_snapshot(remaining)
            # Wait 15 times as long as printing took, within these limits, so that counting goes on.
            self.next_snapshot = started + min(30, max(1, 15 * (time.monotonic() - started)))

    def print_snapshot(self, remaining: int | None) -> None:
        """If the counts are complete, print them if they have changed; else report what remains."""
        if self.counts.last_malformed:
            number = sum(state.malformed for state in self.counts.partitions.values())
            last = self.counts.last_malformed
            log.warning("malformed events skipped: %d; last at %s", number, last)
            self.counts.last_malformed = ""
        if remaining is None:
            log.info("catching up: a log end offset cannot be looked up yet")
            return
        if remaining > 0:
            log.info("catching up: %s events to go", f"{remaining:,}")
            return
        snapshot = json.dumps(self.counts.by_user(), indent=2, sort_keys=True)
        if snapshot != self.last_snapshot and (self.counts.partitions or self.last_snapshot):
            self.last_snapshot = snapshot
            print(snapshot, flush=True)
            if self.reminder and sys.stdout.isatty() and sys.stderr.isatty():
                log.info(self.reminder)  # the snapshot has scrolled it off


# Error handling, down to request_stop(). Skip it at first; README.md shows how to delete it.
def polls(consumer: KafkaConsumer, rewind: Callable[[], None]) -> Iterator[Batches]:
    """Yield what each poll() returns, until a signal is received. If poll() raises, try again.

    rewind() seeks back to the first unhandled event, because a poll() that raises may skip events.
    """
    failures = 0
    while not stop_requests:
        try:
            if failures:
                rewind()
            if consumer.group_metadata().state == MemberState.REBALANCING:
                # Private: no public call asks for a rejoin. Without it, a member whose join takes
                # longer than a poll() may never be assigned partitions (compare KAFKA-9815).
                consumer._coordinator.request_rejoin()
            batches = consumer.poll(timeout_ms=250)
            failures = 0
        except errors.CorruptRecordError as error:
            sys.exit(f"--- cannot read events: {error}")  # each further poll() would raise it
        except errors.KafkaError as error:
            failures += 1
            if failures == 3:  # most errors pass sooner
                log.warning("poll failed (%s); retrying", error)
            time.sleep(0.5)
        else:
            yield batches


class BrokerStatus(logging.Handler):
    """Report unreachable brokers, from kafka-python's log: it has no public hook for them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: dict[Any, str] = {}  # by node ID
        self.outages: dict[str, bool] = {}  # by address; True if a failed login has been reported

    def emit(self, record: Any) -> None:
        # The three texts are the same in kafka-python 3.0.6 to 3.0.12.
        if record.msg == "Initializing connection for node_id %s at %s:%s (rack=%s)":
            node_id, host, port, _ = record.args
            self.addresses[node_id] = f"{host}:{port}"
        elif record.msg == "%s: Connected":
            address = self.addresses.get(record.args[0].node_id, "Kafka")
            if address in self.outages:
                del self.outages[address]
                log.info("connected to %s", address)
        elif record.msg == "%s: Connection lost: %s":
            connection, error = record.args
            address = self.addresses.get(connection.node_id, "Kafka")
            ready = connection.init_future.succeeded()
            if ready and isinstance(error, errors.RequestTimedOutError):
                return  # perhaps it is only slow; if not, the reconnection fails and is reported
            at_login = isinstance(error.__context__, ssl.SSLError)  # in the TLS handshake
            at_login = at_login or bool(SECURITY_SETTINGS and connection.parser and not ready)
            login_reported = self.outages.get(address)
            if login_reported is None or (at_login and not login_reported):
                self.outages[address] = at_login
                reason = f"during login: {error}" if at_login else error
                log.warning("no connection to %s (%s); retrying", address, reason)


def connect(create_client: Callable[..., Any], *arguments: Any) -> Any:
    """Return a connected client; exit with status 1 if there is no connection within 10 s."""
    logging.getLogger("kafka").addHandler(BrokerStatus())
    logging.getLogger("kafka").propagate = False
    # Each attempt picks one of several addresses at random, perhaps an unresponsive one.
    for seconds in (1, 1, 1, 1, 2, 4) if "," in BOOTSTRAP_SERVERS else (10,):
        with contextlib.suppress(errors.KafkaTimeoutError):
            return create_client(*arguments, bootstrap_timeout_ms=seconds * 1_000)
    if SECURITY_SETTINGS:
        names = ", ".join(f"KAFKA_{name.upper()}" for name in SECURITY_SETTINGS)
        sys.exit(f"--- no broker at {BOOTSTRAP_SERVERS} accepts these settings: {names}")
    how_to_start = "docker compose up -d or python tests/broker.py in the folder kafka-practice"
    sys.exit(f"--- no broker at {BOOTSTRAP_SERVERS}; start one with {how_to_start}")


def request_stop(signum: int, _: Any) -> None:
    """Have the loop stop when the batch in hand is finished. A second Ctrl-C exits at once."""
    now = time.monotonic()
    if stop_requests and now > stop_requests[0] + 0.5:  # the timeout command sends two signals
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    stop_requests.append(now)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="exit after the first snapshot")
    options = parser.parse_args()
    if not (options.group and options.group.isprintable()):
        parser.error("--group: the name is empty or not printable")
    os.set_blocking(1, True)  # a pipe left non-blocking (by ssh, node) would drop lines when full
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # buffered despite -u
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is connected, Ctrl-C ends it at once
    consumer = connect(create_consumer, options.group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    try:
        process(consumer, options.once)
    except BrokenPipeError:  # the reader of a pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that flushing the rest does not fail
    finally:
        if stop_requests:
            log.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # leaves the group: its partitions are reassigned at once


if __name__ == "__main__":
    main()

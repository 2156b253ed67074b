"""Count each user's actions in the assigned partitions, from the first event; print JSON."""

import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
CLIENT_SETTINGS = json.loads(os.environ.get("KAFKA_CLIENT_SETTINGS", "{}"))  # a login, for example
TOPIC = "events"
GROUP_ID = "event-watchers"  # consumer.py's, for practice: pick your own

stop = False  # set by Ctrl-C and SIGTERM
Batches = dict[TopicPartition, list[Any]]  # what poll() returns: messages by partition


def connect(group: str) -> KafkaConsumer:
    """Return a connected client; exit with status 1 if no broker answers within 10 s."""
    try:
        return KafkaConsumer(
            bootstrap_servers=BOOTSTRAP_SERVERS,
            bootstrap_timeout_ms=10_000,
            client_id="processor.py",  # the member's name in `kafka.admin groups describe`
            group_id=group,
            auto_offset_reset="earliest",  # if offset 0 is deleted, start with what is left
            enable_auto_commit=False,  # consumers in the group would skip what is committed
            isolation_level="read_committed",  # no events of open or aborted transactions
            partition_assignment_strategy=[CooperativeStickyAssignor],  # moves few partitions
            session_timeout_ms=10_000,  # after this, a crashed member's partitions are reassigned
            heartbeat_interval_ms=500,  # a rebalance is noticed within this time
            max_poll_interval_ms=30_000,  # a member that does not poll for this long is removed
            metadata_max_age_ms=10_000,  # new partitions are noticed within this time
            max_poll_records=5_000,  # these must be handled within max_poll_interval_ms
            reconnect_backoff_ms=1_000,  # try again 1 s after a failed connection,
            reconnect_backoff_max_ms=4_000,  # then after 2 s, then every 4 s
            **CLIENT_SETTINGS,
        )
    except (errors.KafkaError, TypeError, ValueError) as error:
        reason = "bad setting" if isinstance(error, ValueError) else error  # to hide a password
        advice = "run docker compose up -d or python tests/broker.py, or check address and login"
        sys.exit(f"--- cannot connect to {BOOTSTRAP_SERVERS} ({reason}); {advice}")


def process(consumer: KafkaConsumer, once: bool) -> None:
    """Count the events that poll() returns and print snapshots; if `once`, only the first."""
    counts, report = Counts(consumer), Report()
    consumer.subscribe([TOPIC], listener=counts)
    while not (stop or (once and report.snapshot)):
        try:
            counts.add(poll(consumer))
            report.print_if_due(counts)
        except errors.KafkaError as error:  # in most outages, poll() returns {} instead
            logging.warning("cannot read events (%s); retrying", error)
            counts.rewind()
            time.sleep(2)
    with contextlib.suppress(errors.KafkaError):  # raised while an end offset is not known
        report.print_if_due(counts, last=True)


def poll(consumer: KafkaConsumer) -> Batches:
    """Return the next events, by partition; {} if there are none within 250 ms."""
    try:
        if consumer.group_metadata().state == MemberState.REBALANCING:
            # kafka-python 3.0.12 may forget a join that takes longer than one poll(), and wait for
            # its partitions for ever (compare KAFKA-9815). No public call asks it to join again.
            consumer._coordinator.request_rejoin()
        return consumer.poll(timeout_ms=250)
    except errors.UnknownBrokerIdError:  # a fetch was not sent, but counts as under way for ever
        consumer._fetcher._nodes_with_pending_fetch_requests.clear()  # no public call does it
        raise
    except (errors.CorruptRecordError, errors.UnsupportedCodecError) as error:
        sys.exit(f"--- cannot read events: {error}")  # a further poll() would raise or hang


def user_and_action(value: Any) -> tuple[str, str]:
    """Return the two fields by which an event is counted; raise an exception if it is malformed."""
    event = json.loads(value.decode())
    user_id, action = event["user_id"], event["action"]
    if not (isinstance(user_id, str) and isinstance(action, str)):
        raise TypeError("the fields that are counted must be strings")
    (user_id + action).encode()  # raises at a lone surrogate, which jq rejects
    return user_id, action


@dataclass
class PartitionState:
    actions: Counter[tuple[str, str]] = field(default_factory=Counter)
    malformed: int = 0
    malformed_example: str = ""  # the latest: where it is, and what is wrong
    next_offset: int = 0  # of the event to count next
    end_offset: int | None = None  # of the log after assignment; None until it is looked up


class Counts(ConsumerRebalanceListener):
    """Counts by assigned partition. In a rebalance, poll() calls the two `on_` methods."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.partitions: dict[TopicPartition, PartitionState] = {}

    def on_partitions_assigned(self, partitions: set[TopicPartition]) -> None:
        for partition in partitions:  # only those that are newly assigned
            self.partitions[partition] = PartitionState()
            self.consumer.seek(partition, 0)  # regardless of the committed offset

    def on_partitions_revoked(self, partitions: set[TopicPartition]) -> None:
        for partition in partitions:  # also those lost when the session timed out
            self.partitions.pop(partition, None)

    def add(self, batches: Batches) -> None:
        for partition, messages in batches.items():
            state = self.partitions[partition]
            for message in messages:
                try:
                    state.actions[user_and_action(message.value)] += 1
                except Exception as error:  # skip it, whatever is wrong with it
                    state.malformed += 1
                    position = f"partition={message.partition} offset={message.offset}"
                    state.malformed_example = f"{position}: {type(error).__name__}: {error}"
            state.next_offset = messages[-1].offset + 1

    def rewind(self) -> None:
        """Seek to the next event to count: poll() may have skipped events before it raised."""
        for partition, state in self.partitions.items():
            self.consumer.seek(partition, state.next_offset)

    def remaining(self) -> int:
        """Return how many offsets are left to read; raise KafkaError while an end is not known."""
        total = 0
        for partition, state in self.partitions.items():
            if state.end_offset is None:
                # One at a time: for several, kafka-python raises KeyError if one has no leader.
                offsets = self.consumer.end_offsets([partition], timeout_ms=5_000)
                state.end_offset = offsets[partition]
            # Unlike next_offset, it moves on past deleted and aborted events; None: not known yet.
            position = self.consumer.position(partition, timeout_ms=0) or 0
            total += max(0, state.end_offset - position)
        return total

    def as_json(self) -> str:
        """Return the counts of all users as JSON: ASCII text that cannot control the terminal."""
        users: dict[str, Counter[str]] = {}
        for state in self.partitions.values():
            for (user_id, action), number in state.actions.items():
                users.setdefault(user_id, Counter())[action] += number
        return json.dumps(users, indent=2, sort_keys=True)

    def scope(self) -> str:
        """Return in words which events are counted, and how many were skipped."""
        numbers = ", ".join(str(p.partition) for p in sorted(self.partitions))
        scope = f"assigned partitions of {TOPIC}: {numbers or 'none yet'}"
        if numbers and len(self.partitions) < len(self.consumer.partitions_for_topic(TOPIC)):
            scope += "; other members have the rest (--group NAME counts all)"
        if malformed := sum(state.malformed for state in self.partitions.values()):
            example = next(s.malformed_example for s in self.partitions.values() if s.malformed)
            scope += f"; malformed events skipped: {malformed}, for example {example}"
        return scope


@dataclass
class Report:
    snapshot: str = ""  # the JSON that was printed last
    status: str = ""  # the line that was logged last
    next_time: float = 0.0  # by time.monotonic()

    def print_if_due(self, counts: Counts, last: bool = False) -> None:
        """Print what has changed, at most once a second; counts only when they are complete."""
        if time.monotonic() < self.next_time and not last:
            return
        remaining = counts.remaining()
        complete = remaining == 0 and bool(counts.partitions)
        snapshot = counts.as_json() if complete else self.snapshot
        status = counts.scope() if remaining == 0 else f"catching up: {remaining:,} offsets to go"
        if snapshot != self.snapshot:
            print(snapshot, flush=True)
        if (snapshot, status) != (self.snapshot, self.status):
            logging.info(status)
        self.snapshot, self.status = snapshot, status
        self.next_time = time.monotonic() + 1


def close_socket(_: logging.LogRecord) -> bool:
    if error := sys.exc_info()[1]:  # kafka-python keeps it, and with its frames the socket
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    return True


def request_stop(*_: Any) -> None:
    global stop
    stop = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the script at once


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="exit after the first snapshot")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # hide kafka-python's own log,
    logging.getLogger("kafka.net.manager").setLevel(logging.WARNING)  # but for failed connections
    logging.getLogger("kafka.net.manager").addFilter(close_socket)  # or an outage leaks sockets
    # Under python -u, stdout may lose output; it also fails at what its encoding lacks.
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C until it is connected
    consumer = connect(options.group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    try:
        process(consumer, options.once)
    except OSError as error:  # a full disk; or the reader of a pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that flushing the rest does not fail
        if not isinstance(error, BrokenPipeError):
            raise  # with its traceback, as it may come from your own code
        sys.exit(f"--- stopped: {error}")
    finally:
        logging.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # its partitions are reassigned at once


if __name__ == "__main__":
    main()

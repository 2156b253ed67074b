"""Counts each user's actions and shows the counts as JSON, of the partitions that it holds.

python processor.py                a member of the group "event-watchers": shares with consumers
python processor.py --group mine   a member of a group of its own: counts everything

KAFKA_BOOTSTRAP_SERVERS in the environment says where Kafka is (default: localhost:9092).
"""

import errno
import json
import logging
import math
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CorruptRecordError, KafkaError, UnsupportedCodecError
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"
# For a cluster that asks who you are: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, … (README)
SECURITY = {
    name.removeprefix("KAFKA_").lower(): value
    for name, value in os.environ.items()
    if name.startswith(("KAFKA_SECURITY_", "KAFKA_SASL_", "KAFKA_SSL_"))
}
REASONS = {  # what kafka-python says of a connection that fails, in plain words
    "DNS Resolution failure": "host name not known",
    "ECONNREFUSED": "connection refused; run `docker compose up -d` or `python tests/broker.py`",
}
log = logging.getLogger("processor.py")
stopping: list[int] = []  # not empty: told to stop
connections: set[Any] = set()  # those that stand, one or more to each broker


class ConnectionLog(logging.Handler):
    """Tells when the connection is lost and back, out of all that kafka-python logs."""

    reason = "no answer"
    lost: bool | None = None  # None: not connected yet

    def emit(self, record: Any) -> None:
        if record.msg == "%s: Connected":
            connections.update(record.args)
            if self.lost:
                log.info("connected to Kafka again")
            self.lost = False
        elif record.msg == "%s: Connection lost: %s":
            connection, reason = record.args[0], str(record.args[1]).rpartition("Error: ")[2]
            plain = next((REASONS[words] for words in REASONS if words in reason), "")
            # Where Kafka has answered before, it was the login that failed.
            login = f"authentication failed ({reason})" if connection.broker_version else ""
            hint = "is Kafka there, and are the security settings right?"
            self.reason = plain or login or f"{reason}; {hint}"
            # One broker of several may go: Kafka is lost with the last connection.
            connections.difference_update([c for c in connections if not c.connected])
            if self.lost is False and not connections:
                self.lost = True
                log.info("no connection to Kafka (%s); trying again until there is one", reason)


def connect(client: Any, **settings: Any) -> Any:
    """A connected client. Without one in 10 s it ends the script: the reason, and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kafka").addHandler(connection_log := ConnectionLog())
    logging.getLogger("kafka").propagate = False
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to finish
    for name, value in SECURITY.items():
        if name not in client.DEFAULT_CONFIG:  # the client would show it with its value
            sys.exit(f"no connection to Kafka: unknown setting KAFKA_{name.upper()}")
        # The client would not say which; Path() raises where the value is a key, not its file.
        if name.endswith("file") and not os.path.exists(value):  # noqa: PTH110
            sys.exit(f"no connection to Kafka: KAFKA_{name.upper()} is not the name of a file")
    # In a thread, for kafka-python 3.0.12 sets no limit to a TLS handshake.
    connecting = ThreadPoolExecutor().submit(
        client,
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # tells the members of a group apart from outside
        reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
        **SECURITY,
        **settings,
    )
    if wait([connecting], timeout=2).not_done:
        log.info("not connected to %s yet", BOOTSTRAP_SERVERS)
    wait([connecting], timeout=8)
    error = connecting.exception() if connecting.done() else connection_log.reason
    if error:
        log.error("no connection to Kafka at %s: %s", BOOTSTRAP_SERVERS, error)
        os._exit(1)  # sys.exit() would wait for the thread
    return connecting.result()


def read_event(value: bytes | None) -> tuple[str, str]:
    """Returns the event's (user_id, action). Raises ValueError, which says why, if it is none."""
    if value is None:
        raise ValueError("no value")
    try:
        event = json.loads(value.decode())
    except (ValueError, RecursionError):  # the latter at 200,000 times "["
        raise ValueError("not JSON") from None
    if type(event) is not dict:
        raise ValueError("not an object")
    for name in ("event_id", "user_id", "action", "timestamp"):
        if type(event.get(name)) is not str:
            raise ValueError(f"{name} is not a string" if name in event else f"no {name}")
    return event["user_id"], event["action"]


@dataclass
class Held:
    """A partition that this processor holds."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    next_offset: int = 0  # of the event to count next
    log_end: int = 0  # when the partition was given
    skipped: int = 0  # malformed events


@dataclass
class Counts(ConsumerRebalanceListener):
    """The counts of each partition held; the log is their only state."""

    held: dict[TopicPartition, Held] = field(default_factory=dict)
    membership: Any = None  # generation, member and state in the group; None: to be taken over
    since: float = 0.0  # when it changed
    share: str = ""  # the line about the partitions held; empty until the group has settled
    failures: int = 0  # of the client, one after another
    skipped_at: str = ""  # where that was, and why; empty when it has been said

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Called within poll(), in which a partition may be lost and regained."""
        for partition in revoked:
            self.held.pop(partition, None)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """take_over() sees to these."""

    def count_next(self, consumer: KafkaConsumer) -> float:
        """Returns, after counting the next events, how many are left of those that the log held
        when the partitions were given; math.inf while that is not known."""
        if consumer.group_metadata().state == MemberState.REBALANCING:
            # A leader of kafka-python 3.0.12 that rejoins because the topic has changed forgets it
            # if poll() ends before the join: _perform_assignment() clears the cause.
            consumer._coordinator.request_rejoin()
        polled = consumer.poll(timeout_ms=250)
        membership = consumer.group_metadata()
        if membership != self.membership:  # after a rebalance, what was polled may start anywhere
            self.membership, self.since, self.share = None, time.monotonic(), ""
            if membership.state == MemberState.STABLE:
                self.take_over(consumer)
                self.membership = membership
            return math.inf
        left = 0.0
        for partition, held in self.held.items():
            messages = polled.get(partition, [])
            # position() is not the last offset counted: retention and compaction leave gaps.
            position = messages[0].offset if messages else consumer.position(partition, 0)
            if position is None:  # it is being looked up
                left = math.inf
            elif position < held.next_offset:  # the topic was deleted and created anew
                self.held, self.membership = {}, None
                return math.inf
            else:
                self.add(held, messages)
                left += max(0, held.log_end - max(position, held.next_offset))
        return left

    def take_over(self, consumer: KafkaConsumer) -> None:
        """Goes on where it was in the partitions that it keeps, and starts the new ones at 0."""
        self.held = {p: self.held.get(p) or Held() for p in consumer.assignment()}
        for partition, held in self.held.items():
            consumer.seek(partition, held.next_offset)
            # One by one: of several, kafka-python 3.0.12 raises KeyError if one has no leader.
            held.log_end = consumer.end_offsets([partition], timeout_ms=1_000)[partition]

    def add(self, held: Held, messages: list[Any]) -> None:
        for message in messages:
            try:
                held.counts[read_event(message.value)] += 1
            except ValueError as why:
                held.skipped += 1
                place = f"partition={message.partition} offset={message.offset}"
                self.skipped_at = f"{place}: {why}"
        if messages:
            held.next_offset = messages[-1].offset + 1


def as_json(partitions: Iterable[Held]) -> str:
    """The counts of these partitions together: users, and how often each did what."""
    users: dict[str, Counter[str]] = {}
    for held in partitions:
        for (user_id, action), number in held.counts.items():
            users.setdefault(user_id, Counter())[action] += number
    # json.dumps() escapes all but ASCII, so that no user_id can drive the terminal.
    return json.dumps(users, indent=2, sort_keys=True)


def share_line(consumer: KafkaConsumer, settled: bool) -> str:
    """Which partitions are counted, in under 100 columns; empty where more may come soon."""
    group = consumer.group_metadata().group_id
    held = sorted(partition for _, partition in consumer.assignment())
    if not (held or settled):
        return ""
    everything = consumer.partitions_for_topic(TOPIC)
    if not everything:
        return f"counting nothing, waiting: there is no topic {TOPIC}, or no right to read it"
    others = sorted(everything.difference(held))
    counting = f"counting partition{'s' * (len(held) > 1)} {', '.join(map(str, held))}"
    if not others or not settled:
        return "" if others else f"{counting}: everything"
    counting = f"{counting} only" if held else "counting nothing"
    how = f"(everything: --group {'other' if group == 'mine' else 'mine'})"
    line = f"{counting}; others of {group} hold {', '.join(map(str, others))} {how}"
    if len(line) >= 100:
        line = f"counting {len(held)} of {len(everything)} partitions {how}"
    return line


def read_on(consumer: KafkaConsumer, counts: Counts) -> float:
    """As Counts.count_next(), but waits and returns math.inf where Kafka cannot do it just now."""
    try:
        left = counts.count_next(consumer)
        if counts.membership and not counts.share:
            # A newcomer gets nothing at first: the others have to give something up for it.
            counts.share = share_line(consumer, settled=time.monotonic() - counts.since > 2)
        counts.failures = 0
        return left
    except (CorruptRecordError, UnsupportedCodecError):
        raise  # the next poll() of kafka-python 3.0.12 would not return: fetched_records() loops
    except KafkaError as error:
        # poll() of kafka-python 3.0.12 may raise after Fetcher.fetch_records() has taken
        # events from its buffer: the positions have moved, but nobody has counted them.
        counts.membership = None
        counts.failures += 1
        if counts.failures == (5 if error.retriable else 1):  # the former pass, as a rule
            log.warning("cannot go on (%s); trying again", error)
        time.sleep(0.5)
        return math.inf


def count_events(consumer: KafkaConsumer, once: bool) -> None:
    """Counts, and shows the counts, until told to stop or with `once` until it has shown some."""
    counts = Counts()
    consumer.subscribe([TOPIC], listener=counts)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    printed = said = ""
    next_report = time.monotonic() + 2  # the first counts do not wait for it
    last_round = False
    while not (last_round or (once and printed)):
        last_round = bool(stopping)
        left, now = read_on(consumer, counts), time.monotonic()
        if counts.share and counts.share != said:
            said = counts.share
            log.info(said)
        if not counts.share or (now < next_report and not last_round and (printed or left)):
            continue
        next_report = now + 1
        if counts.skipped_at:
            skipped = sum(held.skipped for held in counts.held.values())
            log.warning("malformed events skipped: %d, the last at %s", skipped, counts.skipped_at)
            counts.skipped_at = ""
        if 0 < left < math.inf:
            log.info("%s events still to read", f"{left:,.0f}")
        text = printed if left else as_json(counts.held.values())
        if text != printed and (counts.held or printed):
            print(text, flush=True)
            printed = text
            if terminal and "(everything" in said:
                log.info(said)  # the counts have scrolled it away
            # Printing takes less than a tenth of the time, however many users there are.
            next_report = now + max(1, 15 * (time.monotonic() - now))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="show the counts once, and end")
    options = parser.parse_args()
    if not options.group:
        parser.error("--group: a group needs a name")
    consumer = connect(
        KafkaConsumer,
        group_id=options.group,
        auto_offset_reset="earliest",  # where events are gone: from the first that is left
        enable_auto_commit=False,  # what it counts is still the consumers' to read
        partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
        session_timeout_ms=10_000,  # a member that died is noticed after this
        heartbeat_interval_ms=500,  # a member that came or left is noticed after this
        metadata_max_age_ms=10_000,  # new partitions are noticed after this
        max_partition_fetch_bytes=4 * 1024 * 1024,  # fewer, larger fetches while catching up
        fetch_max_wait_ms=100,  # a partition read to its end holds up the others no longer
        max_poll_records=5_000,  # so many events are counted between two looks at the rest
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    status = None
    try:
        count_events(consumer, options.once)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # | head has read enough; on Windows
            status = f"cannot write the output: {error.strerror}"
    except (CorruptRecordError, UnsupportedCodecError) as error:
        status = f"cannot read the events: {error}"
    consumer.close(timeout_ms=5_000)  # leaves the group, so that others take over at once
    sys.exit(status)


if __name__ == "__main__":
    main()

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
log = logging.getLogger("processor.py")  # kafka_log, further down, watches the connection
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


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
    log_end: int | None = None  # when the partition was given; None: to be looked up
    malformed: int = 0


class Counts(ConsumerRebalanceListener):
    """The counts of each partition held, from its first event on: the log is their only state."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.held: dict[TopicPartition, Held] = {}
        self.last_malformed = ""  # where that was, and why; empty when it has been said

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Called within poll(), in which a partition may be lost and given again."""
        for partition in revoked:
            self.held.pop(partition, None)

    def on_partitions_assigned(self, _: Any) -> None:
        self.take_over()

    def take_over(self) -> None:
        """Goes on where it was in the partitions that it keeps, and starts the new ones at 0."""
        self.held = {p: self.held.get(p) or Held() for p in self.consumer.assignment()}
        for partition, held in self.held.items():
            self.consumer.seek(partition, held.next_offset)

    def count_next(self) -> float:
        """Returns, after counting the next events, how many are left of those that the log held
        when the partitions were given; math.inf while that is not known."""
        polled = self.consumer.poll(timeout_ms=250)
        left = 0.0
        for partition, held in self.held.items():
            if held.log_end is None:
                # One by one: of several, kafka-python 3.0.12 raises KeyError if one has no leader.
                ends = self.consumer.end_offsets([partition], timeout_ms=1_000)
                held.log_end = ends[partition]
            messages = polled.get(partition, [])
            # position() is not the last offset counted: retention and compaction leave gaps.
            # It waits, for 300 ms at most, for what is being looked up.
            position = messages[0].offset if messages else self.consumer.position(partition, 300)
            if position is None:  # it is being looked up
                left = math.inf
            elif position < held.next_offset:  # the topic was deleted and created anew
                self.held = {}
                self.take_over()
                return math.inf
            else:
                self.add(held, messages)
                left += max(0, held.log_end - max(position, held.next_offset))
        return left

    def add(self, held: Held, messages: list[Any]) -> None:
        for message in messages:
            try:
                held.counts[read_event(message.value)] += 1
            except ValueError as why:
                held.malformed += 1
                place = f"partition={message.partition} offset={message.offset}"
                self.last_malformed = f"{place}: {why}"
        if messages:
            held.next_offset = messages[-1].offset + 1

    def as_json(self) -> str:
        """Users, and how often each did what."""
        users: dict[str, Counter[str]] = {}
        for held in self.held.values():
            for (user_id, action), number in held.counts.items():
                users.setdefault(user_id, Counter())[action] += number
        # json.dumps() escapes all but ASCII, so that no user_id can drive the terminal.
        return json.dumps(users, indent=2, sort_keys=True)


def share_line(consumer: KafkaConsumer, settled: bool) -> str:
    """Which partitions it counts; empty while a newcomer waits for the others to give some up."""
    group = consumer.group_metadata().group_id
    held = sorted(partition for _, partition in consumer.assignment())
    # consumer.partitions_for_topic() would ask again, for up to 30 s, where there is no topic.
    others = sorted((consumer._cluster.partitions_for_topic(TOPIC) or set()).difference(held))
    counting = f"counting partition{'s' * (len(held) > 1)} {', '.join(map(str, held))}"
    if held and not others:
        return f"{counting}: everything"
    if not settled:
        return ""
    if not others:
        return f"counting nothing, waiting: there is no topic {TOPIC}, or no right to read it"
    counting = f"{counting} only" if held else "counting nothing"
    how = f"(everything: --group {'other' if group == 'mine' else 'mine'})"
    line = f"{counting}; others of {group} hold {', '.join(map(str, others))} {how}"
    if len(line) < 100:  # so that a terminal has it in one line
        return line
    return f"counting {len(held)} of {len(held) + len(others)} partitions {how}"


def report(counts: Counts, left: float, printed: str, share: str) -> str:
    """Says what was skipped and how much is left to read; where nothing is, shows the counts.

    Returns the counts shown last, `printed` if these are the same.
    """
    if counts.last_malformed:
        number = sum(held.malformed for held in counts.held.values())
        log.warning("malformed events skipped: %d, the last at %s", number, counts.last_malformed)
        counts.last_malformed = ""
    if left:
        if left < math.inf:
            log.info("%s events still to read", f"{left:,.0f}")
        return printed
    text = counts.as_json()
    if text == printed or not (counts.held or printed):
        return printed
    print(text, flush=True)
    if "(everything" in share and sys.stdout.isatty() and sys.stderr.isatty():
        log.info(share)  # it counts a part only, and the counts have scrolled that away
    return text


def count_events(consumer: KafkaConsumer, once: bool) -> None:
    """Counts, and shows the counts, until told to stop or with `once` until it has shown some."""
    counts = Counts(consumer)
    consumer.subscribe([TOPIC], listener=counts)  # told which partitions come and go
    known, since, failures = consumer.group_metadata(), 0.0, 0
    printed = share = said = ""
    next_report = time.monotonic() + 2  # the first counts do not wait for it
    last_round = False
    while not (last_round or (once and printed)):
        last_round = bool(stopping)
        try:
            if failures:
                # poll() of kafka-python 3.0.12 may raise after Fetcher.fetch_records() has taken
                # events from its buffer: the positions have moved, but nobody has counted them.
                counts.take_over()
            if known.state == MemberState.REBALANCING:
                # A leader of kafka-python 3.0.12 that rejoins because the topic has changed forgets
                # it if poll() ends before the join: _perform_assignment() clears the cause.
                consumer._coordinator.request_rejoin()
            left, now = counts.count_next(), time.monotonic()
            if (membership := consumer.group_metadata()) != known:
                known, since, share = membership, now, ""
            if known.state == MemberState.STABLE and not share:
                share = share_line(consumer, settled=now - since > 2)
            failures = 0
        except (CorruptRecordError, UnsupportedCodecError) as error:
            sys.exit(f"cannot read the events: {error}")  # kafka-python 3.0.12 loops in poll() now
        except KafkaError as error:
            failures += 1
            if failures % 20 == 5 and not kafka_log.lost:  # most errors pass sooner
                log.warning("cannot go on (%s); trying again", error)
            time.sleep(0.5)
            continue
        if share and share != said:
            said = share
            log.info(said)
        if not share or (now < next_report and not last_round and (printed or left)):
            continue
        printed = report(counts, left, printed, share)
        # Printing takes less than a tenth of the time, however many users there are.
        next_report = now + max(1, 15 * (time.monotonic() - now))


# From here to connect(), as the settings above, the same in all three scripts: each stands alone.
class KafkaLog(logging.Handler):
    """Tells when the connection is lost and back, by the texts that kafka-python 3.0.12 logs."""

    connections: frozenset[Any] = frozenset()  # those that stand, one or more to each broker
    lost: bool | None = None  # None: not connected yet
    reason = "no answer"  # why there is no connection yet, for connect()
    address = BOOTSTRAP_SERVERS  # of the broker tried last, by the name that it gives itself

    def emit(self, record: Any) -> None:
        if record.msg == "Initializing connection for node_id %s at %s:%s (rack=%s)":
            self.address = f"{record.args[1]}:{record.args[2]}"
        elif record.msg == "%s: Connected":
            self.connections |= {record.args[0]}
            if self.lost:
                log.info("connected to Kafka again")
            self.lost = False
        elif record.msg == "%s: Connection lost: %s":
            reason = str(record.args[1]).rpartition("Error: ")[2]
            if "ECONNREFUSED" in reason:
                start = "run `docker compose up -d` or `python tests/broker.py`"
                self.reason = f"connection refused; {start}"
            elif "DNS" in reason:
                self.reason = "host name not known"
            elif record.args[0].broker_version:  # Kafka has answered: it was the login that failed
                self.reason = f"authentication failed ({reason})"
            else:
                self.reason = f"{reason}; is Kafka there, and are the security settings right?"
            # One broker of several may go: Kafka is lost with the last connection.
            self.connections = frozenset(c for c in self.connections if c.connected)
            if self.lost is False and not self.connections:
                self.lost = True
                log.info("no connection to Kafka at %s (%s); trying again", self.address, reason)


kafka_log = KafkaLog()


def connect(client: Any, **settings: Any) -> Any:
    """A connected client. Without one in 10 s it ends the script: the reason, and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kafka").addHandler(kafka_log)
    logging.getLogger("kafka").propagate = False
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to finish
    if unknown := SECURITY.keys() - client.DEFAULT_CONFIG:  # the client would show their values
        sys.exit(f"no connection to Kafka: unknown setting KAFKA_{unknown.pop().upper()}")
    protocols = ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
    if SECURITY.get("security_protocol", "PLAINTEXT") not in protocols:  # taken for PLAINTEXT
        sys.exit(f"no connection to Kafka: KAFKA_SECURITY_PROTOCOL is none of {protocols}")
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
    error = connecting.exception() if connecting.done() else kafka_log.reason
    if error:
        log.error("no connection to Kafka at %s: %s", BOOTSTRAP_SERVERS, error)
        os._exit(1)  # sys.exit() would wait for the thread
    return connecting.result()


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
        fetch_max_wait_ms=100,  # longer, a partition read to its end holds up the others
        max_poll_records=5_000,  # so many events are counted between two looks at the rest
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    try:
        count_events(consumer, options.once)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # | head has read enough; on Windows
            sys.exit(f"cannot write the output: {error.strerror}")
    finally:
        consumer.close(timeout_ms=5_000)  # leaves the group, so that others take over at once


if __name__ == "__main__":
    main()

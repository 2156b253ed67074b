"""Counts each user's actions and shows the counts as JSON, of the partitions that it holds.

python processor.py                a member of the group "event-watchers": shares with consumers
python processor.py --group mine   the only member of a group: counts everything
"""

import argparse
import json
import logging
import math
import os
import select
import signal
import sys
import time
from collections import Counter
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"

log = logging.getLogger("processor")
stopping = 0.0  # when the first signal came


def stop(signum: int, frame: object) -> None:
    """Ctrl-C or SIGTERM: finish the work in hand, then end; the second time, end at once."""
    global stopping
    now = time.monotonic()
    if stopping and now - stopping > 0.2:  # sooner, it is one signal sent twice, as timeout(1) does
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    stopping = stopping or now


class ConnectionWatch(logging.Handler):
    """Makes two plain lines of all that kafka-python logs: the connection is lost; it is back."""

    state = "new"

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.endswith(": Connected"):
            if self.state == "lost":
                log.warning("connected to Kafka again")
            self.state = "connected"
        elif ": Connection lost: " in text and self.state == "connected":
            log.warning("lost the connection to Kafka; trying again until it is back")
            self.state = "lost"


def connect(group: str) -> KafkaConsumer:
    """Ends the script with one line and status 1 if there is no broker within 10 s."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kafka").addHandler(ConnectionWatch())
    logging.getLogger("kafka").propagate = False
    for signum in (signal.SIGINT, signal.SIGTERM):
        # Nothing to finish yet; and kafka-python's event loop would swallow a SystemExit.
        signal.signal(signum, lambda *_: os._exit(0))
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=BOOTSTRAP_SERVERS,
            group_id=group,
            auto_offset_reset="earliest",  # where events are gone: from the first that is left
            enable_auto_commit=False,  # what it counts is still the consumers' to read
            partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
            session_timeout_ms=10_000,  # a member that died is noticed after this
            heartbeat_interval_ms=500,  # a member that came or left is noticed after this
            metadata_max_age_ms=10_000,  # new partitions are noticed after this
            bootstrap_timeout_ms=10_000,  # say soon that there is no broker
            reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
            max_partition_fetch_bytes=4 * 1024 * 1024,  # fewer, larger fetches while catching up
            fetch_max_wait_ms=100,  # a partition read to its end holds up the others no longer
            max_poll_records=5_000,  # so many events are counted between two looks at the rest
        )
    except (KafkaError, ValueError):
        sys.exit(
            f"no Kafka broker at {BOOTSTRAP_SERVERS}; start one with "
            "`docker compose up -d --wait` or `python tests/broker.py`"
        )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return consumer


# JSON numbers of any size are fine (int() refuses 4,300 digits); NaN, which int() refuses, is not.
parse = json.JSONDecoder(parse_int=float, parse_constant=int).decode
FIELDS = ("event_id", "user_id", "action", "timestamp")


def reader_is_gone() -> bool:
    """Whether nobody reads stdout any more (| head), which an idle script would not notice."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def read_event(value: bytes | None) -> tuple[str, str]:
    """Returns the event's (user_id, action). Raises ValueError, which says why, if it is none."""
    if value is None:
        raise ValueError("no value")
    try:
        event = parse(value.decode())
    except (ValueError, RecursionError):  # the latter at 200,000 times "["
        raise ValueError("not JSON") from None
    if type(event) is not dict:
        raise ValueError("not an object")
    for field in FIELDS:
        if type(event.get(field)) is not str:
            raise ValueError(f"{field} is not a string" if field in event else f"no {field}")
    return event["user_id"], event["action"]


class Counts(ConsumerRebalanceListener):
    """The counts of each partition held; the log is their only state.

    kafka-python calls on_partitions_... on a thread of its own, but only while poll() or close()
    waits for it, so nothing here needs a lock. They must not block.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.by_partition: dict[TopicPartition, Counter[tuple[str, str]]] = {}
        self.next_offset: dict[TopicPartition, int] = {}
        # Of partitions not read that far yet: where the log ended when they were given.
        self.log_end: dict[TopicPartition, float] = {}
        self.changed = self.held_some = False
        self.read = 0  # messages of such partitions, since all had been read
        self.skipped = 0
        self.last_skipped = ""

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        for partition in assigned:
            self.start(partition)

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        for partition in revoked:
            del self.by_partition[partition], self.next_offset[partition]
            self.log_end.pop(partition, None)
        self.changed = True

    def start(self, partition: TopicPartition) -> None:
        """Counts the partition from its first event on."""
        self.by_partition[partition] = Counter()
        self.next_offset[partition] = 0
        self.log_end[partition] = math.inf
        self.consumer.seek_to_beginning(partition)
        self.changed = self.held_some = True

    def add(self, partition: TopicPartition, messages: list[Any]) -> None:
        if messages[0].offset < self.next_offset[partition]:
            self.start(partition)  # the topic was deleted and created anew
            return
        counts = self.by_partition[partition]
        for message in messages:
            try:
                counts[read_event(message.value)] += 1
            except ValueError as why:
                self.skipped += 1
                self.last_skipped = (
                    f"at partition={message.partition} offset={message.offset}: {why}"
                )
        self.next_offset[partition] = messages[-1].offset + 1
        self.changed = True
        self.read = self.read + len(messages) if self.log_end else 0

    def still_to_read(self) -> float:
        """How many events the log held, when it gave the partitions, that are not counted yet."""
        left = 0.0
        for partition, next_offset in list(self.next_offset.items()):
            position = self.consumer.position(partition, timeout_ms=0)
            if position is not None and position < next_offset:
                self.start(partition)  # kafka-python went back: as below, it is another log
            if partition not in self.log_end:
                continue
            highwater = self.consumer.highwater(partition)
            if highwater is None or position is None:  # nothing has been fetched yet
                left = math.inf
                continue
            # The first one known; it grows from then on, unless the topic is created anew.
            self.log_end[partition] = min(self.log_end[partition], highwater)
            if position < self.log_end[partition]:
                left += self.log_end[partition] - position
            else:
                del self.log_end[partition]
        return left

    def whole(self) -> bool:
        """Whether all has been counted that the log held when it gave the partitions, if any."""
        return self.held_some and not self.log_end

    def resume(self) -> None:
        """Goes on after the last event counted: a poll() that raised may have dropped events."""
        for partition, offset in self.next_offset.items():
            self.consumer.seek(partition, offset)

    def as_json(self) -> str:
        total: Counter[tuple[str, str]] = Counter()
        for counts in self.by_partition.values():
            total.update(counts)
        users: dict[str, dict[str, int]] = {}
        for (user_id, action), number in total.items():
            users.setdefault(user_id, {})[action] = number
        # json.dumps() escapes all but ASCII, so that no user_id can drive the terminal.
        return json.dumps(users, indent=2, sort_keys=True)


class Reporter:
    """What the processor says on stderr, each thing when it is news and not too often."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.share: tuple[list[int], list[int]] | None = None
        self.share_since = 0.0
        self.share_said: tuple[list[int], list[int]] = ([], [])
        self.skipped_said = 0
        self.next_skipped = 0.0
        self.next_progress = time.monotonic() + 2
        self.in_place = False
        self.error_said = ""

    def counted(self, share: tuple[list[int], list[int]] | None) -> None:
        """Says which partitions of the topic are counted, and how to count them all."""
        now = time.monotonic()
        if share != self.share:
            self.share, self.share_since = share, now
        # A newcomer waits a moment for what the others are about to give up.
        if share in (None, self.share_said) or (share[1] and now - self.share_since < 1):
            return
        self.share_said = share
        held, others = (", ".join(map(str, partitions)) for partitions in share)
        counting = f"partition{'s' * (len(share[0]) > 1)} {held}" if held else "nothing"
        if others:
            log.info(
                "counting %s; other members of %s hold %s (to count everything: "
                "processor.py --group NAME, with a group of its own)",
                *(counting, self.group, others),
            )
        else:
            log.info("counting %s", f"{counting}: everything" if held else counting)

    def skipped(self, number: int, last: str) -> None:
        """Says how many malformed events were skipped so far and where the last one was."""
        if number > self.skipped_said and time.monotonic() >= self.next_skipped:
            log.warning("malformed events skipped: %d, the last %s", number, last)
            self.skipped_said = number
            self.next_skipped = time.monotonic() + 1

    def progress(self, read: int, left: float) -> None:
        """Says how far a catch-up has come, once it has taken 2 s."""
        now = time.monotonic()
        if 0 < left < math.inf and now >= self.next_progress:
            text = f"read {read:,} of {read + left:,.0f} events"
            if sys.stderr.isatty():
                print(text, end="\r", file=sys.stderr, flush=True)
                self.in_place = True
                self.next_progress = now + 0.5
            else:
                log.info(text)
                self.next_progress = now + 5
        elif left == 0:
            if self.in_place:
                print(f"read {read:,} of {read:,} events", file=sys.stderr, flush=True)
                self.in_place = False
            self.next_progress = now + 2

    def trouble(self, error: KafkaError) -> None:
        # That the connection is lost has been said; what is left is for the reader to mend.
        if not error.retriable and str(error) != self.error_said:
            self.error_said = str(error)
            log.warning("%s; trying again", error)


def share_of(consumer: KafkaConsumer) -> tuple[list[int], list[int]] | None:
    """The topic's partitions that this processor holds and the others; None while that changes."""
    if consumer.group_metadata().state != MemberState.STABLE:
        return None
    held = sorted(partition for _, partition in consumer.assignment())
    return held, sorted(consumer.partitions_for_topic(TOPIC).difference(held))


def count_events(consumer: KafkaConsumer, counts: Counts, report: Reporter) -> None:
    """Until told to stop: counts the events that come, and prints the counts when they changed."""
    next_print = 0.0
    left = math.inf
    while not (stopping or reader_is_gone()):
        try:
            if consumer.group_metadata().state == MemberState.REBALANCING:
                # kafka-python 3.0.12 forgets the rejoin of a leader that saw the topic change, if
                # the last poll() was over before it: _perform_assignment() clears its cause.
                consumer._coordinator.request_rejoin()
            for partition, messages in consumer.poll(timeout_ms=250).items():
                counts.add(partition, messages)
            left = counts.still_to_read()
            report.counted(share_of(consumer))
        except KafkaError as error:
            report.trouble(error)
            counts.resume()
            time.sleep(0.5)
        report.skipped(counts.skipped, counts.last_skipped)
        report.progress(counts.read, left)
        now = time.monotonic()
        if counts.whole() and counts.changed and now >= next_print:
            print(counts.as_json(), flush=True)
            counts.changed = False
            # Printing takes less than a tenth of the time, however many users there are.
            next_print = now + max(1.0, 15 * (time.monotonic() - now))
    report.next_skipped = 0
    report.skipped(counts.skipped, counts.last_skipped)
    if counts.whole():
        print(counts.as_json(), flush=True)
    elif counts.by_partition:
        log.warning("ended before it had read everything: no counts")


def main() -> None:
    parser = argparse.ArgumentParser(description="Count each user's actions.")
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    options = parser.parse_args()
    if not options.group:
        parser.error("--group: a group needs a name")
    consumer = connect(options.group)
    counts = Counts(consumer)
    consumer.subscribe([TOPIC], listener=counts)
    try:
        count_events(consumer, counts, Reporter(options.group))
    except BrokenPipeError:  # nobody reads on (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        consumer.close(timeout_ms=5_000)  # leaves the group, so that others take over at once


if __name__ == "__main__":
    main()

"""Print the events of a topic as they arrive. Start several: they share its partitions.

python consumer.py --group mine   alone in a group, it is assigned all partitions
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
CLIENT_SETTINGS = json.loads(os.environ.get("KAFKA_CLIENT_SETTINGS", "{}"))  # a login, for example
TOPIC = "events"
GROUP_ID = "event-watchers"

log = logging.getLogger("consumer.py")
outages = logging.getLogger("kafka.net.manager")  # kafka-python logs failed connections; throttled
next_times: dict[str, float] = {}  # when throttle() next lets a message through, by source file
stop = False  # set by Ctrl-C and SIGTERM
Batches = dict[TopicPartition, list[Any]]  # what poll() returns: messages by partition


def connect(group: str) -> KafkaConsumer:
    """Return a connected client; exit with status 1 if no broker answers within 10 s."""
    try:
        return KafkaConsumer(
            bootstrap_servers=BOOTSTRAP_SERVERS,
            bootstrap_timeout_ms=10_000,
            client_id=log.name,  # the member's name in `kafka.admin groups describe`
            group_id=group,
            auto_offset_reset="earliest",  # without a committed offset, start at the beginning
            enable_auto_commit=False,  # it could commit events that have not been printed
            isolation_level="read_committed",  # wait for open transactions, skip aborted ones
            partition_assignment_strategy=[CooperativeStickyAssignor],  # moves few partitions
            session_timeout_ms=10_000,  # after this, a crashed member's partitions are reassigned
            heartbeat_interval_ms=500,  # a rebalance is noticed after at most this
            max_poll_interval_ms=30_000,  # a member that does not poll for this long is removed
            metadata_max_age_ms=10_000,  # new partitions are noticed after at most this
            fetch_max_bytes=2 * 1024 * 1024,  # the default, 50 MB, may time out on a slow line
            max_poll_records=5_000,  # these must be handled within max_poll_interval_ms
            reconnect_backoff_max_ms=1_000,  # reconnect within a second of the broker's return
            **CLIENT_SETTINGS,
        )
    except (errors.KafkaError, TypeError, ValueError) as error:
        reason = "bad setting" if isinstance(error, ValueError) else error  # hides passwords
        start = "start Kafka with docker compose up -d or python tests/broker.py"
        advice = "check KAFKA_CLIENT_SETTINGS" if CLIENT_SETTINGS else start
        advice += ", or check KAFKA_BOOTSTRAP_SERVERS"
        sys.exit(f"--- cannot connect to {BOOTSTRAP_SERVERS} ({reason}); {advice}")


def consume(consumer: KafkaConsumer) -> None:
    """Print the events that poll() returns, then commit them, until told to stop."""
    consumer.subscribe([TOPIC])
    assigned, committed = None, True
    while not stop:
        batches = poll(consumer)
        if consumer.assignment() != assigned:
            assigned = consumer.assignment()
            numbers = ", ".join(str(number) for _, number in sorted(assigned))
            log.info("assigned partitions of %s: %s", TOPIC, numbers or "none yet")
        print_events(batches)
        # Commit only now: after a crash before this line, the events are printed again, not lost.
        if batches or not committed:
            committed = commit(consumer)


def print_events(batches: Batches) -> None:
    for messages in batches.values():
        for message in messages:
            position = f"partition={message.partition} offset={message.offset}"
            print(f"{position} key={printable(message.key)} {printable(message.value)}")
    sys.stdout.flush()


def printable(data: bytes | None) -> str:
    """Return the data as one line of text that cannot control the terminal."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def commit(consumer: KafkaConsumer) -> bool:
    """Commit the position in each partition; return False if that should be tried again."""
    try:
        consumer.commit(timeout_ms=5_000)
    except errors.KafkaError as error:
        outages.warning("%s; the last events may be printed again", error)
        return False
    return True


def poll(consumer: KafkaConsumer) -> Batches:
    """Return the next events of each partition; {} if there are none within 250 ms.

    After an error, the positions may be past events that poll() has not returned: rewind.
    """
    try:
        if consumer.group_metadata().state == MemberState.REBALANCING:
            # Private: no public call asks for a rejoin. Without it, a member whose join takes
            # longer than a poll() may wait for its partitions for ever (compare KAFKA-9815).
            consumer._coordinator.request_rejoin()
        return consumer.poll(timeout_ms=250)
    except (errors.CorruptRecordError, errors.UnsupportedCodecError) as error:
        sys.exit(f"--- cannot read events: {error}")  # a further poll() would raise or hang
    except errors.KafkaError as error:
        outages.warning("%s; retrying", error)
    while not stop:
        time.sleep(0.5)
        with contextlib.suppress(errors.KafkaError):
            rewind(consumer)
            return {}
    sys.exit()  # do not return: the positions are not rewound


def rewind(consumer: KafkaConsumer) -> None:
    """Seek to the committed offset in each partition, or to 0 if there is none."""
    for partition in consumer.assignment():
        consumer.seek(partition, consumer.committed(partition, timeout_ms=5_000) or 0)


def throttle(record: logging.LogRecord) -> bool:
    """Let one log message in 10 s through from each source file."""
    due = time.monotonic() >= next_times.get(record.pathname, 0)
    if due:
        next_times[record.pathname] = time.monotonic() + 10
    return due


def request_stop(*_: Any) -> None:
    global stop
    stop = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the script at once


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    group = parser.parse_args().group
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    outages.setLevel(logging.WARNING)
    outages.addFilter(throttle)
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # lossless despite -u
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is connected, Ctrl-C ends it at once
    consumer = connect(group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    try:
        consume(consumer)
    except BrokenPipeError:  # the reader of a pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that flushing the rest does not fail
    finally:
        log.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # leaves the group: its partitions are reassigned at once


if __name__ == "__main__":
    main()

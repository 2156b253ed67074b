"""Shows the events of the topic as they come. Start several: they share its partitions.

python consumer.py                a member of the group "event-watchers"
python consumer.py --group mine   the first member of another group: it gets every event as well
"""

import argparse
import io
import logging
import os
import select
import signal
import sys
import time

from kafka import KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import MemberState

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"

log = logging.getLogger("consumer")
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
            TOPIC,
            bootstrap_servers=BOOTSTRAP_SERVERS,
            group_id=group,
            auto_offset_reset="earliest",  # where the group has committed nothing: from the start
            enable_auto_commit=False,  # which would commit events not yet shown
            partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
            session_timeout_ms=10_000,  # a member that died is noticed after this
            heartbeat_interval_ms=500,  # a member that came or left is noticed after this
            metadata_max_age_ms=10_000,  # new partitions are noticed after this
            bootstrap_timeout_ms=10_000,  # say soon that there is no broker
            reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
            max_partition_fetch_bytes=4 * 1024 * 1024,  # fewer, larger fetches while catching up
            fetch_max_wait_ms=100,  # a partition read to its end holds up the others no longer
            max_poll_records=5_000,  # and fewer commits
        )
    except (KafkaError, ValueError):
        sys.exit(
            f"no Kafka broker at {BOOTSTRAP_SERVERS}; start one with "
            "`docker compose up -d --wait` or `python tests/broker.py`"
        )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return consumer


def shown(data: bytes | None) -> str:
    """One line that cannot drive the terminal: what is not printable UTF-8 is escaped."""
    if data is None:
        return "null"
    text = data.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reader_is_gone() -> bool:
    """Whether nobody reads stdout any more (| head), which an idle script would not notice."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def rewind(consumer: KafkaConsumer) -> None:
    """Goes back, on all partitions held, to where the group has committed."""
    for partition in consumer.assignment():
        offset = consumer.committed(partition, timeout_ms=1_000)
        if offset is None:
            consumer.seek_to_beginning(partition)
        else:
            consumer.seek(partition, offset)


def show_events(consumer: KafkaConsumer) -> None:
    """Until told to stop: print the events that come, then commit them."""
    held = None
    uncommitted = failed = False
    last_error = ""
    while not (stopping or reader_is_gone()):
        try:
            if failed:
                # poll() raised, and kafka-python's fetch_records() may by then have taken events
                # from its buffer: their positions have moved, but nobody has seen them.
                rewind(consumer)
                failed = uncommitted = False
            if consumer.group_metadata().state == MemberState.REBALANCING:
                # kafka-python 3.0.12 forgets the rejoin of a leader that saw the topic change, if
                # the last poll() was over before it: _perform_assignment() clears its cause.
                consumer._coordinator.request_rejoin()
            batches = consumer.poll(timeout_ms=500)
        except KafkaError as error:
            failed = True
            # That the connection is lost has been said; what is left is for the reader to mend.
            if not error.retriable and str(error) != last_error:
                last_error = str(error)
                log.warning("%s; trying again", error)
            time.sleep(0.5)
            continue
        assignment = sorted(partition for _, partition in consumer.assignment())
        if consumer.group_metadata().state == MemberState.STABLE and assignment != held:
            held = assignment
            log.info("partitions: %s", ", ".join(map(str, held)) or "none, others have them")
        for (_, partition), messages in batches.items():
            prefix = f"partition={partition} offset="
            sys.stdout.writelines(
                f"{prefix}{message.offset} key={shown(message.key)} {shown(message.value)}\n"
                for message in messages
            )
        sys.stdout.flush()
        # Only now: a crash before this line shows these events again, and none is ever lost.
        uncommitted = uncommitted or bool(batches)
        if uncommitted:
            try:
                consumer.commit(timeout_ms=1_000)
                uncommitted = False
            except KafkaError:
                pass  # the broker is away or the group is changing: next time round
    if uncommitted:
        log.warning("could not commit the last events: they will be shown again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the events as they come.")
    parser.add_argument("--group", default=GROUP_ID, metavar="NAME", help="(default: %(default)s)")
    options = parser.parse_args()
    if not options.group:
        parser.error("--group: a group needs a name")
    consumer = connect(options.group)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot show is escaped
    try:
        show_events(consumer)
    except BrokenPipeError:  # nobody reads on (| head); what was not printed is not committed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        consumer.close(timeout_ms=5_000)  # leaves the group, so that others take over at once


if __name__ == "__main__":
    main()

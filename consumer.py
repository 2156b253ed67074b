"""Print the events of a topic as they arrive. Start several: they share its partitions.

python consumer.py --group mine   alone in a group, it is assigned all partitions
"""

import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
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
log = logging.getLogger("consumer.py")
stop_requests: list[float] = []  # the times of Ctrl-C and SIGTERM, which stop the loop
NO_PARTITIONS = "none; other members have them all, or the topic is missing, or access is denied"
Batches = dict[TopicPartition, list[Any]]  # what a poll() returns: messages by partition


def create_consumer(group: str, **settings: Any) -> KafkaConsumer:
    """Return a connected client, which joins the group when it polls."""
    return KafkaConsumer(
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # the member's name in `kafka.admin groups describe`
        group_id=group,
        auto_offset_reset="earliest",  # without a committed offset, start at the beginning
        enable_auto_commit=False,  # it could commit events that have not been printed
        isolation_level="read_committed",  # skip the events of aborted transactions
        partition_assignment_strategy=[CooperativeStickyAssignor],  # reassign as few as possible
        session_timeout_ms=10_000,  # after this, a crashed member's partitions are reassigned
        heartbeat_interval_ms=500,  # a rebalance is noticed after at most this
        max_poll_interval_ms=30_000,  # a member that does not poll for this long is removed
        metadata_max_age_ms=10_000,  # new partitions are noticed after at most this
        fetch_max_bytes=2 * 1024 * 1024,  # at 200 kB/s, arrives within the 30 s time-out
        fetch_max_wait_ms=100,  # after this, a fetch that finds no events is answered
        max_poll_records=5_000,  # commit less often while catching up
        reconnect_backoff_max_ms=1_000,  # reconnect within a second of the broker's return
        **SECURITY_SETTINGS,
        **settings,
    )


def consume(consumer: KafkaConsumer) -> None:
    """Print the events that poll() returns, then commit them, until a signal is received."""
    assignment, commit_pending = Assignment(consumer), False
    consumer.subscribe([TOPIC], listener=assignment)
    for batches in polls(consumer, assignment.rewind):
        assignment.report_change()
        print_events(batches)
        # Commit only now: after a crash before this line, the events are printed again, not lost.
        if batches or commit_pending:
            commit_pending = not commit(consumer)


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


class Assignment(ConsumerRebalanceListener):
    """The partitions that are assigned to this member of the group."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self.consumer = consumer
        self.reported, self.last_rebalance = False, time.monotonic()

    def on_partitions_assigned(self, _: set[TopicPartition]) -> None:
        self.reported, self.last_rebalance = False, time.monotonic()

    on_partitions_revoked = on_partitions_assigned

    def report_change(self) -> None:
        """Report the assignment once after each change; an empty one only if it lasts for 5 s."""
        partitions = ", ".join(str(number) for _, number in sorted(self.consumer.assignment()))
        if not self.reported and (partitions or time.monotonic() > self.last_rebalance + 5):
            self.reported = True
            log.info("assigned partitions of %s: %s", TOPIC, partitions or NO_PARTITIONS)

    def rewind(self) -> None:
        """Seek to the committed offset in each partition."""
        for partition in self.consumer.assignment():
            self.consumer.seek(partition, self.consumer.committed(partition, timeout_ms=5_000) or 0)


# Error handling, down to request_stop(). Skip it at first; README.md shows how to delete it.
def commit(consumer: KafkaConsumer) -> bool:
    """Commit the position in each partition; return False if that should be tried again."""
    try:
        consumer.commit(timeout_ms=5_000)
    except errors.CommitFailedError:  # after 10 s without a heartbeat, or 30 s without a poll()
        log.warning("removed from the group; the last events may be printed again")
    except errors.KafkaError:
        return False
    return True


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
    group = parser.parse_args().group
    if not (group and group.isprintable()):
        parser.error("--group: the name is empty or not printable")
    os.set_blocking(1, True)  # a pipe left non-blocking (by ssh, node) would drop lines when full
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # buffered despite -u
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is connected, Ctrl-C ends it at once
    consumer = connect(create_consumer, group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    try:
        consume(consumer)
    except BrokenPipeError:  # the reader of a pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that flushing the rest does not fail
    finally:
        if stop_requests:
            log.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # leaves the group: its partitions are reassigned at once


if __name__ == "__main__":
    main()

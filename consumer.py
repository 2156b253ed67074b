"""Shows the events of the topic as they come. Start several: they share its partitions.

python consumer.py                a member of the group "event-watchers"
python consumer.py --group mine   the first member of another group: it gets every event as well

KAFKA_BOOTSTRAP_SERVERS in the environment says where Kafka is (default: localhost:9092).
"""

import errno
import logging
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from kafka import KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CommitFailedError, CorruptRecordError, KafkaError, UnsupportedCodecError
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
log = logging.getLogger("consumer.py")  # kafka_log, further down, watches the connection
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


def shown(data: bytes | None) -> str:
    """One line that cannot drive the terminal: what is not printable UTF-8 is escaped."""
    if data is None:
        return "null"
    text = data.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_events(polled: Any) -> None:
    for (_, partition), messages in polled.items():
        place = f"partition={partition} offset="
        sys.stdout.writelines(
            f"{place}{message.offset} key={shown(message.key)} {shown(message.value)}\n"
            for message in messages
        )
    sys.stdout.flush()


def share_line(consumer: KafkaConsumer, settled: bool) -> str:
    """Which partitions it has; empty while a newcomer waits for the others to give some up."""
    held = sorted(partition for _, partition in consumer.assignment())
    if held or not settled:
        return ", ".join(map(str, held))
    # consumer.partitions_for_topic() would ask again, for up to 30 s, where there is no topic.
    if consumer._cluster.partitions_for_topic(TOPIC):
        return "none, others have them"
    return f"none, waiting: there is no topic {TOPIC}, or no right to read it"


def show_events(consumer: KafkaConsumer) -> None:
    """Until told to stop: prints the events that come, then commits them."""
    known, since, failures = consumer.group_metadata(), 0.0, 0
    share, said, uncommitted = "", "", False
    while not stopping:
        try:
            if failures:
                # poll() of kafka-python 3.0.12 may raise after Fetcher.fetch_records() has taken
                # events from its buffer: the positions have moved, but nobody has seen them.
                for partition in consumer.assignment():
                    consumer.seek(partition, consumer.committed(partition, timeout_ms=1_000) or 0)
            if known.state == MemberState.REBALANCING:
                # A leader of kafka-python 3.0.12 that rejoins because the topic has changed forgets
                # it if poll() ends before the join: _perform_assignment() clears the cause.
                consumer._coordinator.request_rejoin()
            polled = consumer.poll(timeout_ms=500)
            if (membership := consumer.group_metadata()) != known:
                known, since, share = membership, time.monotonic(), ""
            if known.state == MemberState.STABLE and not share:
                share = share_line(consumer, settled=time.monotonic() - since > 2)
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
            log.info("partitions: %s", share)
        print_events(polled)
        # Only now: a crash before this line shows these events again, and none is ever lost.
        if polled:
            uncommitted = True
        try:
            if uncommitted:
                consumer.commit(timeout_ms=1_000)
                uncommitted = False
        except CommitFailedError:  # frozen or cut off for 10 s, or no poll() for five minutes
            log.warning("the group went on without this one: some events may be shown twice")
            said = ""
        except KafkaError:
            pass  # the positions stay: the next commit covers these events as well


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
    group = parser.parse_args().group
    if not group:
        parser.error("--group: a group needs a name")
    consumer = connect(
        KafkaConsumer,
        group_id=group,
        auto_offset_reset="earliest",  # where the group has committed nothing: from the start
        enable_auto_commit=False,  # it would also commit what could not be shown
        partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
        session_timeout_ms=10_000,  # a member that died is noticed after this
        heartbeat_interval_ms=500,  # a member that came or left is noticed after this
        metadata_max_age_ms=10_000,  # new partitions are noticed after this
        max_partition_fetch_bytes=4 * 1024 * 1024,  # fewer, larger fetches while catching up
        fetch_max_wait_ms=100,  # longer, a partition read to its end holds up the others
        max_poll_records=5_000,  # fewer commits while catching up
    )
    consumer.subscribe([TOPIC])
    # What the terminal cannot show is escaped.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    try:
        show_events(consumer)
    except OSError as error:  # what was not printed is not committed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # | head has read enough; on Windows
            sys.exit(f"cannot write the output: {error.strerror}")
    finally:
        consumer.close(timeout_ms=5_000)  # leaves the group, so that others take over at once


if __name__ == "__main__":
    main()

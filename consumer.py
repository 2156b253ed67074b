"""Shows the events of a topic as they come. Start several: they share its partitions.

python consumer.py --group mine   in a group of its own it gets every event as well
"""

import contextlib
import logging
import os
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from kafka import KafkaConsumer, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"  # of the readers
# For a cluster that asks who you are: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, … (README)
NAMES = ["SECURITY_PROTOCOL", "SASL_MECHANISM", "SASL_PLAIN_USERNAME", "SASL_PLAIN_PASSWORD"]
NAMES += ["SSL_CAFILE", "SSL_CERTFILE", "SSL_KEYFILE", "SSL_PASSWORD"]
SECURITY = {n.lower(): os.environ[f"KAFKA_{n}"] for n in NAMES if f"KAFKA_{n}" in os.environ}
log = logging.getLogger("consumer.py")
NONE = "none yet: others of the group have them, or there is no topic, no right to it, or no group"
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


def join(group: str) -> KafkaConsumer:
    """A client that becomes a member of the group when it polls."""
    return connect(
        KafkaConsumer,
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # tells the members of a group apart from outside
        group_id=group,
        auto_offset_reset="earliest",  # where the group has committed nothing: from the start
        enable_auto_commit=False,  # it would also commit what could not be shown
        isolation_level="read_committed",  # no events of a transaction that was aborted
        partition_assignment_strategy=[CooperativeStickyAssignor],  # move no more than needed
        session_timeout_ms=10_000,  # a member that died is noticed after this
        heartbeat_interval_ms=500,  # a member that came or left is noticed after this
        metadata_max_age_ms=10_000,  # new partitions are noticed after this
        fetch_max_bytes=2 * 1024 * 1024,  # what takes 30 s (request_timeout_ms) begins anew
        fetch_max_wait_ms=100,  # so long a fetch of empty partitions alone holds up the others
        max_poll_records=5_000,  # fewer commits while catching up
        reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
        **SECURITY,
    )


def show_events(consumer: KafkaConsumer) -> None:
    """Polls, shows what has come, and commits that, until told to stop."""
    consumer.subscribe([TOPIC])
    said, uncommitted, failures, started = None, False, 0, time.monotonic()
    while not stopping:
        try:
            if failures:  # back to the last commit: a poll() that raised may have lost events
                for partition in consumer.assignment():
                    consumer.seek(partition, consumer.committed(partition, timeout_ms=5_000) or 0)
            if consumer._coordinator.rebalance_in_progress():
                consumer._coordinator.request_rejoin()  # or it forgets a long join: KAFKA-9815
            polled = consumer.poll(timeout_ms=500)
            failures = 0
        except errors.CorruptRecordError as why:  # the next poll() would never end
            sys.exit(f"--- cannot read the events: {why}")
        except errors.KafkaError as error:
            failures += 1
            if failures == 3:  # most errors pass sooner
                log.warning("cannot go on (%s); trying again", error)
            time.sleep(0.5)
            continue
        held = sorted(partition for _, partition in consumer.assignment())
        if held != said and (held or time.monotonic() > started + 3):  # to join takes a moment
            said = held
            log.info("partitions of %s: %s", TOPIC, ", ".join(map(str, held)) or NONE)
        print_events(polled)
        # Only now: a crash before this line shows these events again, and none is ever lost.
        uncommitted = uncommitted or bool(polled)
        try:
            if uncommitted:
                consumer.commit(timeout_ms=5_000)
                uncommitted = False
        except errors.CommitFailedError:  # frozen or cut off for 10 s, or held up for minutes
            log.warning("the group went on without this one: the last events may be shown again")
        except errors.KafkaError:
            pass  # the next commit covers these events as well


def print_events(polled: Any) -> None:
    for (_, partition), messages in polled.items():
        for message in messages:
            place = f"partition={partition} offset={message.offset}"
            print(f"{place} key={printable(message.key)} {printable(message.value)}")
    sys.stdout.flush()


def printable(data: bytes | None) -> str:
    """One line that cannot drive the terminal: what is not printable UTF-8 is escaped."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    group = parser.parse_args().group
    if not group.isprintable():  # nor are bytes that are not UTF-8
        parser.error("--group: not a name")
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to finish yet
    consumer = join(group)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    try:
        show_events(consumer)
    except BrokenPipeError:  # | head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
    finally:
        if stopping:
            log.info("leaving the group")
        consumer.close(timeout_ms=5_000)  # tells the group, so that others take over at once


if __name__ == "__main__":
    main()

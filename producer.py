"""Writes random user events to Kafka, and prints each one once Kafka has confirmed it.

python producer.py                            one event a second until Ctrl-C
python producer.py --count 1000 --interval 0  a thousand events, as fast as it can

KAFKA_BOOTSTRAP_SERVERS in the environment says where Kafka is (default: localhost:9092).
An event that Kafka has not confirmed after 120 s has failed; that ends the run, with status 1.
"""

import errno
import json
import logging
import math
import os
import random
import signal
import sys
import time
import uuid
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timezone
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.future import Future

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"
# For a cluster that asks who you are: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, … (README)
SECURITY = {
    name.removeprefix("KAFKA_").lower(): value
    for name, value in os.environ.items()
    if name.startswith(("KAFKA_SECURITY_", "KAFKA_SASL_", "KAFKA_SSL_"))
}
# The first three users land on partitions 0, 1 and 2 (of three), the others on 0, 1 and 2 again.
USERS = ["sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234", "alice", "dave", "carol"]
ACTIONS = ["view", "click", "add_to_cart", "purchase"]
MAX_UNCONFIRMED = 10_000  # then it waits for Kafka; kafka-python itself would take any number

log = logging.getLogger("producer.py")  # kafka_log, further down, watches the connection
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


def random_event() -> dict[str, str]:
    return {
        "event_id": str(uuid.uuid4()),
        "user_id": random.choice(USERS),
        "action": random.choice(ACTIONS),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


class Deliveries:
    """The events sent, and what has become of them."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        # Key, value, and kafka-python's future, which will tell the place in the log.
        self.unconfirmed: list[tuple[str, str, Any]] = []
        self.delivered = self.failed = 0
        self.status = 0

    def send(self, producer: KafkaProducer, event: dict[str, str]) -> None:
        key, value = event["user_id"], json.dumps(event)
        try:
            future = producer.send(TOPIC, key=key.encode(), value=value.encode())
        except (KafkaError, TypeError, ValueError) as error:  # the topic is gone, for example
            future = Future().failure(error)
        self.unconfirmed.append((key, value, future))
        if future.exception:  # without a pause, send_events() would not look for a long time
            self.settle()

    def settle(self) -> None:
        """Prints the events that Kafka has confirmed by now."""
        lines = []
        waiting, self.unconfirmed = self.unconfirmed, []
        for key, value, future in waiting:
            if not future.is_done:
                self.unconfirmed.append((key, value, future))
            elif future.exception:
                if not self.failed:
                    log.error("not delivered: %s", future.exception)
                self.failed += 1
            else:
                place = f"partition={future.value.partition} offset={future.value.offset}"
                lines.append(f"{place} key={key} {value}\n")
                self.delivered += 1
        try:
            if lines and not self.quiet:
                sys.stdout.writelines(lines)
                sys.stdout.flush()
        except OSError as error:  # send no more, but settle what has been sent
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at the end
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # | head has read enough; on Windows
                self.status = 1
                log.error("cannot write the output: %s", error.strerror)
            stopping.append(0)


def send_events(
    producer: KafkaProducer, deliveries: Deliveries, count: int | None, interval: float
) -> None:
    """Until all are delivered, one has failed for good, or it is told to stop."""
    sent, next_send = 0, time.monotonic()
    while not (stopping or deliveries.failed or deliveries.delivered == count):
        now = time.monotonic()
        may_send = sent != count and len(deliveries.unconfirmed) < MAX_UNCONFIRMED
        if may_send and now >= next_send:
            deliveries.send(producer, random_event())
            sent, next_send = sent + 1, now + interval
        pause = next_send - now if may_send else 0.01  # soon there will be more confirmed
        if pause > 0:
            time.sleep(min(pause, 0.1))  # no longer, for a signal does not cut it short
            deliveries.settle()


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
    parser.add_argument("--count", type=int, metavar="N", help="end after N events")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="(default: 1; 0: no pause)"
    )
    parser.add_argument("--quiet", action="store_true", help="do not print the events")
    options = parser.parse_args()
    if options.count is not None and options.count < 0:
        parser.error("--count: not a number of events")
    if not 0 <= options.interval < math.inf:
        parser.error("--interval: not a time in seconds")

    producer = connect(
        KafkaProducer,
        acks="all",  # confirmed: on every replica that is in sync, not on one broker alone
        enable_idempotence=True,  # in the log once, however often the client had to send it again
        max_block_ms=4_000,  # so long send() waits for a topic that is gone, deaf to Ctrl-C
        batch_size=64 * 1024,  # under load, four times the events in a request: a fifth faster
    )
    try:
        producer.partitions_for(TOPIC)
    except KafkaTimeoutError:
        if kafka_log.lost:
            sys.exit(f"no connection to the brokers that {BOOTSTRAP_SERVERS} names")
        how = f"python -m kafka.admin -b {BOOTSTRAP_SERVERS.split(',')[0]} topics create -t {TOPIC}"
        sys.exit(f"no topic {TOPIC} in 4 s; if there is none: `{how} --num-partitions 3`")
    except KafkaError as error:
        sys.exit(f"no way to write to the topic {TOPIC}: {error}")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    deliveries = Deliveries(options.quiet)
    send_events(producer, deliveries, options.count, options.interval)
    deadline = time.monotonic() + 10
    while deliveries.unconfirmed and time.monotonic() < deadline:
        time.sleep(0.1)
        deliveries.settle()
    failed = deliveries.failed + len(deliveries.unconfirmed)  # some of the latter may be in the log
    log.info("%d delivered, %d failed", deliveries.delivered, failed)
    if failed:
        # Without a broker, close() of kafka-python 3.0.12 does not end: once a batch has expired,
        # RecordAccumulator waits for a new producer id, and lets no other batch expire.
        os._exit(1)
    producer.close(timeout=5)
    sys.exit(deliveries.status)


if __name__ == "__main__":
    main()

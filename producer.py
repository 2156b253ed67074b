"""Send random events to a topic, and print each one when the broker has acknowledged it.

python producer.py --count 1000 --interval 0   a thousand events, as fast as possible

An event has failed if it is not acknowledged within 120 s, or within 10 s of Ctrl-C. The producer
then exits with status 1.
"""

import contextlib
import json
import logging
import math
import os
import random
import signal
import ssl
import sys
import time
import uuid
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, NamedTuple

from kafka import KafkaProducer, errors

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
log = logging.getLogger("producer.py")
stop_requests: list[float] = []  # the times of Ctrl-C and SIGTERM, which stop the loop
# As keys, the first three hash to partitions 0, 1 and 2 (of three); so do the last three.
USER_IDS = ["sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234", "alice", "dave", "carol"]
ACTIONS = ["view", "click", "add_to_cart", "purchase"]


def random_event() -> dict[str, Any]:
    return {
        "event_id": str(uuid.uuid4()),
        "user_id": random.choice(USER_IDS),
        "action": random.choice(ACTIONS),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def create_producer(**settings: Any) -> KafkaProducer:
    """Return a connected client; exit with status 1 if there is no topic within 15 s."""
    producer = KafkaProducer(
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # the client's name in the broker's log and metrics
        acks="all",  # acknowledged by all in-sync replicas, not by the leader alone
        enable_idempotence=True,  # a retry never writes an event twice or out of order
        batch_size=128 * 1024,  # in bytes; large batches need fewer requests
        linger_ms=20,  # a batch waits at most this long for more events; doubles the throughput
        max_block_ms=5_000,  # send() blocks for at most this long, which also delays Ctrl-C
        reconnect_backoff_max_ms=1_000,  # reconnect within a second of the broker's return
        **SECURITY_SETTINGS,
        **settings,
    )
    for _ in range(3):
        with contextlib.suppress(errors.KafkaError):
            producer.partitions_for(TOPIC)  # by default, brokers create a topic that is asked for
            return producer
    server = BOOTSTRAP_SERVERS.split(",")[0]
    command = f"python -m kafka.admin -b {server} topics create -t {TOPIC} --num-partitions 3"
    sys.exit(f"--- topic {TOPIC} is missing or forbidden; create it: `{command}`")


def produce(deliveries: "Deliveries", count: float, interval: float) -> None:
    """Send an event per interval, until `count` are delivered, one fails or a signal arrives."""
    sent, next_send = 0, time.monotonic()
    while not (stop_requests or deliveries.failed or deliveries.delivered >= count):
        if sent < count and time.monotonic() >= next_send and len(deliveries.pending) < 10_000:
            deliveries.send(random_event())
            sent, next_send = sent + 1, time.monotonic() + interval
        else:
            time.sleep(0.005)
            deliveries.report_acknowledged()


class Pending(NamedTuple):
    sent_at: float  # by time.monotonic()
    key: str
    value: str
    future: Any  # from kafka-python: will hold the event's partition and offset, or the error


class Deliveries:
    """The events sent so far: which are pending, how many are delivered, how many have failed."""

    def __init__(self, producer: KafkaProducer, quiet: bool) -> None:
        self.producer, self.quiet = producer, quiet
        self.pending: list[Pending] = []  # in the order in which they were sent
        self.delivered = self.failed = 0
        self.overdue = False

    def send(self, event: dict[str, Any]) -> None:
        key, value = str(event["user_id"]), json.dumps(event)
        try:
            future = self.producer.send(TOPIC, key=key.encode(), value=value.encode())
            self.pending.append(Pending(time.monotonic(), key, value, future))
        except (errors.KafkaError, ValueError) as error:  # the topic was deleted, for example
            self.failed += 1
            log.error("delivery failed: %s", error)

    def report_acknowledged(self) -> None:
        """Print the events that have been acknowledged, and report the first that has failed."""
        lines, pending, self.pending = [], self.pending, []
        for event in pending:  # looking at each future is faster than a callback for each
            if not event.future.is_done:
                self.pending.append(event)
            elif event.future.exception:
                self.failed += 1
                if self.failed == 1:
                    log.error("delivery failed: %s", event.future.exception)
            else:
                metadata = event.future.value
                position = f"partition={metadata.partition} offset={metadata.offset}"
                lines.append(f"{position} key={event.key} {event.value}\n")
        self.delivered += len(lines)
        self.warn_if_overdue()
        try:
            sys.stdout.writelines(() if self.quiet else lines)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe, such as head, has exited: stop sending
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the remaining lines go
            stop_requests.append(time.monotonic())

    def warn_if_overdue(self) -> None:
        """Report that the oldest pending event has waited for 5 s; again only after a recovery."""
        was_overdue = self.overdue
        self.overdue = bool(self.pending) and time.monotonic() > self.pending[0].sent_at + 5
        if self.overdue and not was_overdue:
            log.warning("oldest event unacknowledged for 5 s; %d events pending", len(self.pending))

    def wait_for_pending(self, seconds: float) -> None:
        """Wait until no event is pending, for at most that many seconds."""
        deadline = time.monotonic() + seconds
        while self.pending and time.monotonic() < deadline:
            time.sleep(0.1)
            self.report_acknowledged()


# Error handling, down to request_stop(). Skip it at first; README.md shows how to delete it.
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
    parser.add_argument("--count", type=int, metavar="N", help="exit after N events")
    parser.add_argument("--interval", type=float, default=1, metavar="SECONDS", help="(default: 1)")
    parser.add_argument("--quiet", action="store_true", help="do not print the events")
    options = parser.parse_args()
    count = math.inf if options.count is None else options.count
    if count < 0 or not 0 <= options.interval < math.inf:
        parser.error("N and SECONDS must be finite and not negative")
    os.set_blocking(1, True)  # a pipe left non-blocking (by ssh, node) would drop lines when full
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # buffered despite -u
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is connected, Ctrl-C ends it at once
    producer = connect(create_producer)
    deliveries = Deliveries(producer, options.quiet)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    try:
        produce(deliveries, count, options.interval)
    finally:
        deliveries.wait_for_pending(1)
        if deliveries.pending:
            log.info("waiting up to 9 s for %d more acknowledgements", len(deliveries.pending))
            deliveries.wait_for_pending(9)
        failed = deliveries.failed + len(deliveries.pending)  # the latter may be in the log
        log.info("%d delivered, %d failed", deliveries.delivered, failed)
    if failed:
        os._exit(1)  # close() would take a second more, then raise a KafkaTimeoutError
    producer.close(timeout=5)


if __name__ == "__main__":
    main()

"""Writes random events to a topic, and prints each one once Kafka has confirmed it.

python producer.py --count 1000 --interval 0   a thousand events, as fast as it can

An event that Kafka has not confirmed after 120 s has failed; that ends the run, with status 1.
"""

import contextlib
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
from datetime import datetime, timezone
from typing import Any

from kafka import KafkaProducer, errors

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"  # of the readers
# For a cluster that asks who you are: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, … (README)
NAMES = ["SECURITY_PROTOCOL", "SASL_MECHANISM", "SASL_PLAIN_USERNAME", "SASL_PLAIN_PASSWORD"]
NAMES += ["SSL_CAFILE", "SSL_CERTFILE", "SSL_KEYFILE", "SSL_PASSWORD"]
SECURITY = {n.lower(): os.environ[f"KAFKA_{n}"] for n in NAMES if f"KAFKA_{n}" in os.environ}
# The first three land on partitions 0, 1 and 2 (of three), the others on 0, 1 and 2 again.
USERS = ["sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234", "alice", "dave", "carol"]
ACTIONS = ["view", "click", "add_to_cart", "purchase"]
log = logging.getLogger("producer.py")
stopping: list[int] = []  # not empty: told to stop; a signal handler can append to it


def random_event() -> dict[str, Any]:
    return {
        "event_id": str(uuid.uuid4()),
        "user_id": random.choice(USERS),
        "action": random.choice(ACTIONS),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def open_producer() -> KafkaProducer:
    """A producer that knows the topic; where there is none in 15 s it ends the script."""
    producer = connect(
        KafkaProducer,
        bootstrap_servers=BOOTSTRAP_SERVERS,
        client_id=log.name,  # the name that the broker knows it by
        acks="all",  # confirmed: on every replica that is in sync, not on one broker alone
        enable_idempotence=True,  # in the log once, however often the client had to send it again
        batch_size=64 * 1024,  # under load, four times the events in a request: a fifth faster
        max_block_ms=5_000,  # so long it waits for a topic, and Ctrl-C waits as well
        reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
        **SECURITY,
    )
    for _ in range(3):
        with contextlib.suppress(errors.KafkaError):
            producer.partitions_for(TOPIC)  # most brokers create a topic that is asked for
            return producer
    how = f"python -m kafka.admin -b {BOOTSTRAP_SERVERS.split(',')[0]} topics create -t {TOPIC}"
    sys.exit(f"--- Kafka shows no topic {TOPIC}; to create it: `{how} --num-partitions 3`")


class Deliveries:
    """The events sent, and what has become of them."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.unconfirmed: list[tuple[str, str, Any]] = []  # key, value, kafka-python's future
        self.delivered = self.failed = 0
        self.progress = time.monotonic()  # when there was some, or nothing to wait for

    def send(self, producer: KafkaProducer, event: dict[str, Any]) -> None:
        key, value = str(event["user_id"]), json.dumps(event)
        try:
            future = producer.send(TOPIC, key=key.encode(), value=value.encode())
            self.unconfirmed.append((key, value, future))
        except (errors.KafkaError, ValueError) as error:  # the topic is gone, for example
            self.failed += 1
            log.error("not delivered: %s", error)

    def settle(self) -> None:
        """Prints the events that Kafka has confirmed by now."""
        lines, waiting, self.unconfirmed = [], self.unconfirmed, []
        for key, value, future in waiting:
            if not future.is_done:
                self.unconfirmed.append((key, value, future))
            elif future.exception:
                self.failed += 1
                if self.failed == 1:
                    log.error("not delivered: %s", future.exception)
            else:
                place = f"partition={future.value.partition} offset={future.value.offset}"
                lines.append(f"{place} key={key} {value}\n")
        self.delivered += len(lines)
        if lines or not self.unconfirmed:
            self.progress = time.monotonic()
        elif time.monotonic() > self.progress + 5:
            log.warning("nothing confirmed for 5 s; %d events wait", len(self.unconfirmed))
            self.progress = math.inf  # said once, until something is confirmed
        try:
            sys.stdout.writelines(() if self.quiet else lines)
            sys.stdout.flush()
        except BrokenPipeError:  # | head has read enough: send no more, settle what has been sent
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            stopping.append(0)


def send_events(producer: KafkaProducer, sent: Deliveries, count: float, interval: float) -> None:
    """Sends what is due, else settles, until all are delivered, one has failed, or told to stop."""
    number, next_send = 0, time.monotonic()
    while not (stopping or sent.failed or sent.delivered >= count):
        more = number < count and len(sent.unconfirmed) < 10_000  # kafka-python sets no limit
        if more and time.monotonic() >= next_send:
            sent.send(producer, random_event())
            number, next_send = number + 1, time.monotonic() + interval
        else:
            time.sleep(0.005)
            sent.settle()


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
    parser.add_argument("--count", type=int, default=math.inf, metavar="N", help="end after N")
    parser.add_argument("--interval", type=float, default=1, metavar="SECONDS", help="(default: 1)")
    parser.add_argument("--quiet", action="store_true", help="do not print the events")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to finish yet
    producer, deliveries = open_producer(), Deliveries(options.quiet)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stopping.append(number))
    try:
        send_events(producer, deliveries, options.count, options.interval)
    finally:
        deadline = time.monotonic() + 10
        while deliveries.unconfirmed and time.monotonic() < deadline:
            time.sleep(0.1)
            deliveries.settle()
        failed = deliveries.failed + len(deliveries.unconfirmed)  # the latter may be in the log
        log.info("%d delivered, %d failed", deliveries.delivered, failed)
    if failed:
        os._exit(1)  # close() would wait for the rest, and without a broker may not end
    producer.close(timeout=5)


if __name__ == "__main__":
    main()

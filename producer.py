"""Send random events to a topic, and print each one when the broker has acknowledged it.

python producer.py --count 1000 --interval 0   a thousand events, as fast as possible

An event has failed if it is not acknowledged within 120 s. After Ctrl-C, a failure or a full disk,
the producer waits up to 10 s; what is still pending has failed, too. The exit status is then 1.
"""

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
from typing import Any, NamedTuple

from kafka import KafkaProducer, errors

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
CLIENT_SETTINGS = json.loads(os.environ.get("KAFKA_CLIENT_SETTINGS", "{}"))  # a login, for example
TOPIC = "events"

# Two keys for each of the three partitions: they hash to 0, 1, 2, 0, 1, 2.
USER_IDS = ["sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234", "alice", "dave", "carol"]
ACTIONS = ["view", "click", "add_to_cart", "purchase"]

log = logging.getLogger("producer.py")
outages = logging.getLogger("kafka.net.manager")  # kafka-python logs failed connections; throttled
next_times: dict[str, float] = {}  # when throttle() next lets a message through, by source file
stop = False  # set by Ctrl-C and SIGTERM


def connect() -> KafkaProducer:
    """Return a connected client; exit with status 1 if no broker answers within 10 s."""
    try:
        return KafkaProducer(
            bootstrap_servers=BOOTSTRAP_SERVERS,
            bootstrap_timeout_ms=10_000,
            client_id=log.name,  # the client's name in the broker's log and metrics
            acks="all",  # acknowledged by all in-sync replicas, not by the leader alone
            enable_idempotence=True,  # a retry never writes an event twice or out of order
            batch_size=128 * 1024,  # in bytes; large batches need fewer requests
            linger_ms=20,  # a batch waits at most this long for more events
            max_block_ms=10_000,  # send() waits at most this long for the topic to be created
            reconnect_backoff_max_ms=1_000,  # reconnect within a second of the broker's return
            **CLIENT_SETTINGS,
        )
    except (errors.KafkaError, TypeError, ValueError) as error:
        reason = "bad setting" if isinstance(error, ValueError) else error  # hides passwords
        start = "start Kafka with docker compose up -d or python tests/broker.py"
        advice = "check KAFKA_CLIENT_SETTINGS" if CLIENT_SETTINGS else start
        advice += ", or check KAFKA_BOOTSTRAP_SERVERS"
        sys.exit(f"--- cannot connect to {BOOTSTRAP_SERVERS} ({reason}); {advice}")


def random_event() -> dict[str, Any]:
    return {
        "event_id": str(uuid.uuid4()),
        "user_id": random.choice(USER_IDS),
        "action": random.choice(ACTIONS),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def produce(deliveries: "Deliveries", count: float, interval: float) -> None:
    """Send an event per interval, until `count` are delivered, one fails, or told to stop."""
    next_send = time.monotonic()
    while not (stop or deliveries.error or deliveries.delivered >= count):
        due = deliveries.sent < count and time.monotonic() >= next_send
        if due and len(deliveries.pending) < 10_000:  # kafka-python itself sets no limit
            deliveries.send(random_event())
            # After a delay, catch up, but send no more than a second's events at once.
            next_send = max(next_send, time.monotonic() - 1) + interval
        else:
            time.sleep(0.005)
            deliveries.report()


class PendingEvent(NamedTuple):
    sent_at: float  # by time.monotonic()
    key: bytes
    value: bytes
    future: Any  # from kafka-python: will hold the event's partition and offset, or the error


class Deliveries:
    """Every event sent is pending, delivered (acknowledged) or failed."""

    def __init__(self, producer: KafkaProducer, quiet: bool) -> None:
        self.producer, self.quiet = producer, quiet
        self.pending: list[PendingEvent] = []  # in the order in which they were sent
        self.sent = self.delivered = 0
        self.error: Any = None  # why the first one failed

    def send(self, event: dict[str, Any]) -> None:
        self.sent += 1
        try:
            key, value = event["user_id"].encode(), json.dumps(event, ensure_ascii=False).encode()
            future = self.producer.send(TOPIC, key=key, value=value)
            self.pending.append(PendingEvent(time.monotonic(), key, value, future))
        except (errors.KafkaError, ValueError) as error:
            self.error = self.error or error

    def report(self) -> None:
        """Print the pending events that have been acknowledged."""
        lines, pending, self.pending = [], self.pending, []
        for event in pending:  # faster than a callback for each
            if not event.future.is_done:
                self.pending.append(event)
            elif event.future.exception:
                self.error = self.error or event.future.exception
            else:
                metadata = event.future.value
                position = f"partition={metadata.partition} offset={metadata.offset}"
                lines.append(f"{position} key={printable(event.key)} {printable(event.value)}\n")
        self.delivered += len(lines)
        if self.pending and time.monotonic() > self.pending[0].sent_at + 5:
            outages.warning("%d events are not acknowledged yet", len(self.pending))
        sys.stdout.writelines(() if self.quiet else lines)
        sys.stdout.flush()

    def wait(self, seconds: float) -> None:
        """Wait for the acknowledgement of pending events, for at most that many seconds."""
        deadline = time.monotonic() + seconds
        while self.pending and time.monotonic() < deadline:
            time.sleep(0.05)
            self.report()


def printable(data: bytes | None) -> str:
    """Return the data as one line of text that cannot control the terminal."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    parser.add_argument("--count", type=int, default=math.inf, metavar="N", help="events to send")
    parser.add_argument("--interval", type=float, default=1, metavar="SECONDS", help="(default: 1)")
    parser.add_argument("--quiet", action="store_true", help="do not print the events")
    options = parser.parse_args()
    if options.count < 0 or not 0 <= options.interval < math.inf:
        parser.error("N and SECONDS must be finite and not negative")
    logging.basicConfig(level=logging.INFO, format="--- %(message)s")
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    outages.setLevel(logging.WARNING)
    outages.addFilter(throttle)
    sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")  # lossless despite -u
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is connected, Ctrl-C ends it at once
    producer = connect()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request_stop)
    deliveries, status = Deliveries(producer, options.quiet), 0
    try:
        produce(deliveries, options.count, options.interval)
        deliveries.wait(10)
    except OSError as error:  # a full disk; or the reader of a pipe, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the remaining lines go
        if not isinstance(error, BrokenPipeError):
            log.error("cannot print: %s", error)
            status = 1
        deliveries.wait(10)
    if failed := deliveries.sent - deliveries.delivered:  # these may be in the topic all the same
        reason = deliveries.error or "not acknowledged in time"
        log.error("delivery failed: %s (topic %s)", reason, TOPIC)
    log.info("%d delivered, %d failed", deliveries.delivered, failed)
    if deliveries.pending:
        os._exit(1)  # close() would raise a KafkaTimeoutError, now and when Python exits
    producer.close(timeout=5)
    sys.exit(1 if failed else status)


if __name__ == "__main__":
    main()

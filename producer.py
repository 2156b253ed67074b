"""Writes random user events to Kafka, and prints each one once Kafka has confirmed it.

python producer.py                            one event a second until Ctrl-C
python producer.py --count 1000 --interval 0  a thousand events, as fast as it can
"""

import argparse
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
from collections import deque
from datetime import datetime, timezone

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.future import Future

BOOTSTRAP_SERVERS = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
TOPIC = "events"
GROUP_ID = "event-watchers"

# The first three users land on partitions 0, 1 and 2 (of three), the others on 0, 1 and 2 again.
USERS = ["sdsdsfsfsfasfasfasfasfa", "sdfsdfsdf452535", "23124234234", "alice", "dave", "carol"]
ACTIONS = ["view", "click", "add_to_cart", "purchase"]
DELIVERY_TIMEOUT = 120  # seconds; kafka-python's default
MAX_UNCONFIRMED = 0.1  # seconds; see main()

log = logging.getLogger("producer")
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


def connect() -> KafkaProducer:
    """Ends the script with one line and status 1 if there is no broker within 10 s."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kafka").addHandler(ConnectionWatch())
    logging.getLogger("kafka").propagate = False
    for signum in (signal.SIGINT, signal.SIGTERM):
        # Nothing to finish yet; and kafka-python's event loop would swallow a SystemExit.
        signal.signal(signum, lambda *_: os._exit(0))
    try:
        # Unchanged, because they are right: acks=all and idempotence, so that Kafka has a confirmed
        # event for good and has it once, however often the client had to send it again.
        producer = KafkaProducer(
            bootstrap_servers=BOOTSTRAP_SERVERS,
            bootstrap_timeout_ms=10_000,  # say soon that there is no broker
            reconnect_backoff_max_ms=1_000,  # be back a second after the broker, not half a minute
            delivery_timeout_ms=DELIVERY_TIMEOUT * 1_000,
            batch_size=64 * 1024,  # under load, four times the events in a request: a fifth faster
        )
    except (KafkaError, ValueError):
        sys.exit(
            f"no Kafka broker at {BOOTSTRAP_SERVERS}; start one with "
            "`docker compose up -d --wait` or `python tests/broker.py`"
        )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return producer


def random_event() -> dict[str, str]:
    return {
        "event_id": str(uuid.uuid4()),
        "user_id": random.choice(USERS),
        "action": random.choice(ACTIONS),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def main() -> int:
    """Returns the exit status: 1 if an event could not be delivered."""
    global stopping
    parser = argparse.ArgumentParser(
        description="Write random user events to Kafka.",
        epilog=f"An event that Kafka has not confirmed after {DELIVERY_TIMEOUT} s (the delivery "
        "time-out) has failed; the run then ends with status 1.",
    )
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
    producer = connect()

    unconfirmed: deque[tuple[float, Future, str, str]] = deque()  # oldest first
    sent = delivered = failed = 0
    gave_up = warned = False
    next_send = time.monotonic()
    while True:
        now = time.monotonic()
        sending = sent != options.count and not stopping
        if gave_up or not (sending or unconfirmed):
            break
        if stopping and not warned and now - stopping > 1:
            log.warning("%d events not confirmed yet; Ctrl-C again ends at once", len(unconfirmed))
            warned = True
        # kafka-python buffers without limit, so while Kafka confirms nothing, send no more.
        held_back = unconfirmed and now - unconfirmed[0][0] > MAX_UNCONFIRMED
        wait = 0.1  # not longer, for a signal does not cut it short
        if sending and not held_back:
            if now >= next_send:
                event = random_event()
                user_id, value = event["user_id"], json.dumps(event)
                try:
                    future = producer.send(TOPIC, key=user_id.encode(), value=value.encode())
                except KafkaError as error:  # it cannot even learn which partitions there are
                    future = Future().failure(error)
                unconfirmed.append((now, future, user_id, value))
                sent += 1
                next_send = now + options.interval
            wait = min(wait, next_send - now)
        if wait > 0 and unconfirmed:
            with contextlib.suppress(KafkaError):
                unconfirmed[0][1].get(timeout=wait)
        elif wait > 0:
            time.sleep(wait)

        lines = []
        while unconfirmed and unconfirmed[0][1].is_done:
            _, future, user_id, value = unconfirmed.popleft()
            if future.exception is None:
                delivered += 1
                if not options.quiet:
                    at = future.value
                    lines.append(
                        f"partition={at.partition} offset={at.offset} key={user_id} {value}\n"
                    )
            else:
                failed += 1
                gave_up = gave_up or isinstance(future.exception, KafkaTimeoutError)
                if failed == 1:
                    log.error("not delivered: %s", future.exception)
        if lines:
            try:
                sys.stdout.write("".join(lines))
                sys.stdout.flush()
            except BrokenPipeError:  # nobody reads on (| head): settle what was sent, and end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                stopping = now

    failed += len(unconfirmed)  # sent at about the same time as the one it gave up
    log.info("%d delivered, %d failed", delivered, failed)
    if gave_up:
        # kafka-python 3.0.12 resets its producer id when a batch expires, and without a broker to
        # give it a new one it lets no other batch expire, nor close() end.
        os._exit(1)
    producer.close(timeout=5)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

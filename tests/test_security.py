"""A secured broker: the pipeline works on it, and reasons are reported where it does not."""

import itertools
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from broker import Broker, free_port
from broker_settings import add_listener
from cryptography.hazmat.primitives import serialization as pem
from events import counts_of, event_lines
from proxy import Proxy
from readme import blocks, section
from scripts import SCRIPTS, Start, assert_clean_stop, assert_plain_stderr, send_events, wait_until
from witness import Witness

PASSWORD = "correct-horse"
# kafka-python drops the broker's answer if it arrives together with the end of the connection.
REJECTED = ".*(Sasl.*Error|KafkaConnectionError: socket disconnected)"


class Secured(NamedTuple):
    broker: Broker  # with another listener, for a password over TLS
    address: str  # of that listener
    folder: Path

    def password_settings(self) -> dict[str, str]:
        """Return the scripts' settings for a login: the README's example, with these values."""
        [example] = re.findall(r"'(\{.*?\})'", blocks(section("Settings"))[0], re.DOTALL)
        own = {"sasl_plain_password": PASSWORD, "ssl_cafile": str(self.folder / "ca.pem")}
        assert {*own} < {*json.loads(example)}
        return {**json.loads(example), **own}


@pytest.fixture(scope="module")
def secured(kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other_ca.pem")
    issued = authority.issue_cert("localhost")
    key = pem.load_pem_private_key(issued.private_key_pem.bytes(), None)
    options = pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()  # as Kafka wants it
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    (folder / "server.pem").write_bytes(key.private_bytes(*options) + chain)
    jaas = "org.apache.kafka.common.security.plain.PlainLoginModule"
    settings = {
        "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN",
        "KAFKA_LISTENER_NAME_SASL_PLAIN_SASL_JAAS_CONFIG": f'{jaas} required user_me="{PASSWORD}";',
        "KAFKA_SSL_KEYSTORE_TYPE": "PEM",
        "KAFKA_SSL_KEYSTORE_LOCATION": str(folder / "server.pem"),
    }
    secured = Secured(Broker(folder, environment=settings), f"localhost:{free_port()}", folder)
    add_listener(secured.broker, "SASL", "SASL_SSL", secured.address)
    with secured.broker:
        yield secured


@pytest.fixture
def broker(secured: Secured) -> Broker:
    """The secured broker instead of the usual one."""
    return secured.broker


def test_a_password_is_accepted(start: Start, secured: Secured, witness: Witness) -> None:
    login: dict[str, Any] = {"address": secured.address, "settings": secured.password_settings()}
    producer = send_events(start, 100, **login)
    log = witness.messages()
    assert sorted(producer.lines) == event_lines(log)
    assert witness.partitions() == [0, 1, 2]
    consumer = start("consumer.py", **login)
    wait_until(lambda: sorted(consumer.lines) == sorted(producer.lines), "all are printed")
    assert_clean_stop(consumer)
    processor = start("processor.py", "--once", "--group", "counting", **login)
    assert processor.wait() == 0
    assert processor.snapshots == [counts_of(log)]
    assert_plain_stderr(producer, processor)
    assert not any(PASSWORD in s.err + s.out for s in (producer, consumer, processor))


def test_failed_connections_are_reported(start: Start, secured: Secured) -> None:
    """Tried with one script each, as all have the same code for it."""
    password = secured.password_settings()
    other_ca = {"ssl_cafile": str(secured.folder / "other_ca.pem")}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        closing = Proxy(free_port(), target_port=free_port())  # as nobody listens behind it
        attempts: list[tuple[str, dict[str, str], str]] = [
            (f"localhost:{free_port()}", {}, "KafkaConnectionError: .*ECONNREFUSED"),
            ("no.such.host.invalid:9092", {}, "KafkaConnectionError: DNS Resolution failure"),
            (f"127.0.0.1:{silent.getsockname()[1]}", {}, ".*RequestTimedOutError"),
            (closing.address, {}, ".*(disconnected|reset|RESET)"),
            (secured.address, password | {"sasl_plain_password": PASSWORD[1:]}, REJECTED),
            (secured.address, password | other_ca, ".*certificate verify failed"),
            (secured.address, password | {"ssl_cafile": "/no/ca.pem"}, ".*No such file"),
        ]
        names = itertools.cycle(SCRIPTS)
        scripts = [start(next(names), address=a, settings=s) for a, s, _ in attempts]
        for script, (address, _, expected) in zip(scripts, attempts, strict=True):
            assert script.wait() == 1
            assert script.out == ""
            *attempts_failed, end = script.err.splitlines()
            assert 1 <= len(attempts_failed) <= 15  # three for each attempt in 10 s
            assert re.match(f"--- .*failed: {expected}", attempts_failed[0])
            assert end.startswith(f"--- cannot connect to {address} (")
            assert end.endswith(", or check address and login")
            assert PASSWORD[1:] not in script.err

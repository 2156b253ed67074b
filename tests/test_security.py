"""A secured broker: the pipeline works on it, and reasons are reported where it does not."""

import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
import trustme
from broker import Broker, free_port
from broker_settings import FAST_RETURN
from confluent_kafka import admin
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pipeline import run_pipeline
from scripts import (
    SCRIPTS,
    Start,
    assert_clean_stop,
    assert_plain_stderr,
    send_events,
    wait_until,
)
from witness import Witness

PASSWORD = "correct-horse"
PASSWORD_USERS = (("PLAIN", "plain"), ("SCRAM-SHA-512", "scram"))  # mechanism, user
JAAS = "org.apache.kafka.common.security"


class SecuredBroker:
    """A broker with listeners that ask for different credentials.

    OPEN asks for none, SASL for a password over TLS, MUTUAL for a client certificate.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "other_ca.pem")
        self.write_pem("server", "localhost")
        self.write_pem("client", "client.example")
        names = ("OPEN", "SASL", "MUTUAL", "CONTROLLER")
        ports = {name: free_port() for name in names}
        addresses = {name: f"localhost:{port}" for name, port in ports.items()}
        self.sasl, self.mutual = addresses["SASL"], addresses["MUTUAL"]
        listeners = [f"{name}://{address}" for name, address in addresses.items()]
        settings = {
            "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@{addresses['CONTROLLER']}",
            "KAFKA_LISTENERS": ",".join(listeners),
            "KAFKA_ADVERTISED_LISTENERS": ",".join(listeners[:3]),
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "OPEN:PLAINTEXT,"
            "SASL:SASL_SSL,MUTUAL:SSL,CONTROLLER:PLAINTEXT",
            "KAFKA_INTER_BROKER_LISTENER_NAME": "OPEN",
            "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN,SCRAM-SHA-512",
            "KAFKA_LISTENER_NAME_SASL_PLAIN_SASL_JAAS_CONFIG": f"{JAAS}.plain.PlainLoginModule "
            f'required user_plain="{PASSWORD}";',
            # The image turns ___ into a hyphen.
            "KAFKA_LISTENER_NAME_SASL_SCRAM___SHA___512_SASL_JAAS_CONFIG": f"{JAAS}.scram."
            "ScramLoginModule required;",
            "KAFKA_LISTENER_NAME_MUTUAL_SSL_CLIENT_AUTH": "required",
            "KAFKA_SSL_KEYSTORE_TYPE": "PEM",
            "KAFKA_SSL_KEYSTORE_LOCATION": str(folder / "server.pem"),
            "KAFKA_SSL_TRUSTSTORE_TYPE": "PEM",
            "KAFKA_SSL_TRUSTSTORE_LOCATION": str(folder / "ca.pem"),
        }
        self.broker = Broker(folder, ports["OPEN"], FAST_RETURN | settings)

    def write_pem(self, name: str, host: str) -> None:
        """Write a certificate and its key, which Kafka wants in PKCS#8."""
        issued = self.authority.issue_cert(host)
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (self.folder / f"{name}.pem").write_bytes(pem)

    def sasl_settings(self, mechanism: str, user: str) -> dict[str, str]:
        """Return the scripts' environment for SASL."""
        return {
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": mechanism,
            "KAFKA_SASL_PLAIN_USERNAME": user,
            "KAFKA_SASL_PLAIN_PASSWORD": PASSWORD,
            "KAFKA_SSL_CAFILE": str(self.folder / "ca.pem"),
        }

    def mutual_settings(self) -> dict[str, str]:
        """Return the scripts' environment for MUTUAL."""
        return {
            "KAFKA_SECURITY_PROTOCOL": "SSL",
            "KAFKA_SSL_CAFILE": str(self.folder / "ca.pem"),
            "KAFKA_SSL_CERTFILE": str(self.folder / "client.pem"),
            "KAFKA_SSL_KEYFILE": str(self.folder / "client.pem"),
        }


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    secured = SecuredBroker(tmp_path_factory.mktemp("secured"))
    with secured.broker as broker:
        set_scram_password(Witness(broker.address), PASSWORD)
        yield secured


def set_scram_password(witness: Witness, password: str) -> None:
    """Set the password of the user called "scram"."""
    credentials = admin.ScramCredentialInfo(admin.ScramMechanism.SCRAM_SHA_512, 4096)
    user = admin.UserScramCredentialUpsertion("scram", credentials, password.encode())
    witness.request(witness.admin.alter_user_scram_credentials, user)


@pytest.fixture
def broker(secured: SecuredBroker) -> Broker:
    """The secured broker, without topics and groups, instead of the usual one."""
    Witness(secured.broker.address).delete_everything()
    return secured.broker


@pytest.mark.parametrize("credentials", ["PLAIN", "SCRAM-SHA-512", "client certificate"])
def test_the_pipeline_works_on_a_secured_broker(
    credentials: str, start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    if credentials == "client certificate":
        address, environment = secured.mutual, secured.mutual_settings()
    else:
        user = dict(PASSWORD_USERS)[credentials]
        address, environment = secured.sasl, secured.sasl_settings(credentials, user)
    scripts = run_pipeline(start, witness, address=address, environment=environment)
    assert_plain_stderr(*scripts)
    for script in scripts:
        assert PASSWORD not in script.err + script.out


def test_a_failed_connection_is_reported_with_its_reason(
    start: Start, secured: SecuredBroker
) -> None:
    """Tried with one script each, as all have the same code for it."""
    plain, scram = (secured.sasl_settings(*user) for user in PASSWORD_USERS)
    wrong_password = {"KAFKA_SASL_PLAIN_PASSWORD": PASSWORD[1:]}
    other_ca = {"KAFKA_SSL_CAFILE": str(secured.folder / "other_ca.pem")}
    missing_key = secured.mutual_settings() | {"KAFKA_SSL_KEYFILE": "/no/key.pem"}
    key_for_ca = {"KAFKA_SSL_CAFILE": PASSWORD * 100}  # a key instead of its file's name, say
    with socket.create_server(("127.0.0.1", 0)) as silent:
        attempts: list[tuple[str, dict[str, str], str]] = [
            (f"localhost:{free_port()}", {}, "KafkaConnectionError: .*ECONNREFUSED"),
            ("no.such.host.invalid:9092", {}, "KafkaConnectionError: DNS Resolution failure"),
            (f"127.0.0.1:{silent.getsockname()[1]}", {}, ".*RequestTimedOutError"),
            (secured.sasl, plain | wrong_password, "during login: "),
            (secured.sasl, scram | wrong_password, "during login: "),
            (secured.sasl, plain | {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-256"}, "during login: "),
            (secured.sasl, plain | other_ca, "during login: .*certificate verify failed"),
            (secured.mutual, missing_key, ".*No such file or directory"),
            (secured.sasl, plain | key_for_ca, ".*File name too long"),
        ]
        names = itertools.cycle(SCRIPTS)
        scripts = [start(next(names), address=a, environment=e) for a, e, _ in attempts]
        for script, (address, environment, expected) in zip(scripts, attempts, strict=True):
            assert script.wait() == 1
            assert script.out == ""
            [(reported_address, reason)] = script.find(reports.NO_CONNECTION)
            assert reported_address == address
            assert re.match(expected, reason)
            advice = reports.NOT_ACCEPTED if environment else reports.NO_BROKER
            assert script.find(advice)[0][0] == address
            assert len(script.err.splitlines()) == 2
            assert PASSWORD[1:] not in script.err


def test_a_login_that_is_rejected_after_an_outage_is_reported(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    """It is reported although the outage, with another reason, was reported before."""
    credentials = secured.sasl_settings("SCRAM-SHA-512", "scram")
    consumer = start("consumer.py", address=secured.sasl, environment=credentials)
    wait_until(lambda: consumer.err, "it has joined the group")
    set_scram_password(witness, "changed")
    secured.broker.stop()
    wait_until(lambda: consumer.find(reports.NO_CONNECTION), "the outage is reported")
    secured.broker.start()
    wait_until(lambda: len(consumer.find(reports.NO_CONNECTION)) > 1, "so is the rejected login")
    set_scram_password(witness, PASSWORD)
    assert_clean_stop(consumer)
    outage, rejection = (reason for _, reason in consumer.find(reports.NO_CONNECTION))
    assert not outage.startswith("during login")
    assert rejection.startswith("during login")


def test_variables_of_other_programs_do_no_harm(start: Start, witness: Witness) -> None:
    environment = {
        "KAFKA_SSL_PORT": "tcp://10.0.0.1:9093",  # Kubernetes' link to a service called kafka-ssl
        "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN",  # the broker image's own setting
    }
    send_events(start, 3, environment=environment)
    assert len(witness.messages()) == 3

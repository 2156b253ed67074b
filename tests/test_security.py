"""A secured cluster: the main job on it, and what the scripts report when they are rejected."""

import functools
import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from broker import Broker, free_port
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from conftest import RESTARTED_BROKER
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from events import event
from scripts import (
    MISSING_TOPIC,
    NO_PARTITIONS,
    SCRIPTS,
    Start,
    assert_few_plain_lines,
    send_events,
    wait_until,
)
from witness import GROUP_ID, TOPIC, Witness, run_pipeline

pytestmark = pytest.mark.xdist_group("secured")  # one process, and so one broker
PASSWORD = "correct-horse"
NOHOST = "NOHOST://no.such.host.invalid:9092"
PLAIN_USERS = f'user_plain="{PASSWORD}" user_nobody="{PASSWORD}"'


class SecuredBroker:
    """A broker with listeners for plain text, SASL over TLS, and TLS with client certificates.

    Another listener advertises a host name that does not exist, a common mistake.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "stranger.pem")
        self.write_pem("server", "localhost")
        self.write_pem("client", "client.example")
        names = ("PLAINTEXT", "SASL", "MUTUAL", "NOHOST", "CONTROLLER")
        ports = {name: free_port() for name in names}
        self.sasl, self.mutual, self.nohost = (f"localhost:{ports[name]}" for name in names[1:4])
        listeners = [f"{name}://localhost:{port}" for name, port in ports.items()]
        login = "org.apache.kafka.common.security"
        self.broker = Broker(
            folder,
            ports["PLAINTEXT"],
            RESTARTED_BROKER
            | {
                "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@localhost:{ports['CONTROLLER']}",
                "KAFKA_LISTENERS": ",".join(listeners),
                "KAFKA_ADVERTISED_LISTENERS": ",".join([*listeners[:3], NOHOST]),
                "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,"
                "CONTROLLER:PLAINTEXT,SASL:SASL_SSL,MUTUAL:SSL,NOHOST:PLAINTEXT",
                "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN,SCRAM-SHA-512",
                # The image turns ___ into a hyphen.
                "KAFKA_LISTENER_NAME_SASL_PLAIN_SASL_JAAS_CONFIG": f"{login}.plain."
                f"PlainLoginModule required {PLAIN_USERS};",
                "KAFKA_LISTENER_NAME_SASL_SCRAM___SHA___512_SASL_JAAS_CONFIG": f"{login}.scram."
                "ScramLoginModule required;",
                "KAFKA_LISTENER_NAME_MUTUAL_SSL_CLIENT_AUTH": "required",
                "KAFKA_SSL_KEYSTORE_TYPE": "PEM",
                "KAFKA_SSL_KEYSTORE_LOCATION": str(folder / "server.pem"),
                "KAFKA_SSL_TRUSTSTORE_TYPE": "PEM",
                "KAFKA_SSL_TRUSTSTORE_LOCATION": str(folder / "ca.pem"),
                "KAFKA_AUTHORIZER_CLASS_NAME": "org.apache.kafka.metadata.authorizer."
                "StandardAuthorizer",
                "KAFKA_SUPER_USERS": "User:ANONYMOUS;User:plain;User:scram;User:client",
                "KAFKA_SSL_PRINCIPAL_MAPPING_RULES": "RULE:^.*$/client/",
            },
        )

    def write_pem(self, name: str, host: str) -> None:
        """Write a certificate and its key, which Kafka expects in PKCS#8."""
        issued = self.authority.issue_cert(host)
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (self.folder / f"{name}.pem").write_bytes(pem)

    def sasl_settings(self, mechanism: str, user: str) -> dict[str, str]:
        return {
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": mechanism,
            "KAFKA_SASL_PLAIN_USERNAME": user,
            "KAFKA_SASL_PLAIN_PASSWORD": PASSWORD,
            "KAFKA_SSL_CAFILE": str(self.folder / "ca.pem"),
        }

    def mutual_settings(self) -> dict[str, str]:
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


@pytest.fixture
def witness(secured: SecuredBroker) -> Witness:
    """What librdkafka finds by the plain-text listener; neither the topic nor a group exists."""
    witness = Witness(secured.broker.address)
    witness.delete_everything()
    return witness


def set_scram_password(witness: Witness, password: str) -> None:
    """Set the password of the user "scram"."""
    credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    update = UserScramCredentialUpsertion("scram", credentials, password.encode())
    witness.request(witness.admin.alter_user_scram_credentials, [update])


@pytest.mark.parametrize("login", ["PLAIN", "SCRAM-SHA-512", "client certificate"])
def test_the_main_job_works_with_every_kind_of_login(
    login: str, start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    if login == "client certificate":
        address, environment = secured.mutual, secured.mutual_settings()
    else:
        user = "plain" if login == "PLAIN" else "scram"
        address, environment = secured.sasl, secured.sasl_settings(login, user)
    for script in run_pipeline(start, witness, address=address, environment=environment):
        assert_few_plain_lines(script)
        assert PASSWORD not in script.err + script.out


def test_the_reason_for_having_no_connection_is_reported(
    start: Start, secured: SecuredBroker
) -> None:
    """By one of the scripts in turn: how they connect is the same in all."""
    plain = secured.sasl_settings("PLAIN", "plain")
    wrong_password = {"KAFKA_SASL_PLAIN_PASSWORD": PASSWORD[1:]}
    wrong_authority = {"KAFKA_SSL_CAFILE": str(secured.folder / "stranger.pem")}
    no_certificate = secured.mutual_settings() | {"KAFKA_SSL_CERTFILE": "/no/cert.pem"}
    with socket.create_server(("127.0.0.1", 0)) as unresponsive:
        unresponsive_address = f"127.0.0.1:{unresponsive.getsockname()[1]}"
        cases: list[tuple[str, dict[str, str], str]] = [
            (f"localhost:{free_port()}", {}, "KafkaConnectionError: .*ECONNREFUSED"),
            ("no.such.host.invalid:9092", {}, "KafkaConnectionError: DNS Resolution failure"),
            (unresponsive_address, {}, ".*RequestTimedOutError: .*"),
            (secured.sasl, plain | wrong_password, "during login: .*"),
            (
                secured.sasl,
                secured.sasl_settings("SCRAM-SHA-512", "scram") | wrong_password,
                "during login: .*",
            ),
            (secured.sasl, plain | {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-256"}, "during login: .*"),
            (secured.sasl, plain | wrong_authority, "during login: .*certificate verify failed.*"),
            (secured.mutual, no_certificate, ".*No such file or directory"),
            # The text of a certificate instead of its file, for example.
            (secured.sasl, plain | {"KAFKA_SSL_CAFILE": PASSWORD * 100}, ".*File name too long.*"),
        ]
        scripts = [
            start(name, address=address, environment=environment)
            for name, (address, environment, _) in zip(
                itertools.cycle(SCRIPTS), cases, strict=False
            )
        ]
        for script, (address, environment, reason) in zip(scripts, cases, strict=True):
            assert script.wait() == 1
            assert script.out == ""
            first, last = script.err.splitlines()
            assert re.fullmatch(rf"--- no connection to {address} \({reason}\); retrying", first)
            if environment:  # it is not the broker that is missing
                names = ", ".join(environment)
                assert last == f"--- no broker at {address} accepts these settings: {names}"
            else:
                how = "docker compose up -d or python tests/broker.py in the folder kafka-practice"
                assert last == f"--- no broker at {address}; start one with {how}"
            assert PASSWORD[1:] not in script.err


def test_a_login_that_is_rejected_after_an_outage_is_reported(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    """Although the outage has been reported before, with another reason."""
    environment = secured.sasl_settings("SCRAM-SHA-512", "scram")
    consumer = start("consumer.py", address=secured.sasl, environment=environment)
    wait_until(lambda: consumer.err, "it is connected")
    set_scram_password(witness, "changed")
    secured.broker.stop()
    lost = re.compile(rf"^--- no connection to {secured.sasl} \((during login)?", re.MULTILINE)
    wait_until(lambda: lost.findall(consumer.err) == [""], "the outage is reported")
    secured.broker.start()
    wait_until(lambda: len(lost.findall(consumer.err)) > 1, "the rejected login is reported")
    set_scram_password(witness, PASSWORD)
    assert consumer.stop() == 0
    assert lost.findall(consumer.err) == ["", "during login"]
    assert_few_plain_lines(consumer)


def test_variables_of_other_programs_are_ignored(start: Start, witness: Witness) -> None:
    """Kubernetes' service links (kafka-ssl, kafka-sasl) and the variables of the broker's image."""
    theirs = {
        "KAFKA_SSL_PORT": "tcp://10.0.0.1:9093",
        "KAFKA_SSL_SERVICE_HOST": "10.0.0.1",
        "KAFKA_SASL_PORT": "tcp://10.0.0.2:9093",
        "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN",
        "KAFKA_SSL_KEYSTORE_LOCATION": "/etc/kafka/server.pem",
        "KAFKA_SECURITY_INTER_BROKER_PROTOCOL": "PLAINTEXT",
    }
    send_events(start, 3, address=witness.address, environment=theirs)
    assert len(witness.messages()) == 3


def test_an_unreachable_advertised_address_is_reported(
    start: Start, secured: SecuredBroker
) -> None:
    unreachable = (
        r"--- no connection to no\.such\.host\.invalid:9092 \(KafkaConnectionError: DNS.*\n"
    )
    producer, *readers = (start(name, address=secured.nohost) for name in SCRIPTS)
    assert producer.wait() == 1
    assert re.fullmatch(unreachable + MISSING_TOPIC, producer.err)
    for reader in readers:
        wait_until(lambda: NO_PARTITIONS in reader.err, "it reports that it is assigned none")
        assert reader.stop(timeout=20) == 0
        assert re.fullmatch(rf"{unreachable}--- .*\n--- leaving the group\n", reader.err)


def allow(witness: Witness, resource: ResourceType, name: str) -> None:
    """Allow the user "nobody" to do everything with the topic or the group."""
    rule = (ResourcePatternType.LITERAL, "User:nobody", "*", AclOperation.ALL)
    binding = AclBinding(resource, name, *rule, AclPermissionType.ALLOW)
    witness.request(witness.admin.create_acls, [binding])


def test_readers_wait_for_access_to_the_topic_and_the_producer_exits(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    witness.create_topic(3)
    witness.write((number % 3, b"k", event()) for number in range(9))
    environment = secured.sasl_settings("PLAIN", "nobody")
    allow(witness, ResourceType.GROUP, GROUP_ID)
    run = functools.partial(start, address=secured.sasl, environment=environment)
    producer, *readers = run("producer.py"), run("consumer.py"), run("processor.py")
    assert producer.wait() == 1
    assert re.fullmatch(MISSING_TOPIC, producer.err)
    for reader in readers:
        wait_until(lambda: NO_PARTITIONS in reader.err, "it reports why it waits")
    allow(witness, ResourceType.TOPIC, TOPIC)
    consumer, processor = readers
    wait_until(lambda: consumer.lines or processor.snapshots, "they continue")
    assert processor.stop() == 0
    wait_until(lambda: len(consumer.lines) == 9, "all events are printed")
    assert consumer.stop() == 0
    for reader in readers:
        assert_few_plain_lines(reader)
        assert reader.err.count(NO_PARTITIONS) == 1

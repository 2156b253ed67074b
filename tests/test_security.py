"""A Kafka that asks who you are: the main job on it, and what a person reads when it fails."""

import functools
import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from broker import Broker, free_port
from confluent_kafka.admin._acl import AclBinding, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from confluent_kafka.admin._scram import (
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from conftest import CHEAP
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from harness import (
    GROUP,
    SCRIPTS,
    TOPIC,
    Proxy,
    Start,
    Witness,
    assert_plain,
    event,
    main_job,
    produce,
    until,
)

pytestmark = pytest.mark.xdist_group("secured")  # one worker, and so one broker
PASSWORD = "correct-horse"
NOHOST = "NOHOST://no.such.host.invalid:9092"
PLAIN_USERS = f'user_plain="{PASSWORD}" user_nobody="{PASSWORD}"'


class SecuredBroker:
    """A broker with four doors: open, SASL, SASL over TLS, and TLS with client certificates.

    Behind one more it names itself at an address that is of no use here, a common mistake.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "stranger.pem")
        self.write_pem("server", "localhost")
        self.write_pem("client", "client.example")
        names = ("PLAINTEXT", "LOGIN", "SASL", "MUTUAL", "NOHOST", "CONTROLLER")
        ports = {name: free_port() for name in names}
        self.sasl, self.mutual, self.nohost = (f"localhost:{ports[name]}" for name in names[2:5])
        self.login = Proxy(free_port(), ports["LOGIN"])
        doors = [f"{name}://localhost:{port}" for name, port in ports.items()]
        login = "org.apache.kafka.common.security"
        self.broker = Broker(
            folder,
            ports["PLAINTEXT"],
            CHEAP
            | {
                "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@localhost:{ports['CONTROLLER']}",
                "KAFKA_LISTENERS": ",".join(doors),
                "KAFKA_ADVERTISED_LISTENERS": ",".join([*doors[:4], NOHOST]),
                "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,"
                "CONTROLLER:PLAINTEXT,LOGIN:SASL_PLAINTEXT,SASL:SASL_SSL,MUTUAL:SSL,"
                "NOHOST:PLAINTEXT",
                "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN,SCRAM-SHA-512",
                # The image turns ___ into a hyphen.
                **{
                    f"KAFKA_LISTENER_NAME_{door}_PLAIN_SASL_JAAS_CONFIG": f"{login}.plain."
                    f"PlainLoginModule required {PLAIN_USERS};"
                    for door in ("SASL", "LOGIN")
                },
                **{
                    f"KAFKA_LISTENER_NAME_{door}_SCRAM___SHA___512_SASL_JAAS_CONFIG": f"{login}."
                    "scram.ScramLoginModule required;"
                    for door in ("SASL", "LOGIN")
                },
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
        """A certificate and its key, which Kafka wants in PKCS#8."""
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
        credentials = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        update = UserScramCredentialUpsertion("scram", credentials, PASSWORD.encode())
        witness = Witness(broker.address)
        witness.ask(witness.admin.alter_user_scram_credentials, [update])
        yield secured


@pytest.fixture
def witness(secured: SecuredBroker) -> Witness:
    """Looks through the open door; neither topic nor group exists."""
    witness = Witness(secured.broker.address)
    witness.clean()
    return witness


@pytest.mark.parametrize("door", ["PLAIN", "SCRAM-SHA-512", "client certificate"])
def test_the_main_job(door: str, start: Start, secured: SecuredBroker, witness: Witness) -> None:
    if door == "client certificate":
        address, environment = secured.mutual, secured.mutual_settings()
    else:
        user = "plain" if door == "PLAIN" else "scram"
        address, environment = secured.sasl, secured.sasl_settings(door, user)
    for script in main_job(start, witness, address=address, environment=environment):
        assert_plain(script)
        assert PASSWORD not in script.err + script.out


def test_every_wrong_way_has_its_reason(start: Start, secured: SecuredBroker) -> None:
    """With one of the scripts in turn: what they do until they are connected is the same in all."""
    good = secured.sasl_settings("PLAIN", "plain")
    wrong = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_PLAIN_PASSWORD": PASSWORD[1:]}
    stranger = str(secured.folder / "stranger.pem")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = f"127.0.0.1:{silent.getsockname()[1]}"
        ways: list[tuple[str, dict[str, str], str]] = [
            (f"localhost:{free_port()}", {}, "ECONNREFUSED"),
            ("no.such.host.invalid:9092", {}, "DNS Resolution failure"),
            (silence, {}, "RequestTimedOutError"),
            (secured.login.address, good | wrong, "SaslAuthenticationFailedError"),
            (secured.sasl, good | {"KAFKA_SSL_CAFILE": stranger}, "certificate verify failed"),
            (secured.sasl, good | {"KAFKA_SSL_CAFILE": "/no/ca.pem"}, "No such file or directory"),
            # A key itself instead of its file, say.
            (secured.sasl, good | {"KAFKA_SSL_CAFILE": PASSWORD * 100}, "File name too long"),
        ]
        scripts = [
            start(name, address=address, environment=environment)
            for name, (address, environment, _) in zip(itertools.cycle(SCRIPTS), ways, strict=False)
        ]
        for script, (address, _, reason) in zip(scripts, ways, strict=True):
            assert script.wait() == 1
            assert script.out == ""
            first, last = script.err.splitlines()
            why = rf"--- no connection to {address} \(.*{reason}.*\); trying again"
            assert re.fullmatch(why, first), first
            how = "docker compose up -d or python tests/broker.py"
            assert last == f"--- no Kafka at {address}: {how}"
            assert PASSWORD[1:] not in script.err


def test_variables_that_others_set_do_no_harm(start: Start, witness: Witness) -> None:
    """Kubernetes' links to services called kafka-ssl and kafka-sasl, and the broker image's own."""
    theirs = {
        "KAFKA_SSL_PORT": "tcp://10.0.0.1:9093",
        "KAFKA_SSL_SERVICE_HOST": "10.0.0.1",
        "KAFKA_SASL_PORT": "tcp://10.0.0.2:9093",
        "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN",
        "KAFKA_SSL_KEYSTORE_LOCATION": "/etc/kafka/server.pem",
        "KAFKA_SECURITY_INTER_BROKER_PROTOCOL": "PLAINTEXT",
    }
    produce(start, 3, address=witness.address, environment=theirs)
    assert len(witness.log()) == 3


def test_a_broker_that_cannot_be_reached_at_its_own_address(
    start: Start, secured: SecuredBroker
) -> None:
    lost = r"--- no connection to no\.such\.host\.invalid:9092 \(KafkaConnectionError: DNS.*\n"
    producer, *readers = (start(name, address=secured.nohost) for name in SCRIPTS)
    assert producer.wait() == 1
    assert re.fullmatch(rf"{lost}--- Kafka shows no topic events; .*\n", producer.err)
    for reader in readers:
        until(lambda: "partitions of events: none yet: " in reader.err, "it says what it has")
        assert reader.stop(timeout=20) == 0
        assert re.fullmatch(rf"{lost}--- .*\n--- leaving the group\n", reader.err)


def allow(witness: Witness, resource: ResourceType, name: str) -> None:
    """Lets the user "nobody" do everything with the topic or the group."""
    rule = (ResourcePatternType.LITERAL, "User:nobody", "*", AclOperation.ALL)
    binding = AclBinding(resource, name, *rule, AclPermissionType.ALLOW)
    witness.ask(witness.admin.create_acls, [binding])


def test_a_topic_that_one_may_not_read_or_write(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    witness.create(3)
    witness.write((number % 3, b"k", event()) for number in range(9))
    environment = secured.sasl_settings("PLAIN", "nobody")
    allow(witness, ResourceType.GROUP, GROUP)
    run = functools.partial(start, address=secured.sasl, environment=environment)
    producer, *readers = run("producer.py"), run("consumer.py"), run("processor.py")
    assert producer.wait() == 1
    assert producer.err.startswith(f"--- Kafka shows no topic {TOPIC}; ")
    for reader in readers:
        until(lambda: "no right to it" in reader.err, "it says why it waits")
    allow(witness, ResourceType.TOPIC, TOPIC)
    consumer, processor = readers
    until(lambda: consumer.lines or processor.snapshots, "they go on")
    assert processor.stop() == 0
    until(lambda: len(consumer.lines) == 9, "all events are shown")
    assert consumer.stop() == 0
    for reader in readers:
        assert_plain(reader)
        assert reader.err.count("no right to it") == 1

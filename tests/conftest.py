"""Fixtures: brokers, a view of them, and a way to start scripts that leaves no process behind."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import Broker, free_port, version
from proxy import Proxy
from scripts import Pipe, Script, Start, python, wait_until
from witness import Witness

# A shell's background jobs ignore Ctrl-C and Ctrl-\, and so would the scripts started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Settings that make a broker cheap. An idle one writes a record to its own metadata twice a second,
# a third of what it costs. 50 partitions for the groups' offsets take time to create and restore.
CHEAP_BROKER = {
    "KAFKA_METADATA_MAX_IDLE_INTERVAL_MS": "0",
    "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "3",
}
# And that let it come back soon after a kill -9: the controller waits for its session to time out.
RESTARTED_BROKER = CHEAP_BROKER | {
    "KAFKA_BROKER_SESSION_TIMEOUT_MS": "1500",
    "KAFKA_BROKER_HEARTBEAT_INTERVAL_MS": "300",
}


def pytest_configure() -> None:
    """Have Java store the classes that a broker loads: other brokers start twice as fast (JEP 514).

    This also downloads Kafka before pytest-xdist's processes start. They find the stored classes.
    """
    # Not in pytest's cache: that may be switched off, or in a folder that is read-only.
    folder = Path(tempfile.gettempdir(), f"kafka-practice-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    classes = folder / f"{version()}.aot"
    if not classes.exists():
        new = folder / f"{os.getpid()}.new"
        with tempfile.TemporaryDirectory() as data:
            broker = Broker(Path(data))
            broker.configure()
            broker.java_options = (*Broker.java_options, f"-XX:AOTCacheOutput={new}")
            broker.start()
            broker.stop()
        new.rename(classes)
    # Java's own variable, so that a broker which a test starts by command has them as well.
    os.environ["JDK_JAVA_OPTIONS"] = f"-XX:AOTCache={classes}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that they do not run alone in the end.

    Check that pytest-xdist has marked the groups: without the marks it runs them apart, silently.
    """
    items.sort(key=lambda item: item.path.stem != "test_readme")
    for item in items if "PYTEST_XDIST_WORKER" in os.environ else ():
        assert "@" in item.nodeid or not item.get_closest_marker("xdist_group"), item.nodeid


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker for all tests that do not break it."""
    with Broker(tmp_path_factory.mktemp("broker"), environment=CHEAP_BROKER) as broker:
        yield broker


@pytest.fixture
def broker(shared_broker: Broker) -> Broker:
    """The shared broker, on which neither the topic nor a group exists."""
    assert shared_broker.process is not None
    process = psutil.Process(shared_broker.process.pid)
    # A client of the last test may have left a metadata request behind its long poll, on a
    # connection that it has closed since. Answered after the deletion, it creates the topic again.
    wait_until(
        lambda: all(c.status != psutil.CONN_CLOSE_WAIT for c in process.net_connections()),
        "the broker has noticed that the last test's clients are gone",
    )
    Witness(shared_broker.address).delete_everything()
    return shared_broker


@pytest.fixture
def witness(broker: Broker) -> Witness:
    """What librdkafka finds on the test's broker."""
    return Witness(broker.address)


@pytest.fixture(scope="session")
def shared_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    broker = Broker(tmp_path_factory.mktemp("broker"), environment=CHEAP_BROKER)
    proxy = Proxy(free_port(), broker.port)
    broker.environment["KAFKA_ADVERTISED_LISTENERS"] = f"PLAINTEXT://{proxy.address}"
    broker.environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] = "false"
    with broker:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Proxy:
    """The only way to a broker that creates no topics, and on which there are none, nor groups.

    Tests that use it are marked `xdist_group("proxy")`: they run in one process and share it.
    """
    shared_proxy.reset()
    Witness(shared_proxy.address).delete_everything()
    return shared_proxy


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    """A pipe that is emptied only by its read()."""
    pipe = Pipe(tmp_path)
    yield pipe
    os.close(pipe.end)


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """start("consumer.py", "--group", "x") runs a script against the test's broker.

    `address` names another broker, `environment` adds variables, `command` replaces the script.
    Whatever still runs when the test is over is stopped; what it printed is part of a failure.
    """
    scripts: list[Script] = []

    def start_script(
        *arguments: str,
        address: str | None = None,
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
    ) -> Script:
        if address is None:
            address = request.getfixturevalue("broker").address
        variables = {"KAFKA_BOOTSTRAP_SERVERS": address, **(environment or {})}
        script = Script(tmp_path, command or python(*arguments), variables)
        scripts.append(script)
        return script

    yield start_script

    for script in scripts:
        for process in script.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    for script in scripts:
        try:
            script.wait(20)
        except Exception:
            script.process.kill()
            script.wait()
        print(f"--- {script.command}: {script.process.returncode}")
        print(script.out[-400:], script.err[-4000:], sep="\n")

"""Every test runs against brokers of its own, on free ports, and leaves no process behind."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import Broker, version
from harness import Pipe, Script, Start, Witness, python, until

# A shell's background jobs start with Ctrl-C and Ctrl-\ ignored, and would hand that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# An idle broker writes a record to its own metadata twice a second, a third of what it costs. The
# partitions for the groups' offsets are 50, which take their time to be created and to be restored.
CHEAP = {
    "KAFKA_METADATA_MAX_IDLE_INTERVAL_MS": "0",
    "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "3",
}
# After a kill -9 the controller lets the broker back in when its session is over, 9 s by default.
QUICK_RETURN = CHEAP | {
    "KAFKA_BROKER_SESSION_TIMEOUT_MS": "1500",
    "KAFKA_BROKER_HEARTBEAT_INTERVAL_MS": "300",
}


def pytest_configure(config: pytest.Config) -> None:
    """Has Java keep the classes that a broker loads: the others start in half the time (JEP 514).

    So Kafka is downloaded before pytest-xdist's workers start, which find the file.
    """
    assert config.cache is not None
    classes = config.cache.mkdir("kafka") / f"{version()}.aot"
    if not classes.exists():
        new = classes.with_suffix(".new")
        with tempfile.TemporaryDirectory() as folder:
            broker = Broker(Path(folder))
            broker.configure()
            broker.java_options = (*Broker.java_options, f"-XX:AOTCacheOutput={new}")
            broker.start()
            broker.stop()
        new.rename(classes)
    # Java's own variable, so that a broker which a test starts by command has them as well.
    os.environ["JDK_JAVA_OPTIONS"] = f"-XX:AOTCache={classes}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest tests first, so that they do not stand alone at the end.

    Checks that pytest-xdist has marked the groups: it goes on without them, and says nothing.
    """
    items.sort(key=lambda item: item.path.stem != "test_readme")
    for item in items if "PYTEST_XDIST_WORKER" in os.environ else ():
        assert "@" in item.nodeid or not item.get_closest_marker("xdist_group"), item.nodeid


@pytest.fixture(scope="session")
def lasting_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests that do not break it."""
    with Broker(tmp_path_factory.mktemp("broker"), environment=CHEAP) as broker:
        yield broker


@pytest.fixture
def broker(lasting_broker: Broker) -> Broker:
    """A running broker on which neither the topic nor a group exists."""
    assert lasting_broker.process is not None
    process = psutil.Process(lasting_broker.process.pid)
    # A client of the last test may have left a metadata request behind its long poll, on a
    # connection that it has closed since: answered after the deletion, that creates the topic anew.
    until(
        lambda: all(c.status != psutil.CONN_CLOSE_WAIT for c in process.net_connections()),
        "the broker has noticed that the last test's clients are gone",
    )
    Witness(lasting_broker.address).clean()
    return lasting_broker


@pytest.fixture
def witness(broker: Broker) -> Witness:
    return Witness(broker.address)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    pipe = Pipe(tmp_path)
    yield pipe
    os.close(pipe.end)


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """start("consumer.py", "--group", "x"): runs a script against the test's broker.

    `environment` and `address` may be given by name; `command` runs something else instead.
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
        for process in script.tree():
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

"""The fixtures. Tests run on their own brokers, on free ports, and leave no process behind."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from broker import DOWNLOADS, Broker, jars, version
from broker_settings import FAST_RETURN
from filelock import FileLock
from proxy import Proxy, add_proxy
from scripts import Start, wait_until
from witness import Witness

# What a person's shell exports for the scripts, for Python or for Java is not for the tests.
FOREIGN = ("KAFKA_", "PYTHON", "JAVA", "_JAVA", "JDK_", "LANG", "LC_", "COLUMNS", "FORCE_COLOR")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]

# A shell starts background jobs with Ctrl-C and Ctrl-\ ignored, which processes inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Each file's tests run one after the other; files with the longest ones should begin first.
SLOWEST_FIRST = ["test_outages", "test_readme", "test_cluster", "test_groups", "test_quick_start"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def kafka() -> None:
    """Download Kafka, and have Java store the classes that a broker loads in a file.

    Java reads this AOT cache (JEP 514) faster than 46 jars: brokers start in half the time.
    """
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    classes = DOWNLOADS / version() / "classes.aot"
    with FileLock(DOWNLOADS / "lock"):  # the first of pytest-xdist's processes does it for all
        jars()
        if not classes.exists():
            with tempfile.TemporaryDirectory() as data:
                broker, new = Broker(Path(data)), classes.with_name("new")
                broker.configure()
                broker.java_options = (*Broker.java_options, f"-XX:AOTCacheOutput={new}")
                broker.start()
                broker.stop()
            new.rename(classes)
    Broker.java_options = (*Broker.java_options, f"-XX:AOTCache={classes}")


@pytest.fixture(scope="session")
def shared_broker(
    kafka: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Broker, Proxy]]:
    """A broker, and the proxy in front of it. Each of pytest-xdist's processes has its own."""
    broker = Broker(tmp_path_factory.mktemp("broker"), environment=FAST_RETURN)
    proxy = add_proxy(broker)
    with broker:
        yield broker, proxy


@pytest.fixture
def broker(shared_broker: tuple[Broker, Proxy]) -> Broker:
    """A running broker without topics and groups."""
    broker, _ = shared_broker
    if not broker.is_running():  # a test of an outage has failed
        broker.start()
    assert broker.process is not None
    process = psutil.Process(broker.process.pid)

    def has_read_all_requests() -> bool:
        return all(c.status != psutil.CONN_CLOSE_WAIT for c in process.net_connections())

    # A connection is in CLOSE_WAIT as long as its client has closed it and the broker has not. A
    # request for the topic's metadata that is read late would create the topic again after this.
    wait_until(has_read_all_requests, "the broker has closed the last test's connections")
    Witness(broker.address).delete_everything()
    return broker


@pytest.fixture
def witness(broker: Broker) -> Witness:
    """The test's broker as another client sees it."""
    return Witness(broker.address)


@pytest.fixture
def proxy(shared_broker: tuple[Broker, Proxy], broker: Broker) -> Proxy:
    """A proxy in front of the test's broker: start(..., address=proxy.address)."""
    _, proxy = shared_broker
    proxy.pass_response = lambda api_key: True
    return proxy


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """start("consumer.py", "--group", "x") runs a script until the end of the test."""
    start = Start(tmp_path, lambda: str(request.getfixturevalue("broker").address))
    yield start
    start.terminate_all()

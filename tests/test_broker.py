"""tests/broker.py as a program; on a free port here, where users have it on 9092."""

import signal
import socket
import sys
from pathlib import Path

from broker import ROOT, free_port
from harness import Script, Start, Witness, event, until

# Runs the program on the port given first, with its data under the folder given second.
PROGRAM = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import broker
broker.PORT, broker.ROOT = int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
sys.exit(broker.main())
"""


def program(start: Start, port: int, folder: Path, *command: str) -> Script:
    arguments = [sys.executable, "-c", PROGRAM, str(port), str(folder), *command]
    return start(command=arguments, address="nowhere:1")


def test_it_serves_until_ctrl_c_and_keeps_the_events(start: Start, tmp_path: Path) -> None:
    tmp_path = tmp_path / "Zoë's folder"
    tmp_path.mkdir()
    port = free_port()
    for run in range(2):
        broker = program(start, port, tmp_path)
        until(lambda: "ready" in broker.out, "it says that it is ready")
        assert f"localhost:{port}" in broker.out
        assert "Ctrl-C" in broker.out
        witness = Witness(f"localhost:{port}")
        if run == 0:
            witness.create(3)
            witness.write([(0, b"key", event())] * 5)
        assert len(witness.log()) == 5
        assert broker.stop(signal.SIGINT if run == 0 else signal.SIGTERM) == 0
        assert broker.err == ""
    assert (tmp_path / ".kafka" / "data").is_dir()


def test_it_serves_a_command_and_ends_with_its_status(start: Start, tmp_path: Path) -> None:
    port = free_port()
    job = f"{sys.executable} producer.py --count 3 --interval 0 --quiet && env && exit 7"
    broker = program(start, port, tmp_path, "sh", "-c", job)
    assert broker.wait() == 7
    assert f"KAFKA_BOOTSTRAP_SERVERS=localhost:{port}" in broker.lines
    assert broker.err == "3 delivered, 0 failed\n"
    assert not (tmp_path / ".kafka").exists()


def test_it_refuses_a_port_that_is_taken(start: Start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        for command in ([], ["true"]):
            broker = program(start, port, tmp_path, *command)
            assert broker.wait() == 1
            assert broker.out == ""
            assert broker.err == f"port {port} is taken: does a broker run already?\n"

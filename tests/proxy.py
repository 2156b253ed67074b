"""A proxy between the scripts and a broker, which can hold up and lose responses."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from broker import Broker, free_port
from broker_settings import add_listener

# Kafka's numbers for kinds of requests, for Proxy.pass_response.
PRODUCE, FETCH, OFFSET_COMMIT, SYNC_GROUP = 0, 1, 8, 14
Keys = dict[int, int]  # the kinds of requests, by their correlation IDs
Connection = socket.socket


class Proxy:
    """Forward connections from one port to another, also while nobody listens there.

    As with a port that Docker publishes, a client can connect although the broker is down, and is
    disconnected at once. A test may replace pass_response(api_key), which is called before a
    response is forwarded, with the kind of its request. It may wait. If it returns False, the
    connection is closed instead.
    """

    def __init__(self, port: int, target_port: int) -> None:
        self.address = f"localhost:{port}"
        self.target_port = target_port
        self.pass_response: Callable[[int], bool] = lambda api_key: True
        self.listener = socket.create_server(("127.0.0.1", port), backlog=100)
        threading.Thread(target=self.accept, daemon=True).start()

    def delay(self, seconds: float, kind: int) -> None:
        """Forward each response to this kind of request so many seconds later."""

        def pass_response(api_key: int) -> bool:
            time.sleep(seconds if api_key == kind else 0)
            return True

        self.pass_response = pass_response

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                continue
            api_keys: Keys = {}
            for forward in (self.forward_requests, self.forward_responses):
                arguments = (client, server, api_keys)
                threading.Thread(target=forward, args=arguments, daemon=True).start()

    def forward_requests(self, client: Connection, server: Connection, api_keys: Keys) -> None:
        with closing_both(client, server), client.makefile("rb") as stream:
            while message := read_message(stream.read):
                api_key, _, correlation_id = struct.unpack_from(">hhi", message, 4)
                api_keys[correlation_id] = api_key
                server.sendall(message)

    def forward_responses(self, client: Connection, server: Connection, api_keys: Keys) -> None:
        with closing_both(client, server), server.makefile("rb") as stream:
            while message := read_message(stream.read):
                [correlation_id] = struct.unpack_from(">i", message, 4)
                if not self.pass_response(api_keys.pop(correlation_id)):
                    break
                client.sendall(message)


def read_message(read: Callable[[int], bytes]) -> bytes:
    """Return a request or response with its size in front; empty at the end of the stream."""
    size = read(4)
    return size + read(int.from_bytes(size, "big"))


@contextlib.contextmanager
def closing_both(*connections: Connection) -> Iterator[None]:
    # struct.error: a message that is cut off, as its sender was killed.
    with contextlib.suppress(OSError, struct.error):
        yield
    # kafka-python drops a response that arrives together with the end of the connection.
    time.sleep(0.1)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def add_proxy(broker: Broker) -> Proxy:
    """Give a broker that is not running yet one more listener, which is behind a proxy."""
    proxy = Proxy(free_port(), target_port=free_port())
    own_address = f"localhost:{proxy.target_port}"
    add_listener(broker, "PROXIED", "PLAINTEXT", own_address, advertised=proxy.address)
    return proxy

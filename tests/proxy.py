"""A TCP proxy that speaks Kafka's framing, to delay, slow down or cut off a broker's answers."""

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable

# API keys: Kafka's numbers for the kinds of request.
PRODUCE, HEARTBEAT, SYNC_GROUP = 0, 12, 14


class Proxy:
    """Forward connections to a port, and go on accepting them while nobody listens there.

    Docker's proxy for a published port does the same: a client gets a connection to a broker that
    is down, and loses it at once.

    A test may set `lets_pass(api_key)`, which is called with each response and the API key of its
    request. It returns whether the response is passed on, and may take its time; if it is not, the
    connection is cut. A test may also set `delay`, in seconds per request, and `rate`, in bytes of
    responses per second of all connections together.
    """

    def __init__(self, port: int, target: int) -> None:
        self.address = f"localhost:{port}"
        self.target = target
        self.reset()
        self.rate_lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=100)
        threading.Thread(target=self.accept, daemon=True).start()

    def reset(self) -> None:
        self.lets_pass: Callable[[int], bool] = lambda api_key: True
        self.delay, self.rate = 0.0, math.inf

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                continue
            self.connect(client, server)

    def connect(self, client: socket.socket, server: socket.socket) -> None:
        api_keys: dict[int, int] = {}  # of the requests, by correlation ID

        def request_passes(message: bytes) -> bool:
            api_key, _, correlation_id = struct.unpack_from(">hhi", message)
            api_keys[correlation_id] = api_key
            time.sleep(self.delay)
            return True

        def response_passes(message: bytes) -> bool:
            [correlation_id] = struct.unpack_from(">i", message)
            return self.lets_pass(api_keys.pop(correlation_id))

        def send_at_rate(data: bytes) -> None:
            for start in range(0, len(data), 10_000):
                with self.rate_lock:
                    time.sleep(len(data[start : start + 10_000]) / self.rate)
                client.sendall(data[start : start + 10_000])

        for arguments in (
            (client, request_passes, server, server.sendall),
            (server, response_passes, client, send_at_rate),
        ):
            threading.Thread(target=self.forward, args=arguments, daemon=True).start()

    def forward(
        self,
        source: socket.socket,
        passes: Callable[[bytes], bool],
        sink: socket.socket,
        send: Callable[[bytes], None],
    ) -> None:
        # struct.error: a message is cut off because its sender was killed.
        with contextlib.suppress(OSError, struct.error), source.makefile("rb") as stream:
            while size := stream.read(4):
                message = stream.read(int.from_bytes(size, "big"))
                if not passes(message):
                    break
                send(size + message)
        # kafka-python drops a response that arrives together with the end of the connection.
        time.sleep(0.1)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

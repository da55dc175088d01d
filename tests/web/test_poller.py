"""The poller's budget for large requests, with real sockets and without threads."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from functools import partial
from typing import Any

from gunicorn.config import Config

from service.web.gunicorn.connection import Connection
from service.web.gunicorn.poller import ConnectionLimits, Poller
from tests.harness.wait import wait_until

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
LIMITS = ConnectionLimits(max_connections=100, max_body_bytes=10**6, request_timeout_s=60, max_large_bytes=200_000)


def request(num_bytes: int) -> bytes:
    return HEAD + str(num_bytes).encode() + b"\r\n\r\n" + bytes(num_bytes)


def test_large_requests__that_are_answered_still_count() -> None:
    served: list[Connection] = []

    def serve(connection: Connection, _: Any) -> None:
        served.append(connection)

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        poller = Poller(Config(), [listener], LIMITS, lambda _: True, serve)

        def end() -> None:
            poller.abort()
            for connection in served:
                connection.close()
            poller.close()

        stack.callback(end)

        def send(data: bytes) -> socket.socket:
            client = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=10))
            client.sendall(data)
            return client

        def is_served(num_requests: int) -> bool:
            poller.run_once(0.01)
            return len(served) == num_requests

        def is_refused(client: socket.socket) -> bool:
            poller.run_once(0.01)
            client.setblocking(False)
            try:
                return client.recv(1000).startswith(b"HTTP/1.1 429 ")
            except BlockingIOError:
                return False

        for number in (1, 2):
            send(request(80_000))
            wait_until(partial(is_served, number))
        for data in (request(80_000), request(120_000)[:-1]):  # the last one never arrives completely
            refused = send(data)
            wait_until(partial(is_refused, refused))
        send(request(60_000))  # small ones do not count
        wait_until(lambda: is_served(3))
        poller.finish(served[0], False)
        send(request(80_000))
        wait_until(lambda: is_served(4))

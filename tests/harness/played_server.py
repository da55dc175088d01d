"""A server that a test plays: it answers each connection with bytes that the test has written."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def played(answers: list[bytes]) -> Iterator[tuple[str, list[tuple[float, bytes]]]]:
    """Serve one raw answer on each connection. Yields the URL, and the time and text of each request so far."""
    requests: list[tuple[float, bytes]] = []

    def serve(listener: socket.socket) -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(30)
                request = b""
                while not is_whole(request):
                    part = connection.recv(65_536)
                    assert part, "the client closed its connection before it had sent a request"
                    request += part
                requests.append((time.monotonic(), request))
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, listener)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        served.result(30)


def is_whole(request: bytes) -> bool:
    """Return whether head and body of a request have arrived."""
    head, end, body = request.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(end) and len(body) >= (int(lengths[0]) if lengths else 0)


def head(kind: str, status: str = "200 OK", *lines: str) -> bytes:
    """Return the head of an answer that ends with its connection."""
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *lines, "", ""]).encode()

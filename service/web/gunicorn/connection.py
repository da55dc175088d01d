"""One connection: its socket, and how far its current request is."""

from __future__ import annotations

import errno
import json
import math
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import Any

from service.web.gate.error_responses import error_body
from service.web.gunicorn.request_reader import Refusal, RequestReader

_RECEIVE_BYTES = 65_536
_SLICE_BYTES = 65_536
_IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Phase(Enum):
    """Who has the connection, and what for."""

    READING = auto()  # the poller waits for a request, or for the rest of one
    SERVING = auto()  # a thread answers a request; nothing is read meanwhile
    LINGERING = auto()  # the poller has ended its side, and drops what still arrives until the client ends its own


class SlowClientLimit:
    """Limits the threads that wait for slow readers, so that the other threads stay free for everyone else."""

    def __init__(self, num_threads: int) -> None:
        self._semaphore = threading.BoundedSemaphore(num_threads)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the current thread as waiting inside the block. Raises TimeoutError at once if too many wait."""
        if not self._semaphore.acquire(blocking=False):
            raise TimeoutError("too many threads wait for slow clients")
        try:
            yield
        finally:
            self._semaphore.release()


class ClientSocket(socket.socket):
    """A non-blocking socket that limits the time that the client takes to accept each slice of an answer."""

    send_timeout_s = 20
    slow_clients = SlowClientLimit(1)  # the worker replaces both

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send everything.

        Raises BrokenPipeError if the client reads too slowly, as if it had left.
        """
        try:
            num_sent = self.send(data, flags)
        except BlockingIOError:
            num_sent = 0
        if num_sent < len(data):
            self._send_rest(memoryview(data)[num_sent:], flags)

    def _send_rest(self, data: memoryview, flags: int) -> None:
        try:
            with self.slow_clients.waiting():
                self.settimeout(self.send_timeout_s)
                # In slices, because the timeout covers a whole call, and a large answer may take longer.
                for start in range(0, len(data), _SLICE_BYTES):
                    super().sendall(data[start : start + _SLICE_BYTES], flags)
        except TimeoutError as error:
            # Reset the connection: its buffers are dropped, and nobody waits for the client to close its side.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.close()
            raise BrokenPipeError(errno.EPIPE, "the client does not read") from error
        self.setblocking(False)


class Connection:
    """One connection. The poller uses it in the phases READING and LINGERING, a thread in the phase SERVING."""

    def __init__(self, sock: socket.socket, client: Any, server: Any, reader: RequestReader) -> None:
        """Take over a socket that `accept` has returned."""
        self.sock = ClientSocket(fileno=sock.detach())
        self.sock.setblocking(False)
        self.client, self.server, self.reader = client, server, reader
        self.network = network_of(client)
        self.phase = Phase.READING
        self.waiting_since = 0.0  # when it was accepted, or got its last answer; on the clock of time.monotonic
        self.began_at: float | None = None  # when the current request began to arrive
        self.deadline = math.inf  # when the poller stops waiting for the client
        self.num_small = self.num_large = 0  # bytes that the poller counts for this connection, in one of its budgets
        self.num_lingered = 0  # bytes dropped while LINGERING
        self.is_registered = False  # with the poller's selector

    def fileno(self) -> int:
        """The descriptor, for selectors. -1 if it is closed."""
        return self.sock.fileno()

    def receive(self) -> bool:
        """Read what has arrived. Return False if the client has ended its side. Raises OSError."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return True
        if self.phase is Phase.LINGERING:
            self.num_lingered += len(data)
        else:
            self.reader.add(data)
        return bool(data)

    def send_if_possible(self, data: bytes) -> None:
        """Send a few bytes, unless the client reads so slowly that they would have to wait."""
        with suppress(OSError):
            self.sock.send(data)

    def abort(self) -> None:
        """Shut down the socket, from any thread. A thread that writes to it finds it closed."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. Repeating it does nothing."""
        with suppress(OSError):
            self.sock.close()


def network_of(client: Any) -> str | bytes:
    """Return what counts as one client: an IPv4 address, or a /64 network of IPv6, which one client may have whole."""
    host = client[0].partition("%")[0] if isinstance(client, tuple) else ""
    if ":" not in host:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed if packed.startswith(_IPV4_IN_IPV6) else packed[:8]


def refusal_answer(refusal: Refusal) -> bytes:
    """Return the HTTP answer for a request that is refused before it reaches the application."""
    status = refusal.status
    body = json.dumps(error_body(refusal.message, refusal.code, status=status)).encode() + b"\n"
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        f"X-Request-Id: {refusal.request_id}",
        "X-Content-Type-Options: nosniff",
        *(["Retry-After: 1"] if status.value in (429, 503) else []),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body

"""Connections with limits on the time that a client takes to send a request and to read the answer."""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread

_SLICE_BYTES = 65_536
_SILENCE_S = 0.05  # that a thread listens to a new connection; after it, the loop that accepts others does
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Waiters:
    """How many threads may wait for clients at the same time: what is left of them answers the rest."""

    def __init__(self, num_threads: int) -> None:
        self._semaphore = threading.BoundedSemaphore(num_threads)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While a thread waits. Raises TimeoutError at once if it may not."""
        if not self._semaphore.acquire(blocking=False):
            raise TimeoutError("too many clients are slow")
        try:
            yield
        finally:
            self._semaphore.release()


class _Socket(socket.socket):
    """Sends with a limit on the time that the other side takes to accept each slice."""

    send_timeout_s = 20
    waiters = Waiters(1)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Raises BrokenPipeError, which gunicorn takes for a client that has gone, if it doesn't read."""
        try:
            num_sent = self.send(data, flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            num_sent = 0
        if num_sent < len(data):
            self._send_rest(memoryview(data)[num_sent:], flags)

    def _send_rest(self, data: memoryview, flags: int) -> None:
        # Only here: setting a time-out gives the interpreter's lock away, and with streams the engine waits for it.
        before = self.gettimeout()
        self.settimeout(self.send_timeout_s)
        try:
            with self.waiters.waiting():
                # In slices, because the time-out is one for the whole call: a large answer may take longer.
                for start in range(0, len(data), _SLICE_BYTES):
                    super().sendall(data[start : start + _SLICE_BYTES], flags)
        except TimeoutError as error:
            # What lies in the buffers is not to be kept for it, and nobody is to wait for it to close its side.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.close()
            raise BrokenPipeError(errno.EPIPE, "the client does not read") from error
        self.settimeout(before)


class _DeadlineUnreader(SocketUnreader):
    """Reads a connection until a deadline, after which it is as good as closed by the client."""

    deadline = 0.0

    def chunk(self, size_hint: int | None = None) -> bytes:
        """The next bytes. Raises NoMoreData, which gunicorn takes for a client that has gone."""
        if self._is_readable():
            data: bytes = super().chunk(size_hint)  # type: ignore[call-arg]
            return data
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise NoMoreData(b"the request took too long")
        before = self.sock.gettimeout()
        self.sock.settimeout(left if before is None else min(left, before))
        try:
            with _Socket.waiters.waiting():
                data = super().chunk(size_hint)  # type: ignore[call-arg]
        except TimeoutError as error:
            raise NoMoreData(b"the request took too long") from error
        finally:
            self.sock.settimeout(before)
        return data

    def _is_readable(self) -> bool:
        """Whether there is something that was sent within the deadline."""
        if time.monotonic() > self.deadline:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class Connection(gthread.TConn):
    """A connection whose every request has a deadline: headers and body together."""

    request_timeout_s = 30

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(cfg, _Socket(fileno=sock.detach()), client, server)

    def init(self) -> None:
        """Called before each request is read."""
        super().init()
        parser: Any = self.parser
        if not isinstance(parser.unreader, _DeadlineUnreader):
            parser.unreader = _DeadlineUnreader(self.sock)  # nothing was read through the other one yet
        parser.unreader.deadline = time.monotonic() + self.request_timeout_s

    def wait_for_data(self, timeout: float | None) -> bool:
        """Whether a request begins to come in, within the time at most."""
        return super().wait_for_data(_SILENCE_S if timeout is None else min(timeout, _SILENCE_S))

    def shut(self) -> None:
        """Wake who reads from it or writes to it; they find it closed. From any thread."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self, graceful: bool = False) -> None:
        """Harmless if it is closed."""
        if self.sock.fileno() >= 0:
            super().close(graceful)


def set_limits(request_timeout_s: int, send_timeout_s: int, num_waiting: int) -> None:
    """For all connections of this process. num_waiting: threads that may wait for clients at the same time."""
    Connection.request_timeout_s = request_timeout_s
    _Socket.send_timeout_s = send_timeout_s
    _Socket.waiters = Waiters(num_waiting)

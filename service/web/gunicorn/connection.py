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
_FIRST_BYTE_WAIT_S = 0.05  # how long a thread waits for a request on a new connection; then the main loop watches it
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class SlowClientLimit:
    """Limits the threads that wait for slow clients, so that the other threads stay free for everyone else."""

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


class _Socket(socket.socket):
    """A socket that limits the time that the client takes to accept each slice of an answer."""

    send_timeout_s = 20
    slow_clients = SlowClientLimit(1)  # set_limits replaces it

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send everything.

        Raises BrokenPipeError if the client reads too slowly. gunicorn then treats the client as disconnected.
        """
        try:
            num_sent = self.send(data, flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            num_sent = 0
        if num_sent < len(data):
            self._send_rest(memoryview(data)[num_sent:], flags)

    def _send_rest(self, data: memoryview, flags: int) -> None:
        # Setting a timeout releases the interpreter's lock, and during streams the engine waits for that lock. So the
        # timeout is set only here, for the few answers that didn't fit into the socket's buffer.
        before = self.gettimeout()
        self.settimeout(self.send_timeout_s)
        try:
            with self.slow_clients.waiting():
                # In slices, because the timeout covers a whole call, and a large answer may take longer.
                for start in range(0, len(data), _SLICE_BYTES):
                    super().sendall(data[start : start + _SLICE_BYTES], flags)
        except TimeoutError as error:
            # Reset the connection: its buffers are dropped, and no thread waits for the client to close its side.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.close()
            raise BrokenPipeError(errno.EPIPE, "the client does not read") from error
        self.settimeout(before)


class _DeadlineUnreader(SocketUnreader):
    """Reads from a connection until a deadline. After it, the connection counts as closed by the client."""

    deadline = 0.0  # on the clock of time.monotonic

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return the next bytes. Raises NoMoreData after the deadline; gunicorn treats the client as disconnected."""
        if self._is_readable():
            data: bytes = super().chunk(size_hint)  # type: ignore[call-arg]
            return data
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise NoMoreData(b"the request took too long")
        before = self.sock.gettimeout()
        self.sock.settimeout(remaining_s if before is None else min(remaining_s, before))
        try:
            with _Socket.slow_clients.waiting():
                data = super().chunk(size_hint)  # type: ignore[call-arg]
        except TimeoutError as error:
            raise NoMoreData(b"the request took too long") from error
        finally:
            self.sock.settimeout(before)
        return data

    def _is_readable(self) -> bool:
        """Return whether bytes can be read without waiting, and the deadline has not passed."""
        if time.monotonic() > self.deadline:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class Connection(gthread.TConn):
    """A connection with a deadline for each request, headers and body together."""

    request_timeout_s = 30

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(cfg, _Socket(fileno=sock.detach()), client, server)

    def init(self) -> None:
        """Set the deadline of the next request. gunicorn calls this before it reads each one."""
        super().init()
        parser: Any = self.parser
        if not isinstance(parser.unreader, _DeadlineUnreader):
            parser.unreader = _DeadlineUnreader(self.sock)  # gunicorn's own one has not read anything yet
        parser.unreader.deadline = time.monotonic() + self.request_timeout_s

    def wait_for_data(self, timeout: float | None) -> bool:
        """Return whether a request begins to arrive within `timeout` seconds, and within 0.05 s at most."""
        return super().wait_for_data(_FIRST_BYTE_WAIT_S if timeout is None else min(timeout, _FIRST_BYTE_WAIT_S))

    def abort(self) -> None:
        """Shut down the socket, from any thread. Threads that read from it or write to it find it closed."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self, graceful: bool = False) -> None:
        """Close the connection. Repeating it does nothing."""
        if self.sock.fileno() >= 0:
            super().close(graceful)


def set_limits(request_timeout_s: int, send_timeout_s: int, max_waiting_threads: int) -> None:
    """Set the limits of all connections of this process.

    Args:
        request_timeout_s: Seconds in which a request has to arrive, headers and body together.
        send_timeout_s: Seconds in which the client has to accept each slice of 64 KiB of an answer.
        max_waiting_threads: Threads that may wait for slow clients at the same time.
    """
    Connection.request_timeout_s = request_timeout_s
    _Socket.send_timeout_s = send_timeout_s
    _Socket.slow_clients = SlowClientLimit(max_waiting_threads)

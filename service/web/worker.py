"""gunicorn's gthread worker, with limits on the time that a client takes to send a request and to read the answer."""

from __future__ import annotations

import errno
import socket
import struct
import time
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread

_SLICE_BYTES = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Socket(socket.socket):
    """Sends with a limit on the time that the other side takes to accept each slice."""

    send_timeout_s = 20

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
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise NoMoreData(b"the request took too long")
        before = self.sock.gettimeout()
        self.sock.settimeout(left if before is None else min(left, before))
        try:
            data: bytes = super().chunk(size_hint)  # type: ignore[call-arg]
        except TimeoutError as error:
            raise NoMoreData(b"the request took too long") from error
        finally:
            self.sock.settimeout(before)
        return data


class _Connection(gthread.TConn):
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

    def close(self, graceful: bool = False) -> None:
        """Harmless if it is closed."""
        if self.sock.fileno() >= 0:
            super().close(graceful)


class Worker(gthread.ThreadWorker):
    """Without it, a client that sends half a header and stops, or doesn't read its answer, would hold a thread for
    ever, and one that doesn't close its connection would stop the loop that accepts others.
    """

    def init_process(self) -> None:
        """Runs in the worker, before it accepts connections."""
        # gunicorn has no setting for the class of a connection.
        gthread.TConn = _Connection  # type: ignore[misc]
        super().init_process()

    def run(self) -> None:
        """Accept connections until told to stop, and then answer who is there."""
        super().run()
        # An engine that is still in a step would abort the process as it ends. Who is still connected has used up the
        # time to drain, and gets an error.
        app: Any = self.wsgi
        app.extensions["gru_serve"].close()

    def handle(self, conn: Any) -> Any:
        """Answer a request, in a thread of the pool; true: the connection is to be kept."""
        keep = super().handle(conn)
        if not keep:
            # Here, because it waits up to 2 s for the client to close its side. gunicorn would do it in its main loop.
            conn.close(graceful=True)
        return keep


def worker_with_deadlines(request_timeout_s: int, send_timeout_s: int) -> type[Any]:
    """The worker class for gunicorn's `worker_class`."""
    _Connection.request_timeout_s = request_timeout_s
    _Socket.send_timeout_s = send_timeout_s
    return Worker

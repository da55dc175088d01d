"""gunicorn's gthread worker, with a limit on the time that a client takes to send a request."""

from __future__ import annotations

import time
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread


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

    def init(self) -> None:
        """Called before each request is read."""
        super().init()
        parser: Any = self.parser
        if not isinstance(parser.unreader, _DeadlineUnreader):
            parser.unreader = _DeadlineUnreader(self.sock)  # nothing was read through the other one yet
        parser.unreader.deadline = time.monotonic() + self.request_timeout_s


class Worker(gthread.ThreadWorker):
    """Without it, a client that sends half a header and stops would hold a thread for ever, thirty of them all."""

    def init_process(self) -> None:
        """Runs in the worker, before it accepts connections."""
        # gunicorn has no setting for the class of a connection.
        gthread.TConn = _Connection  # type: ignore[misc]
        super().init_process()


def worker_with_deadline(request_timeout_s: int) -> type[Any]:
    """The worker class for gunicorn's `worker_class`."""
    _Connection.request_timeout_s = request_timeout_s
    return Worker

"""The gunicorn worker: it lets threads answer the requests that the poller reads, and drains at SIGTERM."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import structlog
from gunicorn.http import wsgi
from gunicorn.workers.base import Worker as BaseWorker

from service.web.gate.drain import Drain
from service.web.gunicorn.connection import ClientSocket, Connection, SlowClientLimit, refusal_answer
from service.web.gunicorn.poller import ConnectionLimits, Poller
from service.web.gunicorn.request_reader import Refusal
from service.web.gunicorn.threads import Threads

log = structlog.get_logger(__name__)

_POLL_S = 1.0  # gunicorn's parent kills a worker that shows no sign of life for long
_DRAIN_POLL_S = 0.05
_LINGER_S = 2.0  # how long idle connections stay open after the drain: a request may be on its way on one of them
_JOIN_S = 2.0
_IGNORED_SIGNALS = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2, signal.SIGHUP)  # some are sent to a whole group
_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)


@dataclass(frozen=True)
class WorkerLimits:
    """What one worker process takes on."""

    connections: ConnectionLimits
    min_threads: int
    max_threads: int
    max_slow_readers: int  # threads that may wait for clients that read slowly
    send_timeout_s: int  # seconds in which a client has to accept each slice of 64 KiB of an answer


class Worker(BaseWorker):
    """Answers requests in threads, and keeps accepting connections while it drains.

    gunicorn's threaded worker gives each connection a thread before its request has arrived, and dies if the system
    has no descriptor or thread left. At SIGTERM it stops accepting connections at once, so that a balancer's health
    checks and retried requests are refused before the balancer knows why.
    """

    limits: WorkerLimits  # worker_class sets it
    _drain: Drain | None = None  # None until the application is built
    _poller: Poller | None = None  # None until the worker runs
    _linger_s = _LINGER_S

    def init_signals(self) -> None:
        """Set gunicorn's handlers, and ignore the signals that the parent handles alone."""
        super().init_signals()
        for number in _IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def load_wsgi(self) -> None:
        """Build the application."""
        super().load_wsgi()
        app: Any = self.wsgi
        self._drain = app.extensions["gru_serve_drain"]

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: begin to drain, and keep accepting connections meanwhile."""
        if self._drain is None:  # still loading
            super().handle_exit(sig, frame)
            return
        self._drain.begin()
        self._wake()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT or SIGQUIT: drain without time for open requests to finish."""
        if self._drain is None:
            super().handle_quit(sig, frame)
            return
        self._drain.begin(at_once=True)
        self._linger_s = 0.0
        self._wake()

    def _wake(self) -> None:
        if self._poller is not None:
            self._poller.wake()

    def run(self) -> None:
        """Serve until the drain is over, then close the application."""
        app: Any = self.wsgi
        limits = self.limits
        ClientSocket.send_timeout_s = limits.send_timeout_s
        ClientSocket.slow_clients = SlowClientLimit(limits.max_slow_readers)
        # Connections with a request that arrived before draining began and is not answered yet.
        self._busy: set[Connection] = set()
        self._linger_until = math.inf
        poller = self._poller = Poller(self.cfg, self.sockets, limits.connections, _body_check(app), self._serve)
        self._threads = Threads(partial(self._work, poller), limits.min_threads, limits.max_threads)
        while self.alive:
            self.notify()
            poller.run_once(_DRAIN_POLL_S if self._is_draining else _POLL_S)
            if self.ppid != os.getppid() and not self._is_draining:
                log.warning("the parent process has ended: draining")
                self.handle_exit(signal.SIGTERM, None)
            self._advance_drain(poller)
        poller.abort()
        self._threads.close(_JOIN_S)
        poller.close()
        # An engine thread that is inside a step while the process exits would abort it.
        app.extensions["gru_serve"].close()

    @property
    def _is_draining(self) -> bool:
        return self._drain is not None and self._drain.has_begun

    def _advance_drain(self, poller: Poller) -> None:
        drain = self._drain
        if drain is None or not drain.has_begun:
            return
        now = time.monotonic()
        if drain.should_interrupt(len(self._busy)):
            drain.interrupt(len(self._busy))
        if drain.is_interrupted and not self._busy and self._linger_until == math.inf:
            self._linger_until = now + self._linger_s
        is_empty = drain.is_interrupted and poller.num_connections == 0
        if drain.is_overdue or now >= self._linger_until or is_empty:
            self.alive = False

    def _serve(self, connection: Connection, request: Any) -> None:
        """Let a thread answer a request. The poller calls this."""
        if not self._is_draining:  # else it is refused or cheap, so the drain doesn't wait for it
            self._busy.add(connection)
        self._threads.submit((connection, request))

    def _work(self, poller: Poller, task: tuple[Connection, Any]) -> None:
        """Answer a request in a thread, and give its connection back to the poller."""
        connection, request = task
        can_be_reused = False
        try:
            can_be_reused = self._answer(connection, request)
        finally:
            self._busy.discard(connection)
            poller.finish(connection, can_be_reused)

    def _answer(self, connection: Connection, request: Any) -> bool:
        """Answer a request completely, streams included; return whether the connection can be used again."""
        response = None
        try:
            response, environ = wsgi.create(request, connection.sock, connection.client, connection.server, self.cfg)
            environ["wsgi.multithread"] = True
            if self._is_draining:
                response.force_close()
            app: Any = self.wsgi
            pieces = app(environ, response.start_response)
            try:
                for piece in pieces:
                    response.write(piece)
                response.close()
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
            return not response.should_close()
        except OSError as error:
            if error.errno not in _LEFT:
                log.error("Socket error processing request.", error=repr(error))
        except Exception as error:
            message = "internal error: the server's log has the details under this request's id"
            refusal = Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message)
            log.error(
                "Error handling request", error=type(error).__name__, exc_info=error, request_id=refusal.request_id
            )
            if response is None or not response.headers_sent:
                connection.send_if_possible(refusal_answer(refusal))
        return False


def _body_check(app: Any) -> Callable[[Any], bool]:
    """Return the function that decides whether to wait for a request's body: not for that of a stranger."""
    keys = app.extensions["gru_serve_keys"]

    def may_send_body(request: Any) -> bool:
        if keys is None:
            return True
        sent = [value for name, value in request.headers if name == "AUTHORIZATION"]
        kind, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        return kind.lower() == "bearer" and keys.owner_of(token.strip()) is not None

    return may_send_body


def worker_class(limits: WorkerLimits) -> type[Worker]:
    """Return the class for gunicorn's setting `worker_class`."""
    return type("Worker", (Worker,), {"limits": limits})

"""A gunicorn gthread worker with per-connection timeouts, and a graceful drain that a balancer can follow."""

from __future__ import annotations

import math
import signal
import time
from typing import Any
from weakref import WeakSet

from gunicorn.workers import gthread

from service.web.gate.drain import Drain
from service.web.gunicorn.connection import Connection, set_limits

_DRAIN_POLL_S = 0.05
_LINGER_S = 2.0  # how long idle connections stay open after the drain: a request may be on its way on one of them


class Worker(gthread.ThreadWorker):
    """gunicorn's threaded worker with two changes.

    In gunicorn's own worker, a client that sends half a header and stops, or doesn't read its answer, would hold a
    thread for ever, and a client that doesn't close its connection would stop the main loop. `Connection` limits both.

    At SIGTERM gunicorn's own worker stops accepting connections at once, so that a balancer's health checks and retried
    requests are refused before the balancer knows why. This worker accepts and answers them until the drain is over.
    """

    _drain: Drain | None = None  # None until the application is built

    def init_process(self) -> None:
        """Run the worker, after the fork: build the application, then accept connections until it ends."""
        # gunicorn has no setting for the class of a connection.
        gthread.TConn = Connection  # type: ignore[misc]
        self._connections: WeakSet[Connection] = WeakSet()  # every open connection
        # Connections with a request that arrived before draining began and is not answered yet.
        self._busy: set[Connection] = set()
        self._linger_s, self._linger_until = _LINGER_S, math.inf
        super().init_process()

    def init_signals(self) -> None:
        """Set gunicorn's handlers, and ignore the signals that the parent ignores: some are sent to a whole group."""
        super().init_signals()
        for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
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
        self.max_keepalived = 0  # makes gunicorn answer with `Connection: close`
        self.method_queue.defer(_do_nothing)  # wakes the main loop

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT or SIGQUIT: drain without time for open requests to finish."""
        if self._drain is None:
            super().handle_quit(sig, frame)
            return
        self._drain.begin(at_once=True)
        self._linger_s = 0.0
        self.handle_exit(sig, frame)

    def run(self) -> None:
        """Run the main loop until the drain is over, then close the application."""
        super().run()
        # An engine thread that is inside a step while the process exits would abort it.
        app: Any = self.wsgi
        app.extensions["gru_serve"].close()

    def wait_for_and_dispatch_events(self, timeout: float | None) -> None:
        """Run the main loop once: accept connections, and advance the drain if one has begun."""
        drain = self._drain
        if drain is None or not drain.has_begun or not self.alive:
            super().wait_for_and_dispatch_events(timeout)
            return
        super().wait_for_and_dispatch_events(_DRAIN_POLL_S)
        now = time.monotonic()
        if drain.should_interrupt(len(self._busy)):
            drain.interrupt(len(self._busy))
        if drain.is_interrupted and not self._busy and self._linger_until == math.inf:
            self._linger_until = now + self._linger_s
        if drain.is_overdue or now >= self._linger_until or (drain.is_interrupted and self.nr_conns == 0):
            self._end_loop()

    def _end_loop(self) -> None:
        """End the main loop, and wake the threads that still wait for a client by closing its connection."""
        for connection in list(self._connections):
            connection.abort()
        self.cfg.set("graceful_timeout", 0)  # gunicorn's own wait for open requests, which the drain has replaced
        self.alive = False

    def enqueue_req(self, conn: Any) -> None:
        """Hand a connection to the threads."""
        self._connections.add(conn)
        super().enqueue_req(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer one request completely, streams included."""
        drain = self._drain
        if drain is None or drain.has_begun:  # refused or cheap, so the drain doesn't wait for it
            return super().handle_request(req, conn)
        self._busy.add(conn)
        try:
            return super().handle_request(req, conn)
        finally:
            self._busy.discard(conn)

    def handle(self, conn: Any) -> Any:
        """Answer a request in a thread of the pool. Returns true if the connection stays open for another one."""
        keep = super().handle(conn)
        if not keep:
            # Closing waits up to 2 s for the client to close its side. gunicorn would do that in its main loop.
            conn.close(graceful=True)
        return keep


def _do_nothing() -> None:
    pass


def worker_with_deadlines(request_timeout_s: int, send_timeout_s: int, max_waiting_threads: int) -> type[Any]:
    """Return the class for gunicorn's setting `worker_class`. The arguments are those of `set_limits`."""
    set_limits(request_timeout_s, send_timeout_s, max_waiting_threads)
    return Worker

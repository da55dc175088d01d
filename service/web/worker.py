"""gunicorn's gthread worker with patience for nobody in particular, and a shutdown that a balancer can follow."""

from __future__ import annotations

import math
import time
from typing import Any
from weakref import WeakSet

from gunicorn.workers import gthread

from service.web.connection import Connection, set_limits
from service.web.drain import Drain

_DRAIN_POLL_S = 0.05
_LINGER_S = 2.0  # that connections are kept open when everything is over: a request may be on its way on one of them


class Worker(gthread.ThreadWorker):
    """Without it, a client that sends half a header and stops, or doesn't read its answer, would hold a thread for
    ever, one that doesn't close its connection would stop the loop that accepts others, and at SIGTERM nobody would be
    accepted any more: a balancer's checks and repeated requests would meet a closed door before it knows.
    """

    _drain: Drain | None = None  # there is none before the application is

    def init_process(self) -> None:
        """RunRegistry in the worker, before it accepts connections."""
        # gunicorn has no setting for the class of a connection.
        gthread.TConn = Connection  # type: ignore[misc]
        self._connections: WeakSet[Connection] = WeakSet()  # all that are open
        self._working: set[Connection] = set()  # those that are being answered, and were so when draining began
        self._linger_s, self._linger_until = _LINGER_S, math.inf
        super().init_process()

    def load_wsgi(self) -> None:
        """Build the application."""
        super().load_wsgi()
        app: Any = self.wsgi
        self._drain = app.extensions["gru_serve_drain"]

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: drain, and go on accepting connections meanwhile."""
        if self._drain is None:  # still loading
            super().handle_exit(sig, frame)
            return
        self._drain.begin()
        self.max_keepalived = 0  # by which gunicorn announces to close connections instead of keeping them
        self.method_queue.defer(_nothing)  # wakes the loop

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT, SIGQUIT: the same without waiting for anybody."""
        if self._drain is None:
            super().handle_quit(sig, frame)
            return
        self._drain.begin(at_once=True)
        self._linger_s = 0.0
        self.handle_exit(sig, frame)

    def run(self) -> None:
        """Accept connections until told to stop, and then answer who is there."""
        super().run()
        # An engine that is still in a step would abort the process as it ends.
        app: Any = self.wsgi
        app.extensions["gru_serve"].close()

    def wait_for_and_dispatch_events(self, timeout: float | None) -> None:
        """One round of the loop that accepts connections."""
        drain = self._drain
        if drain is None or not drain.has_begun or not self.alive:
            super().wait_for_and_dispatch_events(timeout)
            return
        super().wait_for_and_dispatch_events(_DRAIN_POLL_S)
        now = time.monotonic()
        if drain.should_interrupt(len(self._working)):
            drain.interrupt(len(self._working))
        if drain.is_interrupted and not self._working and self._linger_until == math.inf:
            # Who has a connection that is kept may be sending a request on it in this moment.
            self._linger_until = now + self._linger_s
        if drain.is_overdue or now >= self._linger_until or (drain.is_interrupted and self.nr_conns == 0):
            self._leave()

    def _leave(self) -> None:
        """Let the loop end. Who still waits for a client, or for a request of one, is woken by its connection's end."""
        for connection in list(self._connections):
            connection.shut()
        self.cfg.set("graceful_timeout", 0)  # gunicorn's own time to wait: everybody had his
        self.alive = False

    def enqueue_req(self, conn: Any) -> None:
        """Hand a connection to the threads."""
        self._connections.add(conn)
        super().enqueue_req(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer one request, to its end."""
        drain = self._drain
        if drain is None or drain.has_begun:  # it is refused, or costs nothing: nobody waits for it
            return super().handle_request(req, conn)
        self._working.add(conn)
        try:
            return super().handle_request(req, conn)
        finally:
            self._working.discard(conn)

    def handle(self, conn: Any) -> Any:
        """Answer a request, in a thread of the pool; true: the connection is to be kept."""
        keep = super().handle(conn)
        if not keep:
            # Here, because it waits up to 2 s for the client to close its side. gunicorn would do it in its main loop.
            conn.close(graceful=True)
        return keep


def _nothing() -> None:
    pass


def worker_with_deadlines(request_timeout_s: int, send_timeout_s: int, num_waiting: int) -> type[Any]:
    """The worker class for gunicorn's `worker_class`. num_waiting: threads that may wait for slow clients."""
    set_limits(request_timeout_s, send_timeout_s, num_waiting)
    return Worker

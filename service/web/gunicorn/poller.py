"""The poller: one thread that owns every connection which no other thread is answering.

It accepts connections, reads requests with deadlines, and waits for clients to close their side, all without blocking.
So a client that sends slowly or nothing costs a descriptor and a little memory, and never a thread. All that these
clients may take together is limited. At a limit, the address that takes most loses its oldest connections.
"""

from __future__ import annotations

import errno
import math
import queue
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog

from service.web.gate.guard import SMALL_BODY_BYTES
from service.web.gunicorn.connection import Connection, Phase, refusal_answer
from service.web.gunicorn.request_reader import Refusal, RequestReader

log = structlog.get_logger(__name__)

_HEAD_S = 10.0  # for the first byte of a connection, and for a head from its first byte
_KEEPALIVE_S = 75.0  # longer than balancers keep idle connections, so that they and not this server close them
_LINGER_S = 2.0  # how long a client may take to close its side after the last answer, without sending anything
_LINGER_BYTES = 32 * 1024 * 1024
_SCAN_S = 0.25  # between two searches for connections whose time is over
_PAUSE_S = 0.25  # without accepting, after the system has refused to
_LOG_INTERVAL_S = 60.0
_ACCEPTS = 64  # connections accepted in a row, before those that are open get their turn
_EVICTED_SHARE = 16  # at a limit, one sixteenth of an address's share is freed at once: choosing costs time
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class ConnectionLimits:
    """What clients may take together."""

    max_connections: int
    max_body_bytes: int  # of one request; a longer body is not waited for
    request_timeout_s: float  # for a whole request, from its first byte
    max_large_bytes: int  # of requests with more than SMALL_BODY_BYTES, from their first byte until they are answered
    max_small_bytes: int = 16 * 2**20  # of smaller requests that have not arrived completely


class Poller:
    """Accepts connections and reads requests. All methods but `finish` are for the thread that calls `run_once`."""

    def __init__(
        self,
        cfg: Any,
        listeners: Iterable[Any],
        limits: ConnectionLimits,
        may_send_body: Callable[[Any], bool],
        serve: Callable[[Connection, Any], None],
    ) -> None:
        """Begin to listen.

        Args:
            cfg: gunicorn's configuration.
            listeners: gunicorn's listening sockets.
            limits: What clients may take together.
            may_send_body: Whether to wait for the body of a request, of which the head has arrived.
            serve: Gets each request that has arrived. It must not block, and `finish` has to follow from any thread.
        """
        self._cfg, self._limits = cfg, limits
        self._listeners = {listener: listener.getsockname() for listener in listeners}
        self._may_send_body, self._serve = may_send_body, serve
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._num_small = self._num_large = 0  # bytes in the two budgets of ConnectionLimits
        self._finished: queue.SimpleQueue[tuple[Connection, bool]] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._take_finished)
        self._is_accepting = False
        self._paused_until = 0.0
        self._next_scan = 0.0
        self._logged_at: dict[str, float] = {}  # when each event was last logged

    @property
    def num_connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    def finish(self, connection: Connection, can_be_reused: bool) -> None:
        """Give a connection back after its request was answered. Any thread may call this."""
        self._finished.put((connection, can_be_reused))
        self.wake()

    def wake(self) -> None:
        """End a running `run_once`. Any thread or signal handler may call this."""
        with suppress(OSError):  # the buffer is full, so the thread is about to wake
            self._waker.send(b"\0")

    def run_once(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for something to happen, and handle it."""
        self._accept_if_possible()
        if not self._is_accepting:
            timeout_s = min(timeout_s, _PAUSE_S)
        for key, _ in self._selector.select(timeout_s):
            key.data(key.fileobj)
        now = time.monotonic()
        if now >= self._next_scan:
            self._next_scan = now + _SCAN_S
            for connection in [one for one in self._connections if one.deadline <= now]:
                self._guarded(self._time_out, connection)

    def abort(self) -> None:
        """Close all connections. Threads that still answer find them closed."""
        for connection in list(self._connections):
            if connection.phase is Phase.SERVING:
                connection.abort()
            else:
                self._drop(connection)

    def close(self) -> None:
        """Close the listeners and the poller's own descriptors."""
        self._selector.close()
        for end in (self._waker, self._woken):
            end.close()
        for listener in self._listeners:
            listener.close()

    # Accepting

    def _accept_if_possible(self) -> None:
        can_accept = time.monotonic() >= self._paused_until and (
            len(self._connections) < self._limits.max_connections
            or any(one.phase is not Phase.SERVING for one in self._connections)
        )
        if can_accept == self._is_accepting:
            return
        self._is_accepting = can_accept
        for listener in self._listeners:
            if can_accept:
                self._selector.register(listener, selectors.EVENT_READ, self._accept)
            else:
                self._selector.unregister(listener)

    def _accept(self, listener: Any) -> None:
        for _ in range(_ACCEPTS):
            if len(self._connections) >= self._limits.max_connections:
                if not self._evict(lambda _: 1):
                    return  # a thread is answering each of them
                self._complain("connections closed: there are as many as allowed", num=len(self._connections))
            try:
                sock, client = listener.accept()
                reader = RequestReader(self._cfg, client, self._limits.max_body_bytes, self._may_send_body)
                connection = Connection(sock, client, self._listeners[listener], reader)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_RESOURCES:
                    continue  # the client has left already
                # A listener that stays readable would keep this thread busy.
                self._paused_until = time.monotonic() + _PAUSE_S
                self._evict(lambda _: 1)
                self._complain(
                    "no connection accepted: the system has no descriptor or memory left",
                    error=errno.errorcode.get(error.errno or 0, ""),
                    num=len(self._connections),
                    advice="raise the limit of open files (RLIMIT_NOFILE)",
                )
                return
            connection.waiting_since = time.monotonic()
            connection.deadline = connection.waiting_since + min(_HEAD_S, self._limits.request_timeout_s)
            self._connections.add(connection)
            self._guarded(self._read, connection)

    def _complain(self, event: str, **fields: object) -> None:
        """Log what strangers may cause at any rate, once a minute at most."""
        now = time.monotonic()
        if now - self._logged_at.get(event, -math.inf) >= _LOG_INTERVAL_S:
            self._logged_at[event] = now
            log.warning(event, **fields)

    def _evict(self, weight_of: Callable[[Connection], int]) -> bool:
        """Close the oldest connections of the address that takes most; return whether there was one.

        Connections that a thread is answering are spared. `weight_of` says how much a connection takes.
        """
        candidates = [one for one in self._connections if one.phase is not Phase.SERVING and weight_of(one)]
        if not candidates:
            return False
        totals: Counter[str | bytes] = Counter()
        for one in candidates:
            totals[one.network] += weight_of(one)
        network, total = totals.most_common(1)[0]
        to_free = max(1, total // _EVICTED_SHARE)
        for one in sorted(candidates, key=lambda one: one.waiting_since):
            if one.network == network and to_free > 0:
                to_free -= weight_of(one)
                if one.phase is Phase.READING and one.reader.has_begun:
                    one.send_if_possible(refusal_answer(_overloaded()))
                self._drop(one)
        return True

    # Reading

    def _guarded(self, step: Callable[[Connection], None], connection: Connection) -> None:
        """Take a step with a connection. Whatever goes wrong costs this connection alone."""
        try:
            step(connection)
        except OSError:
            self._drop(connection)  # the client has left
        except Exception as error:
            log.error("a connection failed", error=type(error).__name__, exc_info=error)
            self._drop(connection)

    def _on_readable(self, connection: Connection) -> None:
        if connection.is_registered:  # an event of the same round may have dropped it
            self._guarded(self._read, connection)

    def _read(self, connection: Connection) -> None:
        is_open = connection.receive()
        if connection.phase is Phase.LINGERING:
            if is_open and connection.num_lingered < _LINGER_BYTES:
                # A client that still sends reads the answer afterwards.
                longest = connection.waiting_since + self._limits.request_timeout_s
                connection.deadline = min(time.monotonic() + _LINGER_S, longest)
                self._watch(connection)
            else:
                self._drop(connection)
        else:
            self._advance(connection, is_open)

    def _advance(self, connection: Connection, is_open: bool) -> None:
        """Serve the next request of a connection if it has arrived; else wait for more. `is_open`: more may arrive."""
        reader = connection.reader
        try:
            request = reader.next_request(connection.send_if_possible)
        except Refusal as refusal:
            if reader.is_skipping:
                self._drop(connection)  # its request has been answered
            else:
                self._refuse(connection, refusal)
            return
        if request is not None:
            self._unwatch(connection)
            connection.phase, connection.deadline = Phase.SERVING, math.inf
            self._count(connection)
            if self._make_room() or not connection.num_large:
                self._serve(connection, request)
            else:
                self._refuse(connection, _overloaded())
        elif not is_open:
            if reader.has_begun:
                self._refuse(connection, _incomplete("the client ended its side before the request was complete"))
            else:
                self._drop(connection)
        else:
            if reader.has_begun:
                if connection.began_at is None:
                    connection.began_at = time.monotonic()
                limit_s = self._limits.request_timeout_s
                connection.deadline = connection.began_at + (limit_s if reader.has_head else min(_HEAD_S, limit_s))
            self._watch(connection)
            self._count(connection)
            self._make_room()

    def _make_room(self) -> bool:
        """Evict connections until their bytes are within the limits.

        Return False if that was not enough, because large requests that are being answered take the rest.
        """
        while self._num_small > self._limits.max_small_bytes and self._evict(lambda one: one.num_small):
            pass
        while self._num_large > self._limits.max_large_bytes:
            if not self._evict(lambda one: one.num_large):
                return False
        return True

    def _time_out(self, connection: Connection) -> None:
        if connection.phase is Phase.READING and connection.reader.has_begun:
            self._refuse(connection, _incomplete("the request did not arrive completely in time: send it again"))
        else:
            self._drop(connection)

    def _take_finished(self, _: Any) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        while True:
            try:
                connection, can_be_reused = self._finished.get_nowait()
            except queue.Empty:
                return
            self._guarded(self._reuse if can_be_reused else self._linger, connection)

    def _reuse(self, connection: Connection) -> None:
        """Wait for the next request on a connection, which may have arrived already."""
        now = time.monotonic()
        connection.phase, connection.waiting_since, connection.began_at = Phase.READING, now, None
        is_skipping = connection.reader.is_skipping
        connection.deadline = now + (self._limits.request_timeout_s if is_skipping else _KEEPALIVE_S)
        self._advance(connection, is_open=True)

    # Ending

    def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        (log.info if refusal.status is HTTPStatus.REQUEST_TIMEOUT else log.warning)(
            "request refused",
            status=refusal.status.value,
            code=refusal.code,
            cause=refusal.cause,
            request_id=refusal.request_id,
        )
        connection.send_if_possible(refusal_answer(refusal))
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        """Close a connection once its client has read the answer and closed its side, or after a short time.

        Closing it at once, while the client still sends, would reset it, and the client might lose the answer.
        """
        connection.sock.shutdown(socket.SHUT_WR)
        connection.phase, connection.waiting_since = Phase.LINGERING, time.monotonic()
        self._count(connection)
        self._read(connection)

    def _drop(self, connection: Connection) -> None:
        self._unwatch(connection)
        self._connections.discard(connection)
        self._set_counts(connection, 0, 0)
        connection.close()

    # Bookkeeping

    def _count(self, connection: Connection) -> None:
        """Bring the counts of bytes up to date."""
        num_bytes = connection.reader.num_bytes if connection.phase is not Phase.LINGERING else 0
        if num_bytes > SMALL_BODY_BYTES:
            self._set_counts(connection, 0, num_bytes)
        else:
            self._set_counts(connection, num_bytes if connection.phase is Phase.READING else 0, 0)

    def _set_counts(self, connection: Connection, num_small: int, num_large: int) -> None:
        self._num_small += num_small - connection.num_small
        self._num_large += num_large - connection.num_large
        connection.num_small, connection.num_large = num_small, num_large

    def _watch(self, connection: Connection) -> None:
        if not connection.is_registered:
            self._selector.register(connection, selectors.EVENT_READ, self._on_readable)
            connection.is_registered = True

    def _unwatch(self, connection: Connection) -> None:
        if connection.is_registered:
            self._selector.unregister(connection)
            connection.is_registered = False


def _overloaded() -> Refusal:
    message = "the server holds as many begun requests as it can: try again in a second"
    return Refusal(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", message)


def _incomplete(cause: str) -> Refusal:
    message = "the request was incomplete or did not arrive in time: send it again"
    return Refusal(HTTPStatus.REQUEST_TIMEOUT, "incomplete_body", message, cause)

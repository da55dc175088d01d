"""Server-sent events: their framing, pings during silence, and the check whether the client is still connected."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from enum import Enum, auto

from flask import has_request_context, request

from service.web.api.events import (
    DoneEvent,
    ErrorEvent,
    Event,
    Events,
    PingEvent,
    ReconnectEvent,
    TextEvent,
    UsageEvent,
)
from service.web.api.responses import HoldingResponse
from service.web.gate.reconnects import RECONNECT_MS, accepts_events

FLUSH_INTERVAL_S = 0.025  # characters generated within it are sent in one event
IDLE_S = 0.5  # how often a stream without new text checks whether its client is still connected
PING_S = 10.0  # after this much silence a comment is sent, so that balancers don't close the connection
_IS_STREAM = "gru_serve.is_stream"  # in the environ of a request whose answer is a stream


class EventStream(HoldingResponse):
    """A response that sends events as soon as they are yielded."""

    events: Events  # what is sent; a later step, such as the metrics, may wrap it

    def __init__(self, events: Events, held: ExitStack, *, named: bool) -> None:
        """Take over what `held` holds.

        Args:
            events: None stands for nothing to send, which is the chance to send a ping.
            held: Closed after the last event, even if none was read. The caller's own `with` then releases nothing.
            named: Whether each event says what it is. OpenAI's clients expect that of errors only.
        """
        super().__init__(iter(()), held, "text/event-stream")
        self.events, self._named = events, named
        self._connection: socket.socket | None = None
        self._for_browsers = False
        if has_request_context():
            self._for_browsers = named and accepts_events()
            request.environ[_IS_STREAM] = True
            self._connection = request.environ.get("gunicorn.socket")
        self.headers["Cache-Control"] = "no-cache, no-transform"  # a proxy that compresses would hold events back
        self.headers["X-Accel-Buffering"] = "no"  # otherwise nginx would buffer the events

    def iter_encoded(self) -> Iterator[bytes]:
        """Yield the framed events, and pings during silence."""
        start = f"retry: {RECONNECT_MS}\n".encode() if self._named else b""
        for event in with_pings(self.events, self._connection):
            framed = frame(event, named=self._named, for_browsers=self._for_browsers)
            if start and not isinstance(event, PingEvent):
                # Not as a block of its own: clients that are no browsers would take that for an event without data.
                framed, start = start + framed, b""
            yield framed

    def close(self) -> None:
        """End the stream, and release what it holds. Repeating it does nothing."""
        try:
            self.events.close()
        finally:
            super().close()


def frame(event: Event, *, named: bool, for_browsers: bool = False) -> bytes:
    """Frame an event. Errors have a name in every stream, other events if `named`.

    With `for_browsers`, an error is sent as `failure` first: EventSource has an event `error` of its own, which says
    that the connection is lost.
    """
    position: int | None = None
    match event:
        case TextEvent(data, position):
            name = "text"
        case UsageEvent(data):
            name = "usage"
        case DoneEvent(data, position):
            name = "done"
        case ReconnectEvent(position):
            name, data = "reconnect", json.dumps({"position": position})
        case ErrorEvent(body):
            name, data = "error", json.dumps(body)
            if for_browsers:
                return f"event: failure\ndata: {data}\n\nevent: error\ndata: {data}\n\n".encode()
        case PingEvent():
            return b": ping\n\n"
    number = f"id: {position}\n" if position is not None else ""
    kind = f"event: {name}\n" if named or name == "error" else ""
    return f"{number}{kind}data: {data}\n\n".encode()


def with_pings(events: Iterable[Event | None], connection: socket.socket | None = None) -> Iterator[Event]:
    """Yield the events, and a ping after each `PING_S` of silence.

    At each silence of a client that has ended its side of the connection, a ping asks whether it still reads.
    """
    last_sent = time.monotonic()
    for event in events:
        if event is not None:
            yield event
        elif time.monotonic() - last_sent < PING_S and (
            connection is None or _state_of(connection) is not _State.HALF_CLOSED
        ):
            continue
        else:
            yield PingEvent()
        last_sent = time.monotonic()


def client_monitor() -> Callable[[], bool]:
    """Return a function that tells whether the client of the current request has left.

    The function works after the request context has ended, too. Without gunicorn it always returns False.

    A client that has ended its side of the connection may still wait for the answer (a half-closed connection), or may
    have closed the whole connection: TCP announces both in the same way. They differ when something is sent: a closed
    connection answers with a reset. A stream that is silent sends a ping then (`with_pings`). Before a whole
    answer the function sends `100 Continue`, which every client of HTTP/1.1 skips, at intervals that double. A client
    of HTTP/1.0 would not skip it, so it gets its answer in any case.

    Other threads that call the function need what the request holds, such as its session. For them a client that has
    ended its side has left.
    """
    environ, thread = request.environ, threading.get_ident()
    connection = environ.get("gunicorn.socket")
    can_ask = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
    interval_s, next_at = IDLE_S, 0.0

    def has_left() -> bool:
        nonlocal interval_s, next_at
        if connection is None:
            return False
        state = _state_of(connection)
        if state is not _State.HALF_CLOSED:
            return state is _State.CLOSED
        if threading.get_ident() != thread:
            return True
        if not can_ask or _IS_STREAM in environ or time.monotonic() < next_at:
            return False
        next_at, interval_s = time.monotonic() + interval_s, 2 * interval_s
        with suppress(OSError):
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        return _state_of(connection) is _State.CLOSED

    return has_left


class _State(Enum):
    OPEN = auto()
    HALF_CLOSED = auto()  # the client sends nothing more, and may still read
    CLOSED = auto()


def _state_of(connection: socket.socket) -> _State:
    try:
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        events = sum(event for _, event in poll.poll(0))
    except (OSError, ValueError):
        return _State.CLOSED
    if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
        return _State.CLOSED
    return _State.HALF_CLOSED if events else _State.OPEN

"""Server-sent events: their framing, pings during silence, and the check whether the client is still connected."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum, auto

from flask import Response, request

FLUSH_INTERVAL_S = 0.025  # characters generated within it are sent in one event
IDLE_S = 0.5  # how often a stream without new text checks whether its client is still connected
PING_S = 10.0  # after this much silence a comment is sent, so that balancers don't close the connection
_PING = b": ping\n\n"
_IS_STREAM = "gru_serve.is_stream"  # in the environ of a request whose answer is a stream


def event(data: str, kind: str | None = None, position: int | None = None) -> bytes:
    """Frame an event.

    Args:
        data: One line without line breaks, such as a JSON document.
        kind: The event's type. None omits it, which browsers read as `message`.
        position: The event's id. None omits it.
    """
    name = f"event: {kind}\n" if kind is not None else ""
    number = f"id: {position}\n" if position is not None else ""
    return f"{number}{name}data: {data}\n\n".encode()


def stream_response(events: Iterator[bytes | None], on_close: Callable[[], None]) -> Response:
    """Return a response that sends events as soon as they are yielded.

    Args:
        events: The framed events. It yields None when there is nothing to send, which is the chance to send a ping.
        on_close: Called once when the stream ends, for whatever reason, even if no event was read.
    """
    request.environ[_IS_STREAM] = True
    response = Response(_with_pings(events, request.environ.get("gunicorn.socket")), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # otherwise nginx would buffer the events
    response.call_on_close(on_close)
    return response


def client_monitor() -> Callable[[], bool]:
    """Return a function that tells whether the client of the current request has left.

    The function works after the request context has ended, too. Without gunicorn it always returns False.

    A client that has ended its side of the connection may still wait for the answer (a half-closed connection), or may
    have closed the whole connection: TCP announces both in the same way. They differ when something is sent: a closed
    connection answers with a reset. A stream that is silent sends a ping then (`stream_response`). Before a whole
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


def _with_pings(events: Iterator[bytes | None], connection: socket.socket | None = None) -> Iterator[bytes]:
    last_sent = time.monotonic()
    for data in events:
        if data is not None:
            yield data
        elif time.monotonic() - last_sent < PING_S and (
            connection is None or _state_of(connection) is not _State.HALF_CLOSED
        ):
            continue
        else:
            yield _PING
        last_sent = time.monotonic()

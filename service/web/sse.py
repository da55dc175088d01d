"""Server-Sent Events: framing, pings while nothing is said, and whether anybody still listens."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from flask import Response, request

FLUSH_INTERVAL_S = 0.025  # characters of a stream that come within it travel together
IDLE_S = 0.5  # how often a silent client is looked after
PING_S = 10.0  # a comment after so much silence keeps balancers from closing the connection
_PING = b": ping\n\n"


def event(data: str, kind: str | None = None, position: int | None = None) -> bytes:
    """One event. data: a line, as JSON is. position: its id."""
    name = f"event: {kind}\n" if kind is not None else ""
    number = f"id: {position}\n" if position is not None else ""
    return f"{number}{name}data: {data}\n\n".encode()


def stream_response(events: Iterator[bytes | None], on_close: Callable[[], None]) -> Response:
    """A response that sends events as they come. None among them is a moment of silence.

    on_close is called once the stream is over, however it ends, even if it never began.
    """
    response = Response(_with_pings(events), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would collect events otherwise
    response.call_on_close(on_close)
    return response


def client_watch() -> Callable[[], bool]:
    """Tells whether the client of the current request has closed its connection. Usable after the request context."""
    connection = request.environ.get("gunicorn.socket")

    def has_left() -> bool:
        if connection is None:
            return False
        with suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            # Readable, and yet there is nothing to read: it was closed. What else lies there is the next request.
            return bool(poll.poll(0)) and connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        return True

    return has_left


def _with_pings(events: Iterator[bytes | None]) -> Iterator[bytes]:
    spoken = time.monotonic()
    for data in events:
        if data is not None:
            yield data
        elif time.monotonic() - spoken < PING_S:
            continue
        else:
            yield _PING
        spoken = time.monotonic()

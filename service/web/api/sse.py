"""Server-sent events: their framing, pings during silence, and the check whether the client is still connected."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from flask import Response, request

FLUSH_INTERVAL_S = 0.025  # characters generated within it are sent in one event
IDLE_S = 0.5  # how often a stream without new text checks whether its client is still connected
PING_S = 10.0  # after this much silence a comment is sent, so that balancers don't close the connection
_PING = b": ping\n\n"


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
    response = Response(_with_pings(events), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache, no-transform"  # a proxy that compresses would hold events back
    response.headers["X-Accel-Buffering"] = "no"  # otherwise nginx would buffer the events
    response.call_on_close(on_close)
    return response


def client_monitor() -> Callable[[], bool]:
    """Return a function that tells whether the client of the current request has closed its connection.

    The function works after the request context has ended, too. Without gunicorn it always returns False.
    """
    connection = request.environ.get("gunicorn.socket")

    def has_left() -> bool:
        if connection is None:
            return False
        with suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            # A closed connection is readable but has no bytes. Bytes would be the client's next request.
            return bool(poll.poll(0)) and connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        return True

    return has_left


def _with_pings(events: Iterator[bytes | None]) -> Iterator[bytes]:
    last_sent = time.monotonic()
    for data in events:
        if data is not None:
            yield data
        elif time.monotonic() - last_sent < PING_S:
            continue
        else:
            yield _PING
        last_sent = time.monotonic()

"""Server-sent events: their framing, pings during silence, and the check whether the client is still connected."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress

from flask import request

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

FLUSH_INTERVAL_S = 0.025  # characters generated within it are sent in one event
IDLE_S = 0.5  # how often a stream without new text checks whether its client is still connected
PING_S = 10.0  # after this much silence a comment is sent, so that balancers don't close the connection


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
        self.headers["Cache-Control"] = "no-cache, no-transform"  # a proxy that compresses would hold events back
        self.headers["X-Accel-Buffering"] = "no"  # otherwise nginx would buffer the events

    def iter_encoded(self) -> Iterator[bytes]:
        """Yield the framed events, and pings during silence."""
        return (frame(event, named=self._named) for event in with_pings(self.events))

    def close(self) -> None:
        """End the stream, and release what it holds. Repeating it does nothing."""
        try:
            self.events.close()
        finally:
            super().close()


def frame(event: Event, *, named: bool) -> bytes:
    """Frame an event. Errors have a name in every stream, other events if `named`."""
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
        case PingEvent():
            return b": ping\n\n"
    number = f"id: {position}\n" if position is not None else ""
    kind = f"event: {name}\n" if named or name == "error" else ""
    return f"{number}{kind}data: {data}\n\n".encode()


def with_pings(events: Iterable[Event | None]) -> Iterator[Event]:
    """Yield the events, and a ping after each `PING_S` of silence."""
    last_sent = time.monotonic()
    for event in events:
        if event is not None:
            yield event
        elif time.monotonic() - last_sent < PING_S:
            continue
        else:
            yield PingEvent()
        last_sent = time.monotonic()


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

"""The events of a stream, as values. Answers yield them, the metrics time them, and `sse` frames them last."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextEvent:
    """A part of the text."""

    data: str  # JSON, in one line
    position: int | None = None  # of the session after the text


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """The number of characters, after the text."""

    data: str  # JSON, in one line


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The stream is complete. The last event."""

    data: str  # one line
    position: int | None = None  # of the session after the run


@dataclass(frozen=True, slots=True)
class ReconnectEvent:
    """The process drains: the client has to resume after this position, on another server. The last event."""

    position: int


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The stream is not complete. The last event."""

    body: Mapping[str, object]  # as in the answer of a request that fails


@dataclass(frozen=True, slots=True)
class PingEvent:
    """Nothing was sent for a while."""


Event = TextEvent | UsageEvent | DoneEvent | ReconnectEvent | ErrorEvent | PingEvent
Events = Generator[Event | None, None, None]  # None: nothing to send for a moment

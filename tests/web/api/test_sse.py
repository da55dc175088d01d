"""Server-sent events: their framing, the pings during silence, and what a stream releases when it ends."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from contextlib import ExitStack

import pytest

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
from service.web.api.sse import EventStream, frame, with_pings
from service.web.gate.admission import AdmissionLimit


def generated(events: Iterable[Event | None]) -> Events:
    yield from events


def test_frame__names_only_errors_unless_all_are_named() -> None:
    text = TextEvent('{"text": "é"}', 7)
    assert frame(text, named=True) == 'id: 7\nevent: text\ndata: {"text": "é"}\n\n'.encode()
    assert frame(TextEvent("{}"), named=False) == b"data: {}\n\n"
    assert frame(UsageEvent("{}"), named=False) == b"data: {}\n\n"
    assert frame(DoneEvent("[DONE]"), named=False) == b"data: [DONE]\n\n"
    assert frame(DoneEvent("{}", 9), named=True) == b"id: 9\nevent: done\ndata: {}\n\n"
    assert frame(ReconnectEvent(8), named=True) == b'id: 8\nevent: reconnect\ndata: {"position": 8}\n\n'
    for named in (False, True):
        assert frame(ErrorEvent({"error": {}}), named=named) == b'event: error\ndata: {"error": {}}\n\n'
        assert frame(PingEvent(), named=named) == b": ping\n\n"
    twice = b'event: failure\ndata: {"error": {}}\n\nevent: error\ndata: {"error": {}}\n\n'
    assert frame(ErrorEvent({"error": {}}), named=True, for_browsers=True) == twice


def test_stream__sends_pings_during_long_silence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 11.0, 12.0, 15.0, 23.0, 23.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    # The clock is read when the stream begins (0), at each silence (5, 11, 15, 23) and after each ping (12, 23.5).
    assert list(with_pings([None, None, None, None])) == [PingEvent()] * 2
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    first, second = TextEvent("a"), TextEvent("b")
    assert list(with_pings([first, None, second])) == [first, second]


class Held:
    """What a stream owns in these tests: a place, and something whose releases are counted."""

    def __init__(self) -> None:
        self.admission, self.num_released = AdmissionLimit(1), 0

    def stream(self, events: Events) -> EventStream:
        with ExitStack() as held:
            held.enter_context(self.admission.admit(is_stream=True))
            held.callback(self._release)
            return EventStream(events, held, named=False)

    def _release(self) -> None:
        self.num_released += 1


def test_event_stream__releases_once_however_it_ends() -> None:
    def failing() -> Events:
        try:
            yield TextEvent("a")
        finally:
            raise OSError("while the stream is closed")

    held = Held()
    unread = held.stream(generated([TextEvent("a")]))
    assert (held.admission.num_streams, held.num_released) == (1, 0)
    unread.close()
    unread.close()
    assert (held.admission.num_streams, held.num_released) == (0, 1)
    whole = held.stream(generated([TextEvent("a"), None]))
    assert list(whole.iter_encoded()) == [b"data: a\n\n"]
    whole.close()
    begun = held.stream(generated([TextEvent("a"), TextEvent("b")]))
    next(begun.iter_encoded())
    begun.close()
    assert held.num_released == 3
    broken = held.stream(failing())
    next(broken.iter_encoded())
    with pytest.raises(OSError, match="while the stream is closed"):
        broken.close()
    assert (held.admission.num_streams, held.num_released) == (0, 4)


def test_event_stream__that_a_later_step_drops_is_released() -> None:
    """Nobody closes an answer that was replaced because code after the view failed."""
    held = Held()
    dropped = held.stream(generated([TextEvent("a")]))
    assert (held.admission.num_streams, held.num_released) == (1, 0)
    del dropped
    gc.collect()
    assert (held.admission.num_streams, held.num_released) == (0, 1)


def test_event_stream__that_could_not_begin_holds_nothing() -> None:
    """What raises between the admission and the stream releases at once."""
    admission = AdmissionLimit(1)

    def begin() -> None:
        with ExitStack() as held:
            held.enter_context(admission.admit(is_stream=True))
            raise OSError("no run")

    with pytest.raises(OSError, match="no run"):
        begin()
    assert admission.num_streams == 0

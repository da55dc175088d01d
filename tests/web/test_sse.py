"""Server-sent events: their framing, and the pings during silence."""

from __future__ import annotations

import time

import pytest

from service.web.api.sse import _with_pings, event


def test_event__is_framed_with_its_kind_and_data() -> None:
    assert event('{"a": "é"}') == 'data: {"a": "é"}\n\n'.encode()
    assert event("{}", "error") == b"event: error\ndata: {}\n\n"


def test_stream__sends_pings_during_long_silence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 11.0, 12.0, 15.0, 23.0, 23.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    # The clock is read when the stream begins (0), at each silence (5, 11, 15, 23) and after each ping (12, 23.5).
    assert list(_with_pings(iter([None, None, None, None]))) == [b": ping\n\n"] * 2
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert list(_with_pings(iter([b"a", None, b"b"]))) == [b"a", b"b"]

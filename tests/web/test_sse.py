"""Server-sent events: their framing, and a comment where there is silence."""

from __future__ import annotations

import time

import pytest

from service.web.sse import _with_pings, event


def test_an_event_is_a_line_of_data_and_an_empty_one() -> None:
    assert event('{"a": "é"}') == 'data: {"a": "é"}\n\n'.encode()
    assert event("{}", "error") == b"event: error\ndata: {}\n\n"


def test_long_silence_is_filled_with_comments_and_short_silence_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 11.0, 12.0, 15.0, 23.0, 23.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    #                       at 5  at 11 (and spoken at 12)  at 15  at 23 (and spoken at 23.5)
    assert list(_with_pings(iter([None, None, None, None]))) == [b": ping\n\n"] * 2
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert list(_with_pings(iter([b"a", None, b"b"]))) == [b"a", b"b"]

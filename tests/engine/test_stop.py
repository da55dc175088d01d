"""Stop strings: against the obvious model, and never a character too many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.stop import StopFilter

TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def obvious(text: str, stops: list[str]) -> tuple[str, bool]:
    """What may be seen of a text, by looking at all of it."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@given(TEXTS, STOPS)
def test_what_is_shown_is_what_comes_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    expected, stopped = obvious(text, stops)
    stop_filter, shown = StopFilter(stops), ""
    for char in text:
        shown += stop_filter.feed(char)
        assert expected.startswith(shown)
    shown += stop_filter.flush()
    assert (shown, stop_filter.stopped) == (expected, stopped)


def test_stop_strings_are_compared_as_models_write_them() -> None:
    stop_filter = StopFilter(["e\u0301"])
    assert "".join(stop_filter.feed(char) for char in "caf\u00e9!") == "caf"
    assert stop_filter.stopped


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    stop_filter, shown = StopFilter(stops), ""
    for read, char in enumerate(text, start=1):
        shown += stop_filter.feed(char)
        if stop_filter.stopped:
            return
        held = text[len(shown) : read]
        assert not held or any(stop.startswith(held) for stop in stops)

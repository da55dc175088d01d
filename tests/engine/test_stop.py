"""Stop strings: against the obvious model, and never a character too many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.stop import StopFilter

TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=10)


def obvious(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """What is generated up to the first stop string, what may be seen of it, and whether there is one."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[:end], text[: end - max(map(len, matching))], True
    return text, text, False


@given(TEXTS, STOPS, CUTS)
def test_what_is_shown_is_what_comes_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    generated, expected, stopped = obvious(text, stops)
    stop_filter, shown, start = StopFilter(stops), "", 0
    while start < len(generated):
        size = cuts[start % len(cuts)]
        shown += stop_filter.feed(generated[start : start + size])
        start += size
        assert expected.startswith(shown)
    assert shown + stop_filter.end(stopped) == expected


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    generated, _, stopped = obvious(text, stops)
    stop_filter, shown = StopFilter(stops), ""
    for read, char in enumerate(generated, start=1):
        shown += stop_filter.feed(char)
        held = generated[len(shown) : read]
        assert not held or any(stop.startswith(held) for stop in stops) or (stopped and read == len(generated))


def test_stop_strings_are_compared_as_models_write_them() -> None:
    stop_filter = StopFilter(["e\u0301"])
    assert stop_filter.feed("caf\u00e9") + stop_filter.end(stopped=True) == "caf"

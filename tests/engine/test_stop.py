"""Stop strings, compared with a simple model that sees the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.stop import StopFilter

TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=10)


def simple_model(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """The text up to its first stop string, the part of it that may be shown, and whether it has a stop string."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[:end], text[: end - max(map(len, matching))], True
    return text, text, False


@given(TEXTS, STOPS, CUTS)
def test_stop_filter__shows_the_text_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    generated, expected, stopped = simple_model(text, stops)
    stop_filter, shown, start = StopFilter(stops), "", 0
    while start < len(generated):
        size = cuts[start % len(cuts)]
        shown += stop_filter.feed(generated[start : start + size])
        start += size
        assert expected.startswith(shown)
    assert shown + stop_filter.end(stopped) == expected


@given(TEXTS, STOPS)
def test_stop_filter__withholds_only_possible_beginnings_of_stop_strings(text: str, stops: list[str]) -> None:
    generated, _, stopped = simple_model(text, stops)
    stop_filter, shown = StopFilter(stops), ""
    for read, char in enumerate(generated, start=1):
        shown += stop_filter.feed(char)
        withheld = generated[len(shown) : read]
        is_end = stopped and read == len(generated)
        assert not withheld or any(stop.startswith(withheld) for stop in stops) or is_end

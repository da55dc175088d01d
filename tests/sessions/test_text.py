"""Texts: after any extending and truncating, characters and checkpoints belong to their positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.arrays import Float32
from service.errors import PositionGone
from service.sessions.text import Retention, Text

RETENTION = Retention(checkpoint_chars=4, max_chars=32)


def state(position: int) -> Float32:
    """Return a state that contains its position."""
    return np.full((1, 2), position, np.float32)


def grow(text: Text, characters: str) -> Text:
    start, end = text.position, text.position + len(characters)
    checkpoints = {position: state(position) for position in RETENTION.checkpoint_positions(start, end)}
    return text.extended(characters, state(end), checkpoints, RETENTION)


def cut(text: Text, position: int) -> Text:
    return text.truncated(position, state(position))


@given(
    begin=st.none() | st.integers(0, 30),
    steps=st.lists(st.text("abcdefgh", max_size=30) | st.integers(0, 20), max_size=12),
)
def test_text__has_characters_and_states_at_their_positions(begin: int | None, steps: list[str | int]) -> None:
    whole = "x" * (begin or 0)
    text = Text(state(0)) if begin is None else Text.from_state(begin, state(begin))
    for step in steps:
        if isinstance(step, str):
            whole, text = whole + step, grow(text, step)
        else:
            position = max(text.start, len(whole) - step)
            whole, text = whole[:position], cut(text, position)
        assert text.position == text.hidden[0, 0] == len(whole)
        for start in range(text.start, len(whole) + 1):
            for end in range(start, len(whole) + 1):
                assert text.slice(start, end) == whole[start:end]
            near, hidden = text.nearest_checkpoint(start)
            assert start - RETENTION.checkpoint_chars < near <= start
            if near or begin is not None:
                assert hidden is not None
                assert hidden[0, 0] == near
            else:
                assert hidden is None
        if text.start:
            with pytest.raises(PositionGone):
                text.slice(text.start - 1, text.position)
            with pytest.raises(PositionGone):
                text.nearest_checkpoint(text.start - 1)
            with pytest.raises(PositionGone):
                cut(text, text.start - 1)


def test_text__is_a_value() -> None:
    """Extending, truncating and a new array leave the text as it was."""
    one = grow(Text(state(0)), "abcdefghij")
    for other in (grow(one, "klm"), cut(one, 3), one.with_hidden(state(99))):
        assert other is not one
        assert (one.slice(0, 10), one.position, one.hidden[0, 0]) == ("abcdefghij", 10, 10)


def test_with_hidden__changes_only_the_state() -> None:
    one = grow(Text(state(0)), "abcdefghij")
    other = one.with_hidden(state(99))
    assert other.hidden[0, 0] == 99
    assert (other.start, other.segments, other.tail) == (one.start, one.segments, one.tail)


def test_extended__retains_max_chars_and_less_than_a_segment_more() -> None:
    text = Text(state(0))
    for _ in range(1000):
        text = grow(text, "abc")
        num_retained = text.position - text.start
        assert num_retained >= min(text.position, RETENTION.max_chars)
        assert num_retained < RETENTION.max_chars + RETENTION.segment_chars
        assert text.start == max(0, text.position - RETENTION.max_chars) // 8 * 8
        assert len(text.segments) <= 1 + num_retained // RETENTION.checkpoint_chars + 1


def test_checkpoint_positions__names_only_those_that_will_be_retained() -> None:
    positions = Retention(256, 65_536).checkpoint_positions(10, 1_000_000)
    assert len(positions) <= 258 + 16
    assert positions[0] > 1_000_000 - 65_536 - 4096
    assert not Retention(256, 1000).checkpoint_positions(256, 511)
    assert Retention(256, 1000).checkpoint_positions(255, 512) == (256, 512)


def test_extended__shares_the_segments_before_it() -> None:
    one = grow(Text(state(0)), "abcdefghij")
    two = grow(one, "k")
    assert two.segments is one.segments
    assert cut(two, 9).segments[0] is one.segments[0]

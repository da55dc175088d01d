"""Transcripts: after any appending and truncating, text and checkpoints belong to their positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.arrays import Float32
from service.errors import PositionGone
from service.sessions.transcript import Retention, Transcript

RETENTION = Retention(checkpoint_chars=4, max_chars=32)


def state(position: int) -> Float32:
    """Return a state that contains its position."""
    return np.full((1, 2), position, np.float32)


def grow(transcript: Transcript, text: str) -> Transcript:
    start = transcript.position
    kept = RETENTION.checkpoint_positions(start, start + len(text))
    return transcript.extend(text, {position: state(position) for position in kept}, RETENTION)


@given(
    begin=st.none() | st.integers(0, 30),
    steps=st.lists(st.text("abcdefgh", max_size=30) | st.integers(0, 20), max_size=12),
)
def test_transcript__has_text_and_checkpoints_at_their_positions(begin: int | None, steps: list[str | int]) -> None:
    whole = "x" * (begin or 0)
    transcript = Transcript() if begin is None else Transcript.from_state(begin, state(begin))
    for step in steps:
        if isinstance(step, str):
            whole, transcript = whole + step, grow(transcript, step)
        else:
            position = max(transcript.start, len(whole) - step)
            whole, transcript = whole[:position], transcript.truncate(position)
        assert transcript.position == len(whole)
        for start in range(transcript.start, len(whole) + 1):
            for end in range(start, len(whole) + 1):
                assert transcript.text(start, end) == whole[start:end]
            near, hidden = transcript.nearest_checkpoint(start)
            assert start - RETENTION.checkpoint_chars < near <= start
            if near or begin is not None:
                assert hidden is not None
                assert hidden[0, 0] == near
            else:
                assert hidden is None
        if transcript.start:
            with pytest.raises(PositionGone):
                transcript.text(transcript.start - 1, transcript.position)
            with pytest.raises(PositionGone):
                transcript.nearest_checkpoint(transcript.start - 1)


def test_extend__retains_max_chars_and_less_than_a_segment_more() -> None:
    transcript = Transcript()
    for _ in range(1000):
        transcript = grow(transcript, "abc")
        num_retained = transcript.position - transcript.start
        assert num_retained >= min(transcript.position, RETENTION.max_chars)
        assert num_retained < RETENTION.max_chars + RETENTION.segment_chars
        assert transcript.start == max(0, transcript.position - RETENTION.max_chars) // 8 * 8
        assert len(transcript.segments) <= 1 + num_retained // RETENTION.checkpoint_chars + 1


def test_checkpoint_positions__names_only_those_that_will_be_retained() -> None:
    kept = Retention(256, 65_536).checkpoint_positions(10, 1_000_000)
    assert len(kept) <= 258 + 16
    assert kept[0] > 1_000_000 - 65_536 - 4096
    assert not Retention(256, 1000).checkpoint_positions(256, 511)
    assert Retention(256, 1000).checkpoint_positions(255, 512) == (256, 512)


def test_extend__shares_the_segments_before_it() -> None:
    one = grow(Transcript(), "abcdefghij")
    two = grow(one, "k")
    assert two.segments is one.segments
    assert two.truncate(9).segments[0] is one.segments[0]

"""The text of a session as far as it is retained, with states on the way from which any place in it is soon stepped."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from service.arrays import Float32
from service.errors import PositionGone


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A stretch of text and the state after it; sessions that were forked from one another share them.

    end: the position after it. hidden: (L, H) float32, not to be written to.
    """

    text: str
    end: int
    hidden: Float32


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept. checkpoint_chars: from one state on the way to the next, and so the most that has to be stepped
    again to come to a position. max_chars: of a session's text; at least so many, and less than a stretch more.
    """

    checkpoint_chars: int = 256
    max_chars: int = 65_536

    @property
    def segment_chars(self) -> int:
        """By how much text is dropped, and from one of the states that stores outside the process keep to the next:
        where a text begins must not depend on where it was kept meanwhile. 4,096 unless the text is short.
        """
        return self.checkpoint_chars * max(1, min(16, self.max_chars // self.checkpoint_chars // 4))

    def checkpoint_positions(self, start: int, end: int) -> tuple[int, ...]:
        """Positions above start, up to end, whose states a text that grows from start to end needs."""
        every = self.checkpoint_chars
        first = max(start, end - self.max_chars - self.segment_chars) // every + 1
        return tuple(range(first * every, end + 1, every))


@dataclass(frozen=True, slots=True)
class Transcript:
    """A text, of which the characters from position `start` on are retained. It never changes: changes make another.

    segments: one after the other; the first one may lie before start, for its state alone. Where there is none, the
    state at `start` is the zero state. tail: what follows the last segment.
    """

    start: int = 0
    segments: tuple[Segment, ...] = ()
    tail: str = ""

    @classmethod
    def from_state(cls, position: int, hidden: Float32) -> Transcript:
        """One of which no character is known, only the (L, H) state after `position` of them."""
        return cls(position, (Segment("", position, hidden),))

    @property
    def position(self) -> int:
        """Characters consumed."""
        return self._tail_start + len(self.tail)

    def text(self, start: int, end: int) -> str:
        """The characters from start up to end <= position. Raises PositionGone."""
        self._check(start)
        first = bisect_right(self.segments, start, key=_end)
        last = bisect_left(self.segments, end, key=_end) + 1
        parts = [segment.text for segment in self.segments[first:last]]
        begin = self.segments[first - 1].end if first else self.start
        if last > len(self.segments):
            parts.append(self.tail)
        return "".join(parts)[start - begin : end - begin]

    def nearest_checkpoint(self, position: int) -> tuple[int, Float32 | None]:
        """The last place up to `position` whose (L, H) state is known, and the state; None: the zero state.

        Raises PositionGone.
        """
        self._check(position)
        place = bisect_right(self.segments, position, key=_end)
        return (self.segments[place - 1].end, self.segments[place - 1].hidden) if place else (self.start, None)

    def extended(self, text: str, states: Mapping[int, Float32], retention: Retention) -> Transcript:
        """With more text. states: position -> (L, H) after it, of all that `retention` names; they are kept."""
        segments, begin = [*self.segments], self._tail_start
        tail, end = self.tail + text, self.position + len(text)
        for border in (border for border in sorted(states) if border <= end):
            segments.append(Segment(tail[: border - begin], border, states[border]))
            tail, begin = tail[border - begin :], border
        # A segment that only its state is needed of makes what lies before it superfluous.
        num_gone = bisect_right(segments, end - retention.max_chars, key=_end)
        while num_gone and segments[num_gone - 1].end % retention.segment_chars:
            num_gone -= 1
        if num_gone:
            return Transcript(max(self.start, segments[num_gone - 1].end), tuple(segments[num_gone - 1 :]), tail)
        return Transcript(self.start, tuple(segments) if len(segments) > len(self.segments) else self.segments, tail)

    def truncate(self, position: int) -> Transcript:
        """Only what lies before a retained position. Raises PositionGone."""
        begin, _ = self.nearest_checkpoint(position)
        num_segments = bisect_right(self.segments, position, key=_end)
        return Transcript(self.start, self.segments[:num_segments], self.text(begin, position))

    @property
    def _tail_start(self) -> int:
        return self.segments[-1].end if self.segments else self.start

    def _check(self, position: int) -> None:
        if position < self.start:
            raise PositionGone(f"the text before position {self.start} is no longer retained")


def _end(segment: Segment) -> int:
    return segment.end

"""The text of a session with the state after it, and the checkpoints from which any position is soon reached."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from service.arrays import Float32
from service.errors import PositionGone


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Segment:
    """Part of a text, and the state after it. It never changes, so sessions that were forked share it."""

    text: str
    end: int  # the position after it
    hidden: Float32  # (L, H), the checkpoint at `end`; read-only


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of a text is retained."""

    # Characters from one checkpoint to the next: the most that is stepped again to reach a position.
    checkpoint_chars: int = 256
    # Characters of text: at least this many are retained, and less than one segment of a store more.
    max_chars: int = 65_536

    @property
    def segment_chars(self) -> int:
        """Characters between the checkpoints that a store outside the process keeps: 4,096 unless the text is short.

        Text is also dropped in pieces of this length, so where a text begins doesn't depend on where it was stored.
        """
        return self.checkpoint_chars * max(1, min(16, self.max_chars // self.checkpoint_chars // 4))

    def checkpoint_positions(self, start: int, end: int) -> tuple[int, ...]:
        """Return the positions in (start, end] whose states a text needs that grows from start to end."""
        every = self.checkpoint_chars
        first = max(start, end - self.max_chars - self.segment_chars) // every + 1
        return tuple(range(first * every, end + 1, every))


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text and the state after it: one value, so that they can't come apart. Every change makes a new Text.

    Only `Reader` makes a Text longer or shorter, because only stepping the network gives the state.
    """

    hidden: Float32  # (L, H), the state after the whole text; read-only
    start: int = 0  # position of the first retained character
    # Consecutive. The first one may end at or before `start`: then only its state is used. Without segments, the state
    # at `start` is the zero state.
    segments: tuple[Segment, ...] = ()
    tail: str = ""  # the characters after the last segment

    @classmethod
    def from_state(cls, position: int, hidden: Float32) -> Text:
        """Return a text whose characters are unknown: only the (L, H) state after `position` of them is known."""
        return cls(hidden, position, (Segment("", position, hidden),))

    @property
    def position(self) -> int:
        """The number of characters consumed so far."""
        return self._tail_start + len(self.tail)

    def slice(self, start: int, end: int) -> str:
        """Return the characters from start up to end <= position. Raises PositionGone."""
        self._require_retained(start)
        first = bisect_right(self.segments, start, key=_end)
        last = bisect_left(self.segments, end, key=_end) + 1
        parts = [segment.text for segment in self.segments[first:last]]
        begin = self.segments[first - 1].end if first else self.start
        if last > len(self.segments):
            parts.append(self.tail)
        return "".join(parts)[start - begin : end - begin]

    def nearest_checkpoint(self, position: int) -> tuple[int, Float32 | None]:
        """Return the last checkpoint up to `position`, and its (L, H) state: None for the zero state.

        Raises PositionGone.
        """
        self._require_retained(position)
        place = bisect_right(self.segments, position, key=_end)
        return (self.segments[place - 1].end, self.segments[place - 1].hidden) if place else (self.start, None)

    def extended(self, text: str, hidden: Float32, checkpoints: Mapping[int, Float32], retention: Retention) -> Text:
        """Return the text with more characters, and drop at its beginning what `retention` doesn't retain.

        Args:
            text: The characters to append.
            hidden: (L, H), the state after them.
            checkpoints: Position -> (L, H) state after it, for all that `retention.checkpoint_positions` names.
            retention: How much to retain.
        """
        segments, begin = [*self.segments], self._tail_start
        tail, end = self.tail + text, self.position + len(text)
        for border in (border for border in sorted(checkpoints) if border <= end):
            segments.append(Segment(tail[: border - begin], border, checkpoints[border]))
            tail, begin = tail[border - begin :], border
        # A segment that is needed for its state alone makes everything before it superfluous.
        num_dropped = bisect_right(segments, end - retention.max_chars, key=_end)
        while num_dropped and segments[num_dropped - 1].end % retention.segment_chars:
            num_dropped -= 1
        if num_dropped:
            start = max(self.start, segments[num_dropped - 1].end)
            return Text(hidden, start, tuple(segments[num_dropped - 1 :]), tail)
        unchanged = len(segments) == len(self.segments)  # then the tuple is shared, and stores need not compare it
        return Text(hidden, self.start, self.segments if unchanged else tuple(segments), tail)

    def truncated(self, position: int, hidden: Float32) -> Text:
        """Return the text up to a retained position, with the (L, H) state there. Raises PositionGone."""
        begin, _ = self.nearest_checkpoint(position)
        num_segments = bisect_right(self.segments, position, key=_end)
        return Text(hidden, self.start, self.segments[:num_segments], self.slice(begin, position))

    def with_hidden(self, hidden: Float32) -> Text:
        """Return the same text with another array for its state, such as a copy."""
        return replace(self, hidden=hidden)

    @property
    def _tail_start(self) -> int:
        return self.segments[-1].end if self.segments else self.start

    def _require_retained(self, position: int) -> None:
        if position < self.start:
            raise PositionGone(f"the text before position {self.start} is no longer retained")


def _end(segment: Segment) -> int:
    return segment.end

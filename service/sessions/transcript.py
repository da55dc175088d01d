"""The retained text of a session, with checkpoints: states from which any retained position is reached in few steps."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from service.arrays import Float32
from service.errors import PositionGone


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A part of a text that ends at a checkpoint. Sessions that were forked from one another share segments."""

    text: str
    end: int  # the position after the text
    hidden: Float32  # (L, H), the state at `end`; must not be written to


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of a session's text is retained, and how densely it has checkpoints."""

    # Distance between two checkpoints. At most this many characters are stepped again to reach a retained position, or
    # `segment_chars` if the session was read from a record.
    checkpoint_chars: int = 256
    # At least the last `max_chars` characters are retained, and fewer than `max_chars + segment_chars`.
    max_chars: int = 65_536

    @property
    def segment_chars(self) -> int:
        """Text is dropped in units of this size, which is also the distance between the checkpoints in a stored record.

        Both are the same number so that the place where a text begins doesn't depend on the store that it was in.
        It is 4,096 characters with the default settings, and less if `max_chars` is small.
        """
        return self.checkpoint_chars * max(1, min(16, self.max_chars // self.checkpoint_chars // 4))

    def checkpoint_positions(self, start: int, end: int) -> tuple[int, ...]:
        """Return the checkpoints, in rising order, that a text needs when it grows from `start` to `end`.

        They are greater than `start` and at most `end`. Text that will be dropped at once gets none.
        """
        every = self.checkpoint_chars
        first = max(start, end - self.max_chars - self.segment_chars) // every + 1
        return tuple(range(first * every, end + 1, every))


@dataclass(frozen=True, slots=True)
class Transcript:
    """An immutable text of which the characters from position `start` on are retained."""

    start: int = 0
    # Adjacent segments. The first one may end at `start`: then it contributes only the state there. If no segment ends
    # at `start`, the state there is the zero state.
    segments: tuple[Segment, ...] = ()
    tail: str = ""  # the text after the last segment

    @classmethod
    def from_state(cls, position: int, hidden: Float32) -> Transcript:
        """Return a transcript without any retained text, for an (L, H) state at a position."""
        return cls(position, (Segment("", position, hidden),))

    @property
    def position(self) -> int:
        """Number of characters read and generated so far."""
        return self._tail_start + len(self.tail)

    def text(self, start: int, end: int) -> str:
        """Return the characters from `start` to `end` <= position. Raises PositionGone if `start` isn't retained."""
        self._check(start)
        first = bisect_right(self.segments, start, key=_end)
        last = bisect_left(self.segments, end, key=_end) + 1
        parts = [segment.text for segment in self.segments[first:last]]
        begin = self.segments[first - 1].end if first else self.start
        if last > len(self.segments):
            parts.append(self.tail)
        return "".join(parts)[start - begin : end - begin]

    def nearest_checkpoint(self, position: int) -> tuple[int, Float32 | None]:
        """Return the last checkpoint up to `position`, and the (L, H) state there; None is the zero state.

        Raises PositionGone if `position` isn't retained.
        """
        self._check(position)
        num_before = bisect_right(self.segments, position, key=_end)
        if not num_before:
            return self.start, None
        return self.segments[num_before - 1].end, self.segments[num_before - 1].hidden

    def extend(self, text: str, states: Mapping[int, Float32], retention: Retention) -> Transcript:
        """Return a transcript with more text, from which text that needn't be retained any more is dropped.

        states: (L, H) by position, for all of `retention.checkpoint_positions`. The transcript keeps the arrays.
        """
        segments, begin = [*self.segments], self._tail_start
        tail, end = self.tail + text, self.position + len(text)
        for checkpoint in (checkpoint for checkpoint in sorted(states) if checkpoint <= end):
            segments.append(Segment(tail[: checkpoint - begin], checkpoint, states[checkpoint]))
            tail, begin = tail[checkpoint - begin :], checkpoint
        # The last dropped segment stays in the tuple: its state is the one at the new start.
        num_dropped = bisect_right(segments, end - retention.max_chars, key=_end)
        while num_dropped and segments[num_dropped - 1].end % retention.segment_chars:
            num_dropped -= 1
        if num_dropped:
            start = max(self.start, segments[num_dropped - 1].end)
            return Transcript(start, tuple(segments[num_dropped - 1 :]), tail)
        return Transcript(self.start, tuple(segments) if len(segments) > len(self.segments) else self.segments, tail)

    def truncate(self, position: int) -> Transcript:
        """Return the transcript up to a retained position. Raises PositionGone if it isn't retained."""
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

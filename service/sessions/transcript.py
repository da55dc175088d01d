"""The text of a session as far as it is retained, with states on the way from which any place in it is soon stepped."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import PositionGone
from service.states import Float32


@dataclass(frozen=True, slots=True, eq=False)
class Block:
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
    def stretch_chars(self) -> int:
        """By how much text is dropped, and from one of the states that stores outside the process keep to the next:
        where a text begins must not depend on where it was kept meanwhile. 4,096 unless the text is short.
        """
        return self.checkpoint_chars * max(1, min(16, self.max_chars // self.checkpoint_chars // 4))

    def checkpoints(self, start: int, end: int) -> tuple[int, ...]:
        """Positions above start, up to end, whose states a text that grows from start to end needs."""
        every = self.checkpoint_chars
        first = max(start, end - self.max_chars - self.stretch_chars) // every + 1
        return tuple(range(first * every, end + 1, every))


@dataclass(frozen=True, slots=True)
class Transcript:
    """A text, of which the characters from position `start` on are retained. It never changes: changes make another.

    blocks: one after the other; the first one may lie before start, for its state alone. Where there is none, the
    state at `start` is the zero state. tail: what follows the last block.
    """

    start: int = 0
    blocks: tuple[Block, ...] = ()
    tail: str = ""

    @classmethod
    def from_state(cls, position: int, hidden: Float32) -> Transcript:
        """One of which no character is known, only the (L, H) state after `position` of them."""
        return cls(position, (Block("", position, hidden),))

    @property
    def position(self) -> int:
        """Characters consumed."""
        return self._tail_start + len(self.tail)

    def text(self, start: int, end: int) -> str:
        """The characters from start up to end <= position. Raises PositionGone."""
        self._check(start)
        first = bisect_right(self.blocks, start, key=_end)
        last = bisect_left(self.blocks, end, key=_end) + 1
        parts = [block.text for block in self.blocks[first:last]]
        begin = self.blocks[first - 1].end if first else self.start
        if last > len(self.blocks):
            parts.append(self.tail)
        return "".join(parts)[start - begin : end - begin]

    def nearest_state(self, position: int) -> tuple[int, Float32 | None]:
        """The last place up to `position` whose (L, H) state is known, and the state; None: the zero state.

        Raises PositionGone.
        """
        self._check(position)
        place = bisect_right(self.blocks, position, key=_end)
        return (self.blocks[place - 1].end, self.blocks[place - 1].hidden) if place else (self.start, None)

    def extended(self, text: str, states: Mapping[int, Float32], retention: Retention) -> Transcript:
        """With more text. states: position -> (L, H) after it, of all that `retention` names; they are kept."""
        blocks, begin = [*self.blocks], self._tail_start
        tail, end = self.tail + text, self.position + len(text)
        for border in (border for border in sorted(states) if border <= end):
            blocks.append(Block(tail[: border - begin], border, states[border]))
            tail, begin = tail[border - begin :], border
        # A block that only its state is needed of makes what lies before it superfluous.
        num_gone = bisect_right(blocks, end - retention.max_chars, key=_end)
        while num_gone and blocks[num_gone - 1].end % retention.stretch_chars:
            num_gone -= 1
        if num_gone:
            return Transcript(max(self.start, blocks[num_gone - 1].end), tuple(blocks[num_gone - 1 :]), tail)
        return Transcript(self.start, tuple(blocks) if len(blocks) > len(self.blocks) else self.blocks, tail)

    def cut(self, position: int) -> Transcript:
        """Only what lies before a retained position. Raises PositionGone."""
        begin, _ = self.nearest_state(position)
        num_blocks = bisect_right(self.blocks, position, key=_end)
        return Transcript(self.start, self.blocks[:num_blocks], self.text(begin, position))

    @property
    def _tail_start(self) -> int:
        return self.blocks[-1].end if self.blocks else self.start

    def _check(self, position: int) -> None:
        if position < self.start:
            raise PositionGone(f"the text before position {self.start} is no longer retained")


def _end(block: Block) -> int:
    return block.end

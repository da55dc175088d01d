"""Short texts that are only read, after known states. Many of them are read in one call, without objects for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.arrays import MAX_POSITION, Float32, Ids
from service.engine.request import check_ids, check_state
from service.engine.scores import Distribution, Scores
from service.errors import InvalidValue


@dataclass(frozen=True)
class ShortText:
    """Characters to read from a state, and what to report of them."""

    hidden: Float32  # (L, H), the state after `position` characters; not modified
    position: int
    ids: Ids  # (n,), the characters to read; may be empty
    is_root: bool = False  # the state may not be one that this engine returned, so its numbers must be checked
    # The numbers of read characters, rising, from 1 to n, after which the state is reported.
    checkpoints: tuple[int, ...] = ()
    # Report the log-probabilities of the characters that are read, and of this many likeliest ones at each place.
    num_logprobs: int | None = None
    wants_next: bool = False  # report the distribution of the next character

    def check(self, shape: tuple[int, ...], vocab_size: int) -> None:
        """Raise InvalidValue unless a stepper can read this text. shape: (L, H); vocab_size: V."""
        check_state(self.hidden, shape, is_known=not self.is_root)
        check_ids(self.ids, vocab_size, "prompt")
        if not 0 <= self.position <= MAX_POSITION - len(self.ids):
            raise InvalidValue(f"position: a text has at most {MAX_POSITION} characters", param="position")


class ReadText(NamedTuple):
    """What came of a short text."""

    scores: Scores  # of the characters that were read; of none if not requested
    states: dict[int, Float32]  # (L, H) by the number of read characters, for the checkpoints
    hidden: Float32  # (L, H), the state after the last character
    next: Distribution | None  # all characters, the likeliest first; None if not requested


class ShortTextReader(Protocol):
    """A stepper that also reads short texts. They get the bits that `Stepper.advance` gives."""

    def read(self, texts: Sequence[ShortText]) -> list[ReadText]:
        """Read texts that were checked, at least one, to their ends. Only one thread at a time may call a stepper."""
        ...

"""Texts as ids: what a model is trained on and measured with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids


@dataclass(frozen=True)
class EncodedText:
    """Texts one after the other, as ids. A model reads each of them from the zero state."""

    ids: NDArray[np.integer]  # (n,), the smallest unsigned dtype that holds the charset
    starts: Ids  # (number of texts,) int64, the positions at which a text begins, ascending; the first is 0
    # Whether the first character of a text is predicted, from the zero state. It is not where a text is the end of a
    # longer one. The first character of all is never scored.
    scores_starts: bool = True

    @classmethod
    def of_lengths(cls, ids: NDArray[np.integer], lengths: Ids, scores_starts: bool = True) -> EncodedText:
        """Return texts of these lengths, int64, which follow one another in `ids`. Empty texts are left out."""
        if not lengths.all():
            lengths = lengths[lengths > 0]
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=starts[1:])
        return cls(ids, starts, scores_starts)

    @property
    def lengths(self) -> Ids:
        """(number of texts,) int64, the number of characters of each text."""
        return np.diff(self.starts, append=len(self.ids))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the positions of the first character of each text and of the one after its last."""
        return pairwise(chain(map(int, self.starts), [len(self.ids)]))

    @property
    def num_scored(self) -> int:
        """The number of characters that a measurement scores."""
        return len(self.ids) - (1 if self.scores_starts else len(self.starts))

    def last(self, num_chars: int) -> EncodedText:
        """Return the last 1 to n characters, as a view. A text that is cut in two is one from there on."""
        border = len(self.ids) - num_chars
        later = self.starts[self.starts > border] - border
        return EncodedText(self.ids[border:], np.concatenate([np.zeros(1, np.int64), later]), self.scores_starts)

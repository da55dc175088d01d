"""Log-probabilities of characters, computed from the logits before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.arrays import Float32, Ids, Int32
from service.engine.arithmetic import exp, log


@dataclass(frozen=True)
class Scores:
    """Log-probabilities, in nats, of m characters under the model's own distribution, before any sampling setting.

    They are computed in float64, and stored in half the memory.
    """

    chosen: Float32  # (m,), of the characters themselves
    top_ids: Int32  # (m, k), the k likeliest characters at each place, in falling order; equal ones in the order of ids
    top: Float32  # (m, k), log-probabilities of top_ids

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Concatenate the scores of consecutive characters. Needs at least one part; all must have the same k."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("chosen", "top_ids", "top")))

    @classmethod
    def none(cls) -> Scores:
        """Return the scores of a text without characters."""
        return cls(np.empty(0, np.float32), np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))

    def likeliest(self, num_top: int) -> Scores:
        """Return the scores with only the `num_top` likeliest characters at each place."""
        return Scores(self.chosen, self.top_ids[:, :num_top], self.top[:, :num_top])

    def slice(self, start: int, end: int | None) -> Scores:
        """Return the scores of characters start .. end - 1."""
        return Scores(self.chosen[start:end], self.top_ids[start:end], self.top[start:end])


@dataclass(frozen=True)
class Distribution:
    """The k likeliest next characters."""

    ids: Int32  # (k,), likeliest first
    logprobs: Float32  # (k,), in nats


def score(logits: Float32, chars: Ids, num_top: int) -> Scores:
    """Score (m,) characters, and the num_top likeliest at each place, from the (m, V) logits before them."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    # Summed in the order of ids: numpy's sum would choose an order of its own.
    total = np.cumsum(exp(shifted.copy()), axis=1)[:, -1:]
    logprobs = shifted - log(total)
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    chosen = np.take_along_axis(logprobs, chars[:, None], axis=1)[:, 0]
    top = np.take_along_axis(logprobs, top_ids, axis=1)
    return Scores(chosen.astype(np.float32), top_ids.astype(np.int32), top.astype(np.float32))


def num_scores(num_chars: int, num_top: int | None) -> int:
    """Return how many log-probabilities the scores of num_chars characters have; 0 if num_top is None: no scores."""
    return 0 if num_top is None else num_chars * (1 + num_top)

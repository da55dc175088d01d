"""Log-probabilities of characters, computed from the logits before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.arrays import Float32, Float64, Ids
from service.engine.arithmetic import exp, log


@dataclass(frozen=True)
class Scores:
    """Log-probabilities, in nats, of m characters under the model's own distribution, before any sampling setting."""

    chosen: Float64  # (m,), of the characters themselves
    top_ids: Ids  # (m, k), the k likeliest characters at each place, in falling order; equal ones in the order of ids
    top: Float64  # (m, k), log-probabilities of top_ids

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Concatenate the scores of consecutive characters. Needs at least one part; all must have the same k."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("chosen", "top_ids", "top")))

    def slice(self, start: int, end: int | None) -> Scores:
        """Return the scores of characters start .. end - 1."""
        return Scores(self.chosen[start:end], self.top_ids[start:end], self.top[start:end])


@dataclass(frozen=True)
class Distribution:
    """The k likeliest next characters."""

    ids: Ids  # (k,), likeliest first
    logprobs: Float64  # (k,), in nats


def score(logits: Float32, chars: Ids, num_top: int) -> Scores:
    """Score (m,) characters, and the num_top likeliest at each place, from the (m, V) logits before them."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    # Summed in the order of ids: numpy's sum would choose an order of its own.
    total = np.cumsum(exp(shifted.copy()), axis=1)[:, -1:]
    logprobs = shifted - log(total)
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    chosen = np.take_along_axis(logprobs, chars[:, None], axis=1)[:, 0]
    return Scores(chosen, top_ids, np.take_along_axis(logprobs, top_ids, axis=1))

"""Log-probabilities of characters, computed from the logits before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

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
    # (m,), of the characters themselves among those that the automaton allowed: the model's distribution without the
    # others. NaN for characters of a prompt. None if there is no automaton, or it forbids nothing.
    allowed: Float32 | None = None

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Concatenate the scores of consecutive characters. Needs at least one part; all must have the same k."""
        if len(parts) == 1:
            return parts[0]
        joined = cls(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("chosen", "top_ids", "top"))
        )
        if all(part.allowed is None for part in parts):
            return joined
        nan = np.full(len(joined.chosen), np.nan, np.float32)
        allowed = [nan[: len(part.chosen)] if part.allowed is None else part.allowed for part in parts]
        return replace(joined, allowed=np.concatenate(allowed))

    @classmethod
    def none(cls) -> Scores:
        """Return the scores of a text without characters."""
        return cls(np.empty(0, np.float32), np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))

    def likeliest(self, num_top: int) -> Scores:
        """Return the scores with only the `num_top` likeliest characters at each place."""
        return replace(self, top_ids=self.top_ids[:, :num_top], top=self.top[:, :num_top])

    def slice(self, start: int, end: int | None) -> Scores:
        """Return the scores of characters start .. end - 1."""
        allowed = None if self.allowed is None else self.allowed[start:end]
        return Scores(self.chosen[start:end], self.top_ids[start:end], self.top[start:end], allowed)


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


def score_among(logits: Float32, char: int, mask: NDArray[np.bool_]) -> float:
    """Return the log-probability of a character among those of a (V,) mask, from (V,) logits."""
    shifted = np.where(mask, logits.astype(np.float64), -np.inf)
    shifted -= shifted.max()
    shares = exp(shifted.copy())
    shares[~mask] = 0
    return float(shifted[char] - log(np.cumsum(shares)[-1:])[0])


def num_scores(num_chars: int, num_top: int | None) -> int:
    """Return how many log-probabilities the scores of num_chars characters have; 0 if num_top is None: no scores."""
    return 0 if num_top is None else num_chars * (1 + num_top)

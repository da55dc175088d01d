"""What may follow a state: the dense layer alone, without a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.scores import score
from service.engine.stepper import Distribution, Row
from service.model.quantize import STATE_SCALE, QuantizedLinear

_ROWS = 1024  # characters whose weights are widened at a time: bounds the memory


class NextCharacter:
    """The distribution after each of several states, to the bit as a stepper computes it to draw from it."""

    def __init__(self, dense: QuantizedLinear) -> None:
        self._dense = dense

    def fill(self, rows: Sequence[Row]) -> None:
        """Give rows that are finished what they want to know of the next character, if they don't have it."""
        wanting = [row for row in rows if row.finished is not None and row.num_next is not None and row.next is None]
        if not wanting:
            return
        states = np.stack([row.hidden[-1] for row in wanting])
        rounded = np.rint(states * np.float32(STATE_SCALE)).astype(np.int32)  # (K, H)
        logits = self._products(rounded).astype(np.float32) * self._dense.scale + self._dense.bias  # (K, V)
        num_top = max(row.num_next or 0 for row in wanting)
        scores = score(logits, np.zeros(len(wanting), np.int64), num_top)
        for row, ids, logprobs in zip(wanting, scores.top_ids, scores.top, strict=True):
            row.next = Distribution(ids[: row.num_next], logprobs[: row.num_next])

    def _products(self, rounded: NDArray[np.int32]) -> NDArray[np.int32]:
        """(K, H) -> (K, V). Not `@`: for integers it is slower, and for floats it would start threads."""
        weight = self._dense.weight
        parts = [
            np.einsum("kh,vh->kv", rounded, weight[start : start + _ROWS].astype(np.int32))
            for start in range(0, len(weight), _ROWS)
        ]
        return np.concatenate(parts, axis=1)

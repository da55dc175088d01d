"""The distribution of the character that follows a state, without a step."""

from __future__ import annotations

import numpy as np

from service.engine.scores import score
from service.engine.stepper import Float32, Scores
from service.model.quantize import STATE_SCALE, QuantizedLinear

_ROWS = 1024  # characters whose weights are widened at a time: bounds the memory
_FIRST = np.zeros(1, np.int64)


class NextCharacter:
    """The dense layer alone, to the bit as a stepper computes it. Any number of threads may use it."""

    def __init__(self, dense: QuantizedLinear) -> None:
        self._dense = dense

    def scores(self, hidden: Float32, num_top: int) -> Scores:
        """(L, H) state -> one row of scores: of the num_top likeliest characters, and of the one with id 0."""
        rounded = np.rint(hidden[-1] * np.float32(STATE_SCALE)).astype(np.int32)
        weight = self._dense.weight
        # Not `@`: for integers it is slower, and for floats it would start threads.
        parts = [
            np.einsum("vk,k->v", weight[start : start + _ROWS].astype(np.int32), rounded)
            for start in range(0, len(weight), _ROWS)
        ]
        logits = np.concatenate(parts).astype(np.float32) * self._dense.scale + self._dense.bias
        return score(logits[None], _FIRST, num_top)

"""The log-probabilities of characters, from the logits before them."""

from __future__ import annotations

import numpy as np

from service.arrays import Float32, Ids
from service.engine.arithmetic import exp, log
from service.engine.stepper import Scores


def score(logits: Float32, chars: Ids, num_top: int) -> Scores:
    """(m, V) logits before each of (m,) characters -> their log-probabilities, and those of the likeliest."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    # Summed in the order of ids: numpy's sum would choose an order of its own.
    total = np.cumsum(exp(shifted.copy()), axis=1)[:, -1:]
    logprobs = shifted - log(total)
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    chosen = np.take_along_axis(logprobs, chars[:, None], axis=1)[:, 0]
    return Scores(chosen, top_ids, np.take_along_axis(logprobs, top_ids, axis=1))

"""What a row gets in one call of a stepper, and the log-probabilities of its characters."""

from __future__ import annotations

import numpy as np

from service.engine.arithmetic import exp, log
from service.engine.stepper import Advance, Float32, Ids, Row, Scores


class Collected:
    """What a row got in one call, run after run."""

    def __init__(self) -> None:
        self.chars: list[Ids] = []
        self.scores: list[Scores] = []
        self.prompt_scores: list[Scores] = []

    def score(self, row: Row, is_prompt: bool, logits: Float32, chars: Ids) -> None:
        scores = score(logits, chars, row.num_logprobs or 0)
        (self.prompt_scores if is_prompt else self.scores).append(scores)

    def advance(self) -> Advance:
        if len(self.chars) == 1 and not self.scores and not self.prompt_scores:
            return Advance(self.chars[0])
        return Advance(
            np.concatenate(self.chars) if self.chars else np.empty(0, np.int64),
            Scores.join(self.scores) if self.scores else None,
            Scores.join(self.prompt_scores) if self.prompt_scores else None,
        )


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

"""How well the integers that the engine steps with predict a text."""

from __future__ import annotations

from collections.abc import Callable

from service.arrays import Ids
from service.engine.stepper import Row, Stepper

_CHUNK = 2048  # characters between two reports of progress


def stepped_loss(stepper: Stepper, ids: Ids, progress: Callable[[int], object] = lambda _: None) -> float:
    """Mean nats a character of a text (n,) int64, n > 1, the state carried from zero; the first one is not scored."""
    row = Row(stepper.initial_hidden(), 0, ids, max_chars=0, seed=0, num_logprobs=0, score_prompt=True)
    total, first = 0.0, 1
    while row.finished is None:
        scores = stepper.advance([row], _CHUNK)[0].prompt_scores
        if scores is not None:
            total -= float(scores.chosen[first:].sum())
            progress(len(scores.chosen) - first)
            first = 0
    return total / (len(ids) - 1)

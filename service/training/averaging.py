"""Averaged weights: they follow the trained ones slowly, and predict better than any single update's."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of a list of weights; with `decay` 0 it is those weights themselves.

    The decay grows with the number of updates, (1 + n) / (10 + n), until it reaches `decay`: the first updates, far
    from any minimum, are soon forgotten.
    """

    def __init__(self, weights: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = [weight.detach().clone() for weight in weights]

    def update(self, weights: list[Tensor], num_updates: int) -> None:
        """Take in the weights after update number `num_updates` (from 1)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self.weights, [weight.detach() for weight in weights], 1 - decay)

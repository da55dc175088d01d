"""The learning rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.training.hyperparameters import Hyperparameters


def learning_rate(settings: Hyperparameters, step: int, total_steps: int) -> float:
    """Return the learning rate of update `step` (counted from 0) of `total_steps`.

    The rate rises linearly to its peak over the warm-up and then falls along half a cosine.
    """
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


class WeightAverage:
    """Exponential moving average of a list of weights. It predicts better than the weights of any single update.

    The decay grows with the number of updates n as (1 + n) / (10 + n) until it reaches `decay`, so that the first
    updates, which are far from any minimum, are soon forgotten. With `decay` 0 the average equals the weights.
    """

    def __init__(self, weights: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = [weight.detach().clone() for weight in weights]

    def update(self, weights: list[Tensor], num_updates: int) -> None:
        """Move the average, in place, towards the weights after update number `num_updates` (counted from 1)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self.weights, [weight.detach() for weight in weights], 1 - decay)

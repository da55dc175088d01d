"""The learning rate of every update: a linear rise, then half a cosine down."""

from __future__ import annotations

import math

from service.training.hyperparameters import Hyperparameters


def learning_rate(settings: Hyperparameters, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0) of `total_steps`."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)

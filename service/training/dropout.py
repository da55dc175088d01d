"""Dropout masks from a generator whose whole state can be saved."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_mask(shape: tuple[int, ...], rate: float, generator: torch.Generator | None) -> Tensor:
    """Boolean tensor, False with probability `rate` (to the nearest 1/65,536).

    Sixteen random bits an element, four elements to a 64-bit draw: `Tensor.bernoulli_` takes ten times as long on a
    CPU, which for masks of this size is a fifth of a training step.
    """
    count = math.prod(shape)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    levels = draws.view(torch.int16)[:count]  # -32768..32767, uniform
    return (levels >= round(rate * 65_536) - 32_768).view(shape)


def drop(values: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """`values` with each element zeroed with probability `rate`, the others scaled so that the mean stays."""
    if rate == 0:
        return values
    mask = keep_mask(tuple(values.shape), rate, generator)
    return values * mask.to(values.dtype).mul_(1 / (1 - rate))

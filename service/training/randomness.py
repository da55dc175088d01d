"""Random numbers of training: seeded generators, and dropout masks drawn from them."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor


def seeded_generator(
    seed: int, purpose: Literal["weights", "characters", "epoch", "restarts", "update", "sample"], number: int = 0
) -> torch.Generator:
    """Return a new generator that depends only on the arguments.

    Different arguments give unrelated generators. A checkpoint therefore stores no generator state: a resumed run
    creates the generator of its next epoch or update again.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def keep_mask(shape: tuple[int, ...], rate: float, generator: torch.Generator | None) -> Tensor:
    """Return a boolean tensor whose elements are False with probability `rate`, rounded to a multiple of 1/65,536.

    Each element takes 16 random bits, so one 64-bit draw serves four elements. `Tensor.bernoulli_` takes ten times as
    long on a CPU, which for masks of this size is a fifth of a training step.
    """
    count = math.prod(shape)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    levels = draws.view(torch.int16)[:count]  # -32768..32767, uniform
    return (levels >= round(rate * 65_536) - 32_768).view(shape)


def drop(values: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Apply dropout: zero each element with probability `rate` and scale the others so that the mean is unchanged."""
    if rate == 0:
        return values
    mask = keep_mask(tuple(values.shape), rate, generator)  # on the CPU: each device then draws the same mask
    return values * mask.to(values.device).to(values.dtype).mul_(1 / (1 - rate))

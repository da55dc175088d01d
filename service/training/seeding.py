"""Random numbers that follow from (seed, what for, number) alone: no generator's state has to be kept or restored."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch


def generator(seed: int, purpose: Literal["weights", "epoch", "update"], number: int = 0) -> torch.Generator:
    """A fresh generator, the same for the same arguments, unrelated for others."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

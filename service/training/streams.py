"""The training text as streams that are read side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from service.errors import InvalidCorpus
from service.training.randomness import seeded_generator


class Streams:
    """A text, divided into B streams of equal length that are read side by side in windows of T characters.

    Each stream is an unbroken part of the text. Every epoch starts at another offset of fewer than T characters, so
    that windows and streams break at different places. The offset depends only on the seed and the epoch.

    Raises InvalidCorpus for a text that is too short for one window of every stream.
    """

    def __init__(self, ids: Tensor, batch: int, steps: int, seed: int) -> None:
        self.ids = ids  # (n,) int64
        self.batch = batch  # B
        self.steps = steps  # T
        self.seed = seed
        self.windows_per_epoch = (len(ids) - steps) // (batch * steps)
        if self.windows_per_epoch < 1:
            needed = batch * steps + steps
            raise InvalidCorpus(
                f"the training text has {len(ids)} characters, too few for {batch} streams of {steps}: "
                f"at least {needed} are needed; lower the batch size or the sequence length",
                param="corpus",
            )

    def window(self, epoch: int, index: int) -> Tensor:
        """Return window `index` of an epoch as (T + 1, B) int64: row t + 1 holds the targets of the inputs in row t."""
        length = self.windows_per_epoch * self.steps  # characters that a stream reads; one more is only a target
        starts = self._offset(epoch) + torch.arange(self.batch) * length  # (B,)
        positions = index * self.steps + torch.arange(self.steps + 1)  # (T + 1,)
        return self.ids[positions[:, None] + starts]

    def _offset(self, epoch: int) -> int:
        return int(torch.randint(self.steps, (1,), generator=seeded_generator(self.seed, "epoch", epoch)))

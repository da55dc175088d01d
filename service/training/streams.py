"""A text to train on, cut into streams that are read side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from service.errors import InvalidCorpus
from service.training.seeding import generator


class Streams:
    """A text as B streams of characters read side by side, each one unbroken, in windows of T steps.

    Every epoch begins elsewhere in the text (fewer than T characters later), so that windows and streams break at
    different places; where, follows from the seed and the epoch alone.
    """

    def __init__(self, ids: Tensor, batch: int, steps: int, seed: int) -> None:
        self.ids, self.batch, self.steps, self.seed = ids, batch, steps, seed
        self.windows_per_epoch = (len(ids) - steps) // (batch * steps)
        if self.windows_per_epoch < 1:
            needed = batch * steps + steps
            raise InvalidCorpus(
                f"the training text has {len(ids)} characters, too few for {batch} streams of {steps}: "
                f"at least {needed} are needed; lower the batch size or the sequence length",
                param="corpus",
            )

    def window(self, epoch: int, place: int) -> Tensor:
        """(T + 1, B) int64: the characters of window `place` of an epoch and, one row down, those that follow them."""
        length = self.windows_per_epoch * self.steps  # characters that a stream is stepped over; one more is a target
        begins = self._start(epoch) + torch.arange(self.batch) * length  # (B,)
        offsets = place * self.steps + torch.arange(self.steps + 1)  # (T + 1,)
        return self.ids[offsets[:, None] + begins]

    def _start(self, epoch: int) -> int:
        return int(torch.randint(self.steps, (1,), generator=generator(self.seed, "epoch", epoch)))

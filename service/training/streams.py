"""The training text as streams that are read side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import InvalidCorpus
from service.model.encoded_text import EncodedText
from service.training.hyperparameters import windows_per_epoch
from service.training.randomness import seeded_generator


@dataclass(frozen=True)
class Window:
    """T characters of each of B streams, and the character after each."""

    ids: Tensor  # (T + 1, B) int64: row t + 1 holds the targets of the inputs in row t
    resets: Tensor  # (T, B) bool: the state after this input becomes zero, because its target begins a text
    is_counted: Tensor  # (T, B) bool: the loss of this input's target counts


class Streams:
    """Texts one after the other, divided into B streams that are read side by side in windows of T characters.

    After the last character follows the first one, so the streams divide texts of any length, and each reads an
    unbroken part of them. Every epoch begins at another offset, so that streams and windows break at different places.

    The state of a stream becomes zero where a text begins, whose first character is then predicted from the zero state.
    It also becomes zero at random places, where nothing is predicted from it: this is what the model sees of a prompt
    that begins in the middle of a text. Offsets and places depend only on the seed and on the window's number.

    Raises InvalidCorpus for fewer than two characters.
    """

    def __init__(self, text: EncodedText, batch: int, steps: int, seed: int, restart_interval: int = 0) -> None:
        if len(text.ids) < 2:
            raise InvalidCorpus("the training text needs at least two characters: use a longer text", param="corpus")
        self.ids = torch.from_numpy(text.ids)  # (n,), of any integer dtype
        self.starts = torch.from_numpy(text.starts)  # (number of texts,) int64, ascending
        self.batch = batch  # B
        self.steps = steps  # T
        self.seed = seed
        self.restart_interval = restart_interval  # mean number of characters between two random places; 0 for none
        self.windows_per_epoch = windows_per_epoch(len(self.ids), batch, steps)

    def window(self, epoch: int, index: int) -> Window:
        """Return window `index` of an epoch."""
        num_chars = len(self.ids)
        begins = self._offset(epoch) + torch.arange(self.batch) * num_chars // self.batch  # (B,)
        rows = index * self.steps + torch.arange(self.steps + 1)  # (T + 1,)
        positions = (rows[:, None] + begins) % num_chars
        resets = are_starts(positions[1:], self.starts)
        restarts = self._restarts(epoch * self.windows_per_epoch + index) & ~resets
        if restarts.all():  # in a very small window: something must be predicted, or it has no loss
            restarts[-1, -1] = False
        return Window(self.ids[positions].long(), resets | restarts, ~restarts)

    def _offset(self, epoch: int) -> int:
        return int(torch.randint(len(self.ids), (1,), generator=seeded_generator(self.seed, "epoch", epoch)))

    def _restarts(self, number: int) -> Tensor:
        """Return the random places, (T, B) bool, of the window with this number, counted through all epochs."""
        if self.restart_interval == 0:
            return torch.zeros(self.steps, self.batch, dtype=torch.bool)
        draws = torch.rand(self.steps, self.batch, generator=seeded_generator(self.seed, "restarts", number))
        return draws < 1 / self.restart_interval


def are_starts(positions: Tensor, starts: Tensor) -> Tensor:
    """Return a bool tensor that says which positions, int64 of any shape, are in the ascending `starts`."""
    nearest = torch.searchsorted(starts, positions).clamp(max=len(starts) - 1)
    return starts[nearest] == positions

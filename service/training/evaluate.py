"""How well a model predicts a text: nats and bits a character, the state carried from zero through all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from service.errors import InvalidCorpus
from service.model.charset import Ids
from service.model.folded import FoldedGRU

_CHUNK = 2048  # characters between two reports of progress; bounds the memory


@dataclass(frozen=True)
class TextLoss:
    """Mean loss over the `num_scored` characters after the first; nothing predicts the first one of `num_chars`."""

    nats_per_char: float
    num_chars: int

    @property
    def num_scored(self) -> int:
        """All but the first."""
        return self.num_chars - 1

    @property
    def bits_per_char(self) -> float:
        """The same mean in bits."""
        return self.nats_per_char / math.log(2)


def text_loss(model: FoldedGRU, ids: Ids, progress: Callable[[int], object] = lambda _: None) -> TextLoss:
    """Loss of a text (n,) int64. `progress` gets the number of characters read since its last call.

    Raises InvalidCorpus for a text of fewer than two characters.
    """
    require_two(ids)
    text = torch.from_numpy(ids)
    hidden = model.initial_hidden()
    total = 0.0
    for start in range(0, len(text) - 1, _CHUNK):
        part = text[start : start + _CHUNK]
        targets = text[start + 1 : start + 1 + _CHUNK]
        part = part[: len(targets)]
        states, hidden = model.scan(part, hidden)
        losses = F.cross_entropy(model.logits(states), targets, reduction="none")
        total += float(losses.double().sum())
        progress(len(part))
    return TextLoss(total / (len(text) - 1), len(text))


def require_two(ids: Ids) -> None:
    """Raises InvalidCorpus for a text that has nothing to predict."""
    if len(ids) < 2:
        raise InvalidCorpus(
            f"a text of {len(ids)} known characters has nothing to predict: two are needed", param="corpus"
        )

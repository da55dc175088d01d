"""How well a model predicts a text in float32, the state carried from zero through all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from service.arrays import Ids
from service.model.folded import FoldedGRU
from service.training.loss import TextLoss, require_two

_CHUNK = 2048  # characters between two reports of progress; bounds the memory


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

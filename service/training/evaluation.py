"""Measures how well a model predicts a text: exactly, or quickly enough to do it during training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.training.corpus import TextLoss, require_two_chars
from service.training.network import WindowLoss
from service.training.streams import are_starts

_CHUNK = 2048  # characters between two progress reports; bounds the memory
_STREAMS = 64
_WARMUP = 256  # characters that a stream reads before its losses count, so that its state has forgotten its zero start
_STEPS = 128  # characters of each stream in one window


def text_loss(model: FoldedGRU, text: EncodedText, progress: Callable[[int], object] = lambda _: None) -> TextLoss:
    """Measure texts in float32, with the state carried from zero through each whole text.

    Calls `progress` with the number of characters scored since its last call. Raises InvalidCorpus if none is scored.
    """
    require_two_chars(text)
    total, reported, scored = 0.0, 0, 0
    for begin, end in text.spans():
        hidden = model.initial_hidden()
        states = hidden[-1:]  # (1, H), of the last layer after the character before the next target
        is_scored = text.scores_starts and begin > 0
        for start in range(begin, end, _CHUNK):
            chars = torch.from_numpy(text.ids[start : min(start + _CHUNK, end)].astype(np.int64))
            after, hidden = model.scan(chars, hidden)
            before = torch.cat((states, after[:-1]))  # (n, H), the states that predict `chars`
            states = after[-1:]
            first = 0 if is_scored or start > begin else 1
            losses = F.cross_entropy(model.logits(before[first:]), chars[first:], reduction="none")
            total += float(losses.double().sum())
            scored += len(losses)
            if scored - reported >= _CHUNK or end == len(text.ids):
                progress(scored - reported)
                reported = scored
    return TextLoss(total / scored, len(text.ids), scored)


def streamed_loss(
    window_loss: WindowLoss, text: EncodedText, progress: Callable[[int], object] = lambda _: None
) -> float:
    """Return the mean loss of texts in nats a character, without the first character of all.

    Up to 64 parts of the texts are read side by side. Each part is preceded by 256 characters that are read but not
    counted. This is fast, and within 0.0002 of `text_loss`, which carries the state through each whole text.

    Calls `progress` after each window with the number of characters scored in it. `progress` may raise: then the
    weights and the text are as before.
    """
    ids, starts = torch.from_numpy(text.ids), torch.from_numpy(text.starts)
    num_targets = len(ids) - 1
    batch = max(1, min(_STREAMS, num_targets // _WARMUP))
    length = -(-num_targets // batch)
    ends = torch.arange(1, batch + 1) * length  # (B,) index of each stream's last target
    positions = torch.arange(-_WARMUP - length, 1)[:, None] + ends  # (warm-up + length + 1, B) indices into the text
    is_counted = torch.zeros_like(positions, dtype=torch.bool)
    is_counted[_WARMUP + 1 :] = True
    is_counted &= (positions >= 1) & (positions <= num_targets)
    resets = are_starts(positions[1:], starts)
    if not text.scores_starts:
        is_counted[1:] &= ~resets
    padded = ids[positions.clamp(0, num_targets)].long()
    hidden = window_loss.model.initial_hidden(batch)
    total = 0.0
    num_counted = 0
    for start in range(0, len(padded) - 1, _STEPS):
        window = padded[start : start + _STEPS + 1]
        losses, hidden = window_loss(window, hidden, resets=resets[start : start + len(window) - 1])
        counted = is_counted[start + 1 : start + len(window)].reshape(-1)
        total += float(losses[counted].double().sum())
        num_window = int(counted.sum())
        num_counted += num_window
        progress(num_window)
        # The warm-up of the first streams reaches back before the text: their states stay zero until the text begins.
        is_before_text = positions[start + len(window) - 1] <= 0
        hidden[:, is_before_text] = 0
    return total / num_counted

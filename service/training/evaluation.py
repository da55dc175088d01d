"""Measures how well a model predicts a text: exactly, or quickly enough to do it during training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training.corpus import TextLoss, require_two_chars
from service.training.network import WindowLoss
from service.training.streams import are_starts

_CHUNK = 2048  # characters between two progress reports; bounds the memory
_STREAMS = 64
_WARMUP = 256  # characters that a stream reads before its losses count, so that its state has forgotten its zero start
_STEPS = 128  # characters of each stream in one window
_SHORT = 2048  # characters of a text that is short enough to be read twice at the beginning of a stream


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


def side_by_side_loss(
    model: GRUCharModel, text: EncodedText, progress: Callable[[int], object] = lambda _: None
) -> float | None:
    """Return the loss of many short texts in float32, or None if they are few or long.

    It is that of `text_loss`, up to the order of sums, but many times as fast: 64 texts are read at a time. Calls
    `progress` with the number of characters scored since its last call. Raises InvalidCorpus if none is scored.
    """
    require_two_chars(text)
    longest = int(text.lengths.max())
    if longest > _SHORT or len(text.starts) < _STREAMS:
        return None
    with torch.no_grad():
        return streamed_loss(WindowLoss(model, torch.float32), text, progress, longest)


def streamed_loss(
    window_loss: WindowLoss,
    text: EncodedText,
    progress: Callable[[int], object] = lambda _: None,
    warmup: int = _WARMUP,
) -> float:
    """Return the mean loss of texts in nats a character, without the first character of all.

    Up to 64 parts of the texts are read side by side. Each part is preceded by `warmup` characters that are read but
    not counted. This is fast, and within 0.0002 of `text_loss`, which carries the state through each whole text. It is
    equal if no text is longer than the warm-up, because then each is read from its beginning.

    Calls `progress` after each window with the number of characters scored in it. `progress` may raise: then the
    weights and the text are as before.
    """
    ids, starts = torch.from_numpy(text.ids), torch.from_numpy(text.starts)
    num_targets = len(ids) - 1
    batch = max(1, min(_STREAMS, num_targets // warmup))
    length = -(-num_targets // batch)
    begins = torch.arange(batch) * length - warmup  # (B,) index of the first character that each stream reads
    hidden = window_loss.model.initial_hidden(batch)
    total = 0.0
    num_counted = 0
    for start in range(0, warmup + length, _STEPS):
        rows = torch.arange(start, min(start + _STEPS, warmup + length) + 1)
        positions = rows[:, None] + begins  # (T + 1, B) indices into the text
        targets = positions[1:]
        is_counted = (rows[1:, None] > warmup) & (targets >= 1) & (targets <= num_targets)
        resets = are_starts(targets, starts)
        if not text.scores_starts:
            is_counted &= ~resets
        window = ids[positions.clamp(0, num_targets)].long()
        losses, hidden = window_loss(window, hidden, resets=resets)
        counted = is_counted.reshape(-1)
        total += float(losses[counted].double().sum())
        num_window = int(counted.sum())
        num_counted += num_window
        progress(num_window)
        # The warm-up of the first streams reaches back before the text: their states stay zero until the text begins.
        hidden[:, positions[-1] <= 0] = 0
    return total / num_counted

"""Short texts as the kernel reads them: all rows of a call in a few arrays, instead of objects for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from service.arrays import read_state
from service.engine.scores import Distribution
from service.engine.short_text import ReadText, ShortText
from service.model.config import ModelConfig


class PackedReading:
    """The GruRows of some short texts, and the memory that they point to. It serves one call of the kernel."""

    def __init__(self, texts: Sequence[ShortText], config: ModelConfig, dtype: np.dtype[Any]) -> None:
        self._texts, num_texts = texts, len(texts)
        shape, vocab_size = (config.num_layers, config.num_units), config.vocab_size
        # A join of bytes, because numpy would release the interpreter's lock for each copy: see `service.arrays`.
        joined = bytearray().join([text.hidden.data for text in texts])
        self._hidden = np.frombuffer(joined, np.float32).reshape(num_texts, *shape)
        lengths = np.array([len(text.ids) for text in texts], np.int64)
        self._ends = np.cumsum(lengths)
        starts = self._ends - lengths
        self._ids = np.concatenate([text.ids for text in texts]).astype(np.int64, copy=False)
        self._logprobs = np.empty(len(self._ids), np.float32)
        counts = np.array([len(text.checkpoints) for text in texts], np.int64)
        self._states = np.empty((counts.sum(), *shape), np.float32)
        self._positions = np.array([text.position + one for text in texts for one in text.checkpoints], np.int64)
        with_next = np.array([text.wants_next for text in texts])
        self._next_ids = np.empty((with_next.sum(), vocab_size), np.int32)
        self._next = np.empty(self._next_ids.shape, np.float32)
        self._rows = rows = np.zeros(num_texts, dtype)
        before = np.cumsum(counts) - counts
        place = np.cumsum(with_next) - with_next
        rows["position"] = [text.position for text in texts]
        rows["hidden"] = self._hidden.ctypes.data + self._hidden.strides[0] * np.arange(num_texts)
        rows["prompt"], rows["num_prompt"] = self._ids.ctypes.data + 8 * starts, lengths
        rows["temperature"] = rows["is_plain"] = 1
        rows["num_top"] = [0 if text.wants_scores else -1 for text in texts]
        rows["chosen"] = self._logprobs.ctypes.data + 4 * starts
        rows["num_checkpoints"] = counts
        rows["checkpoint_positions"] = self._positions.ctypes.data + 8 * before
        rows["checkpoints"] = self._states.ctypes.data + self._hidden.strides[0] * before
        rows["num_next"] = np.where(with_next, vocab_size, -1)
        rows["next_ids"] = self._next_ids.ctypes.data + 4 * vocab_size * place
        rows["next"] = self._next.ctypes.data + 4 * vocab_size * place
        self._addresses = (rows.ctypes.data + rows.itemsize * np.arange(num_texts)).astype(np.uintp)
        self.address = self._addresses.ctypes.data
        self.drawn = np.empty((num_texts, lengths.max()), np.int64)  # nothing is drawn

    def results(self) -> list[ReadText]:
        """Return what came of each text, in memory of its own, after the call."""
        results, start, state, place = [], 0, 0, 0
        for text, hidden, end in zip(self._texts, self._hidden, self._ends.tolist(), strict=True):
            states = {}
            for count in text.checkpoints:
                states[count] = read_state(self._states[state])
                state += 1
            following = None
            if text.wants_next:
                following = Distribution(self._next_ids[place].copy(), self._next[place].copy())
                place += 1
            logprobs = self._logprobs[start : end if text.wants_scores else start].copy()
            results.append(ReadText(logprobs, states, read_state(hidden), following))
            start = end
        return results

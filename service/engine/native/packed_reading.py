"""Short texts as the kernel reads them: all rows of a call in a few arrays, instead of objects for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import read_state
from service.engine.native.rows import address_of
from service.engine.scores import Distribution, Scores
from service.engine.short_text import ReadText, ShortText
from service.model.config import ModelConfig

_NO_SCORES = Scores.none()


class PackedReading:
    """The GruRows of some short texts, and the memory that they point to. It serves one call of the kernel."""

    def __init__(self, texts: Sequence[ShortText], config: ModelConfig, make_row: Any) -> None:
        """make_row: returns a GruRow of zeros."""
        self._texts, num_texts, size = texts, len(texts), config.vocab_size
        shape = config.num_layers, config.num_units
        # A join of bytes, because numpy would release the interpreter's lock for each copy: see `service.arrays`.
        states = bytearray().join([text.hidden.data for text in texts])
        self._hidden = np.frombuffer(states, np.float32).reshape(num_texts, *shape)
        lengths = [len(text.ids) for text in texts]
        starts, num_chars = _starts(lengths)
        self._ids = np.concatenate([text.ids for text in texts], dtype=np.int64)
        self._tops = [0 if text.num_logprobs is None else min(text.num_logprobs, size) for text in texts]
        top_starts, num_top = _starts([length * top for length, top in zip(lengths, self._tops, strict=True)])
        self._chosen = np.empty(num_chars, np.float32)
        self._top_ids, self._top = np.empty(num_top, np.int32), np.empty(num_top, np.float32)
        counts = [len(text.checkpoints) for text in texts]
        state_starts, num_states = _starts(counts)
        self._states = np.empty((num_states, *shape), np.float32)
        self._positions = np.array([text.position + one for text in texts for one in text.checkpoints], np.int64)
        next_starts, num_next = _starts([int(text.wants_next) for text in texts])
        self._next_ids, self._next = np.empty((num_next, size), np.int32), np.empty((num_next, size), np.float32)

        self._rows = rows = np.zeros(num_texts, make_row.dtype)
        state_bytes = self._hidden.strides[0]
        rows["position"] = [text.position for text in texts]
        rows["hidden"] = address_of(self._hidden) + state_bytes * np.arange(num_texts)
        rows["num_prompt"], rows["prompt"] = lengths, address_of(self._ids) + 8 * starts
        rows["temperature"] = rows["is_plain"] = 1
        rows["num_top"] = [
            -1 if text.num_logprobs is None else top for text, top in zip(texts, self._tops, strict=True)
        ]
        rows["chosen"] = address_of(self._chosen) + 4 * starts
        rows["top_ids"] = address_of(self._top_ids) + 4 * top_starts
        rows["top"] = address_of(self._top) + 4 * top_starts
        rows["num_checkpoints"] = counts
        rows["checkpoint_positions"] = address_of(self._positions) + 8 * state_starts
        rows["checkpoints"] = address_of(self._states) + state_bytes * state_starts
        rows["num_next"] = [size if text.wants_next else -1 for text in texts]
        rows["next_ids"] = address_of(self._next_ids) + 4 * size * next_starts
        rows["next"] = address_of(self._next) + 4 * size * next_starts
        self._addresses = (rows.ctypes.data + rows.itemsize * np.arange(num_texts)).astype(np.uintp)
        self.address = address_of(self._addresses)
        self.drawn = np.empty((num_texts, max(lengths)), np.int64)  # nothing is drawn

    def results(self) -> list[ReadText]:
        """Return what came of each text, in memory of its own, after the call."""
        results, start, top_start, state, place = list[ReadText](), 0, 0, 0, 0
        for text, num_top, hidden in zip(self._texts, self._tops, self._hidden, strict=True):
            scores, end = _NO_SCORES, start + len(text.ids)
            if text.num_logprobs is not None:
                top_end, shape = top_start + len(text.ids) * num_top, (len(text.ids), num_top)
                scores = Scores(
                    self._chosen[start:end].copy(),
                    self._top_ids[top_start:top_end].reshape(shape).copy(),
                    self._top[top_start:top_end].reshape(shape).copy(),
                )
                top_start = top_end
            start = end
            states = {}
            for count in text.checkpoints:
                states[count] = read_state(self._states[state])
                state += 1
            following = None
            if text.wants_next:
                following = Distribution(self._next_ids[place].copy(), self._next[place].copy())
                place += 1
            results.append(ReadText(scores, states, read_state(hidden), following))
        return results


def _starts(lengths: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """Return (n,) where each of n > 0 parts begins, and where the last one ends."""
    ends = np.cumsum(np.array(lengths, np.int64))
    return ends - lengths, int(ends[-1])

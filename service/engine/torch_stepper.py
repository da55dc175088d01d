"""The stepper on torch and numpy: torch multiplies integers, numpy does the rest element by element.

numpy rather than torch, because an operation on 1,024 numbers costs it half as much, and because both give the same
bits for +, -, * and /.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from service.engine.arithmetic import exp, log
from service.engine.gates import MAX_ROWS, Gates, Linear
from service.engine.sampling import draw_one, draw_plain, uniforms
from service.engine.stepper import Advance, Float32, Float64, Ids, Row, Scores
from service.model.quantize import STATE_SCALE, QuantizedGRU

_SCALE = np.array(STATE_SCALE, np.float32)


class TorchStepper:
    """Implements `Stepper` for a quantised model."""

    def __init__(self, model: QuantizedGRU) -> None:
        self.config = model.config
        self._table = model.table
        self._layers = [
            (Linear(layer.recurrent), None if layer.inputs is None else Linear(layer.inputs)) for layer in model.layers
        ]
        self._dense = Linear(model.dense)
        self._gates = Gates(self.config.num_units)

    def initial_hidden(self) -> Float32:
        """See Stepper."""
        return np.zeros((self.config.num_layers, self.config.num_units), np.float32)

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[Advance]:
        """See Stepper."""
        got: dict[Row, _Collected] = {row: _Collected() for row in rows}
        left = dict.fromkeys(rows, num_chars)
        for row in rows:
            _finish_if_done(row)
        while active := [row for row in rows if row.finished is None and left[row] > 0]:
            num_steps = min(min(left[row], _until_change(row)) for row in active)
            num_steps = self._run(active, num_steps, got)
            for row in active:
                left[row] -= num_steps
        return [got[row].advance() for row in rows]

    def _run(self, rows: list[Row], num_steps: int, got: dict[Row, _Collected]) -> int:
        """Advance rows, none of which changes between reading and generating on the way. How many steps were done:
        fewer if a stop string was completed.
        """
        # Those that generate first, then those that read and score: what needs logits is one slice at the start.
        reading = [row for row in rows if row.is_reading]
        if reading:
            drawing = [row for row in rows if not row.is_reading]
            scored = [row for row in reading if row.scores]
            rows = [*drawing, *scored, *(row for row in reading if not row.scores)]
            num_drawing, num_logits = len(drawing), len(drawing) + len(scored)
        else:
            num_drawing = num_logits = len(rows)
        batch = _Batch(rows, num_steps, num_drawing)
        scoring = np.array([i for i, row in enumerate(rows[:num_logits]) if row.num_logprobs is not None], np.int64)
        logits_seen = np.empty((num_steps, len(scoring), self.config.vocab_size), np.float32)
        watched = [(i, row) for i, row in enumerate(rows[:num_drawing]) if row.stops or row.history is not None]

        done = num_steps
        for t in range(num_steps):
            chars = batch.chars[t]  # (B,)
            if num_logits:
                logits = self._dense(batch.rounded[-1][:num_logits])  # (K, V)
                if num_drawing:
                    batch.draw(logits, t)
                if len(scoring):
                    logits_seen[t] = logits[scoring]
            self._step(batch, chars)
            stopped = [_notice(row, int(chars[i])) for i, row in watched]
            if any(stopped):
                done = t + 1
                break
        batch.store(done, got)
        if len(scoring):
            for k, i in enumerate(scoring):
                got[rows[i]].score(rows[i], i >= num_drawing, logits_seen[:done, k], batch.chars[:done, i])
        return done

    def _step(self, batch: _Batch, chars: Ids) -> None:
        """One character for every row: each layer's (B, H) state becomes the state after it."""
        for index, (recurrent, inputs) in enumerate(self._layers):
            products = recurrent.product(batch.rounded[index])  # (B, 3H) int32
            if inputs is None:
                np.take(self._table, chars, axis=0, out=batch.inputs, mode="clip")  # (B, 3H)
                added = batch.inputs
            else:
                added = inputs(batch.rounded[index - 1])
            for start in range(0, len(chars), MAX_ROWS):
                rows = slice(start, start + MAX_ROWS)
                self._gates.advance(products[rows], added[rows], recurrent, batch.hidden[index][rows])
            batch.round(index)


class _Batch:
    """The rows of one run side by side: states, and the characters that go in.

    hidden: per layer (B, H) float32. rounded: per layer (B, H) int8, round(127 h). chars: (T, B) int64.
    """

    def __init__(self, rows: list[Row], num_steps: int, num_drawing: int) -> None:
        self.rows, self.num_drawing = rows, num_drawing
        num_layers, units = rows[0].hidden.shape
        self.hidden = [np.stack([row.hidden[layer] for row in rows]) for layer in range(num_layers)]
        self.rounded = [torch.empty((len(rows), units), dtype=torch.int8) for _ in self.hidden]
        self._rounding = np.empty((len(rows), units), np.float32)
        self._rounding_tensor = torch.from_numpy(self._rounding)
        for layer in range(num_layers):
            self.round(layer)
        self.inputs = np.empty((len(rows), 3 * units), np.float32)
        self.chars = np.empty((num_steps, len(rows)), np.int64)
        for i, row in enumerate(rows[num_drawing:], num_drawing):
            self.chars[:, i] = row.prompt[row.num_read : row.num_read + num_steps]
        drawing = rows[:num_drawing]
        seeds = np.array([[row.seed & (2**64 - 1)] for row in drawing], np.uint64).reshape(-1, 1)
        starts = np.array([[row.position] for row in drawing], np.uint64).reshape(-1, 1)
        steps: NDArray[np.uint64] = np.arange(num_steps, dtype=np.uint64)
        self._uniforms: Float64 = uniforms(seeds, starts + steps)  # (G, T)
        plain = [i for i, row in enumerate(drawing) if row.sampling.is_plain]
        self._special = [i for i, row in enumerate(drawing) if not row.sampling.is_plain]
        self._plain: slice | NDArray[np.int64] = np.array(plain, np.int64) if self._special else slice(0, num_drawing)
        self._num_plain = len(plain)
        self._temperatures = np.array([[drawing[i].sampling.temperature] for i in plain], np.float64)

    def round(self, layer: int) -> None:
        """Bring `rounded` up to date. Ties go to even numbers."""
        np.multiply(self.hidden[layer], _SCALE, self._rounding)
        np.rint(self._rounding, self._rounding)
        self.rounded[layer].copy_(self._rounding_tensor)

    def draw(self, logits: Float32, step: int) -> None:
        """Choose the characters of this step for the rows that generate, from (>= G, V) logits."""
        chars = self.chars[step]
        if self._num_plain:
            drawn = draw_plain(logits[self._plain], self._temperatures, self._uniforms[self._plain, step, None])
            chars[self._plain] = drawn
        for i in self._special:
            row = self.rows[i]
            chars[i] = draw_one(logits[i], row.sampling, float(self._uniforms[i, step]), row.history)

    def store(self, num_steps: int, got: dict[Row, _Collected]) -> None:
        """Write states and counts back to the rows after that many steps."""
        chars = self.chars[:num_steps].T.copy()  # (B, T)
        for i, row in enumerate(self.rows):
            for layer, hidden in enumerate(self.hidden):
                row.hidden[layer] = hidden[i]
            row.position += num_steps
            if i < self.num_drawing:
                row.num_generated += num_steps
                got[row].chars.append(chars[i])
            else:
                row.num_read += num_steps
                if not row.is_reading and row.prompt_hidden is not None:
                    row.prompt_hidden[:] = row.hidden
            _finish_if_done(row)


class _Collected:
    """What a row got in one call, run after run."""

    def __init__(self) -> None:
        self.chars: list[Ids] = []
        self.scores: list[Scores] = []
        self.prompt_scores: list[Scores] = []

    def score(self, row: Row, is_prompt: bool, logits: Float32, chars: Ids) -> None:
        scores = score(logits, chars, row.num_logprobs or 0)
        (self.prompt_scores if is_prompt else self.scores).append(scores)

    def advance(self) -> Advance:
        if len(self.chars) == 1 and not self.scores and not self.prompt_scores:
            return Advance(self.chars[0])
        return Advance(
            np.concatenate(self.chars) if self.chars else np.empty(0, np.int64),
            Scores.join(self.scores) if self.scores else None,
            Scores.join(self.prompt_scores) if self.prompt_scores else None,
        )


def score(logits: Float32, chars: Ids, num_top: int) -> Scores:
    """(m, V) logits before each of (m,) characters -> their log-probabilities, and those of the likeliest."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    # Summed in the order of ids: numpy's sum would choose an order of its own.
    total = np.cumsum(exp(shifted), axis=1)[:, -1:]
    logprobs = shifted - log(total)
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
    chosen = np.take_along_axis(logprobs, chars[:, None], axis=1)[:, 0]
    return Scores(chosen, top_ids, np.take_along_axis(logprobs, top_ids, axis=1))


def _until_change(row: Row) -> int:
    """Steps until the row changes from reading to generating, or ends by its length."""
    return len(row.prompt) - row.num_read if row.is_reading else row.max_chars - row.num_generated


def _finish_if_done(row: Row) -> None:
    if row.finished is None and not row.is_reading and row.num_generated >= row.max_chars:
        row.finished = "length"


def _notice(row: Row, char: int) -> bool:
    """Take a generated character into history and tail; whether it completes a stop string."""
    if row.history is not None:
        row.history.add(char)
    if not row.stops:
        return False
    row.tail.append(char)
    del row.tail[: -max(len(stop) for stop in row.stops)]
    if any(row.tail[-len(stop) :] == stop.tolist() for stop in row.stops):
        row.finished = "stop"
        return True
    return False

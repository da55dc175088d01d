"""The stepper on torch and numpy: torch multiplies integers, numpy does the rest, element by element.

numpy rather than torch, because an operation on 1,024 numbers costs it half as much, and because both give the same
bits for +, -, * and /.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.arrays import Float32, Float64, Ids
from service.engine.gates import Gates, gate_scales
from service.engine.integer_product import IntegerProduct
from service.engine.next_character import NextCharacter
from service.engine.sampling import draw_one, draw_plain, uniforms
from service.engine.scores import score
from service.engine.stepper import Row, StepResult
from service.model.quantize import STATE_SCALE, QuantizedGRU, QuantizedLinear

_SCALE = np.array(STATE_SCALE, np.float32)
_NOTHING = np.empty(0, np.int64)


class TorchStepper:
    """Implements `Stepper` for a quantised model."""

    def __init__(self, model: QuantizedGRU) -> None:
        self.config = model.config
        units = self.config.num_units
        self._table = model.table * gate_scales(units)
        self._gates = [Gates(layer.recurrent) for layer in model.layers]
        self._inputs = [None if layer.inputs is None else _Inputs(layer.inputs) for layer in model.layers]
        # The state that the last layer's recurrent weights are multiplied with is the one that the dense ones are
        # multiplied with to draw the character between the two: one product gives both.
        weights = [layer.recurrent.weight for layer in model.layers]
        weights[-1] = np.concatenate([weights[-1], model.dense.weight])
        self._products = [IntegerProduct(weight) for weight in weights]
        self._dense = model.dense
        self._next = NextCharacter(model.dense)
        self._scratch = _Scratch(1, units, [len(weight) for weight in weights])

    def initial_hidden(self) -> Float32:
        """See Stepper."""
        return np.zeros((self.config.num_layers, self.config.num_units), np.float32)

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        """See Stepper."""
        got: dict[Row, list[StepResult]] = {row: [] for row in rows}
        left = dict.fromkeys(rows, num_chars)
        for row in rows:
            _finish_if_done(row)
        while active := [row for row in rows if row.finished is None and left[row] > 0]:
            num_steps = min(min(left[row], _until_change(row)) for row in active)
            num_steps = self._run(active, num_steps, got)
            for row in active:
                left[row] -= num_steps
        self._next.fill(rows)
        return [StepResult.join(got[row]) for row in rows]

    def _run(self, rows: list[Row], num_steps: int, got: dict[Row, list[StepResult]]) -> int:
        """StepResult rows, none of which changes between reading and generating on the way. How many steps were done:
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
        scratch = self._scratch_for(len(rows))
        outs = [tensor[: len(rows)] for tensor in scratch.product_tensors]
        products = [array[: len(rows)] for array in scratch.products]  # the same memory
        batch = _Batch(rows, num_steps, num_drawing, scratch)
        scoring = np.array([i for i, row in enumerate(rows[:num_logits]) if row.num_logprobs is not None], np.int64)
        logits_seen = np.empty((num_steps, len(scoring), self.config.vocab_size), np.float32)
        watched = [(i, row) for i, row in enumerate(rows[:num_drawing]) if row.stops or row.history is not None]

        done = num_steps
        for t in range(num_steps):
            for product, rounded, out in zip(self._products, batch.rounded_tensors, outs, strict=True):
                product(rounded, out)
            if num_logits:
                logits = self._logits(products[-1][:num_logits])  # (K, V)
                if num_drawing:
                    batch.draw(logits, t)
                if len(scoring):
                    logits_seen[t] = logits[scoring]
            chars = batch.chars[t]  # (B,)
            self._step(batch, products, chars)
            batch.keep(t)
            stopped = [_notice(row, int(chars[i])) for i, row in watched]
            if any(stopped):
                done = t + 1
                break
        batch.store(done)
        chars_of = batch.chars[:done].T.copy()  # (B, T)
        scores = {int(i): score(logits_seen[:done, k], chars_of[i], rows[i].num_logprobs or 0)
                  for k, i in enumerate(scoring)}  # fmt: skip
        for i, row in enumerate(rows):
            if i < num_drawing:
                got[row].append(StepResult(chars_of[i], scores=scores.get(i)))
            elif i in scores:
                got[row].append(StepResult(_NOTHING, prompt_scores=scores[i]))
        return done

    def _scratch_for(self, num_rows: int) -> _Scratch:
        if num_rows > self._scratch.num_rows:
            widths = [products.shape[1] for products in self._scratch.products]
            self._scratch = _Scratch(2 ** (num_rows - 1).bit_length(), self.config.num_units, widths)
        return self._scratch

    def _logits(self, products: NDArray[np.int32]) -> Float32:
        """(K, 3H + V) products of the last layer -> (K, V) logits of the character after its state."""
        logits = products[:, 3 * self.config.num_units :].astype(np.float32)
        np.multiply(logits, self._dense.scale, logits)
        np.add(logits, self._dense.bias, logits)
        return logits

    def _step(self, batch: _Batch, products: list[NDArray[np.int32]], chars: Ids) -> None:
        """One character for every row: each layer's (B, H) state becomes the state after it."""
        np.take(self._table, chars, axis=0, out=batch.inputs, mode="clip")  # (B, 3H)
        for index, (gates, inputs) in enumerate(zip(self._gates, self._inputs, strict=True)):
            added = batch.inputs if inputs is None else inputs(batch.rounded_tensors[index - 1])
            gates.advance(products[index], added, batch.hidden[index])
            batch.round(index)


class _Inputs:
    """What the state of the layer below adds to the gates of a layer, times their scales: (B, H) int8 -> (B, 3H)."""

    def __init__(self, linear: QuantizedLinear) -> None:
        scales = gate_scales(linear.weight.shape[1])
        self._product = IntegerProduct(linear.weight)
        self._scale, self._bias = linear.scale * scales, linear.bias * scales

    def __call__(self, below: Tensor) -> Float32:
        added: Float32 = self._product(below).to(torch.float32).numpy()
        np.multiply(added, self._scale, added)
        np.add(added, self._bias, added)
        return added


class _Batch:
    """The rows of one run side by side: states, and the characters that go in.

    hidden: per layer (B, H) float32. rounded_tensors: per layer (B, H) int8, round(127 h). chars: (T, B) int64.
    """

    def __init__(self, rows: list[Row], num_steps: int, num_drawing: int, scratch: _Scratch) -> None:
        self.rows, self.num_drawing = rows, num_drawing
        b = len(rows)
        states = np.concatenate([row.hidden for row in rows]).reshape(b, *rows[0].hidden.shape)  # (B, L, H)
        self.hidden = [np.ascontiguousarray(states[:, layer]) for layer in range(states.shape[1])]
        self.rounded_tensors = [tensor[:b] for tensor in scratch.rounded_tensors]
        self._rounded = [array[:b] for array in scratch.rounded]  # the same memory
        self._rounding = scratch.rounding[:b]
        for layer in range(len(self.hidden)):
            self.round(layer)
        self.inputs = scratch.inputs[:b]
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
        temperatures = np.array([[drawing[i].sampling.temperature] for i in plain], np.float64)
        self._temperatures = temperatures if (temperatures != 1).any() else None
        self._keep: dict[int, list[int]] = {}  # step -> rows whose state after it is wanted
        for i, row in enumerate(rows):
            for position in row.checkpoint_positions[len(row.checkpoints) :]:
                if position > row.position + num_steps:
                    break
                self._keep.setdefault(position - row.position - 1, []).append(i)

    def round(self, layer: int) -> None:
        """Bring `rounded_tensors` up to date. Ties go to even numbers."""
        np.multiply(self.hidden[layer], _SCALE, self._rounding)
        np.rint(self._rounding, self._rounding)
        np.copyto(self._rounded[layer], self._rounding, casting="unsafe")

    def draw(self, logits: Float32, step: int) -> None:
        """Choose the characters of this step for the rows that generate, from (>= G, V) logits."""
        chars = self.chars[step]
        if self._num_plain:
            drawn = draw_plain(logits[self._plain], self._temperatures, self._uniforms[self._plain, step, None])
            chars[self._plain] = drawn
        for i in self._special:
            row = self.rows[i]
            chars[i] = draw_one(logits[i], row.sampling, float(self._uniforms[i, step]), row.history)

    def keep(self, step: int) -> None:
        """Keep copies of the states that are wanted after this step."""
        for i in self._keep.get(step, ()):
            self.rows[i].checkpoints.append(np.stack([hidden[i] for hidden in self.hidden]))

    def store(self, num_steps: int) -> None:
        """Write states and counts back to the rows after that many steps."""
        for row, state in zip(self.rows, np.stack(self.hidden, axis=1), strict=True):  # (L, H) each
            row.hidden[...] = state
            row.position += num_steps
        for row in self.rows[: self.num_drawing]:
            row.num_generated += num_steps
            _finish_if_done(row)
        for row in self.rows[self.num_drawing :]:
            row.num_read += num_steps
            _finish_if_done(row)


class _Scratch:
    """Memory that every run needs, kept: the system takes as long to hand out fresh memory as a step takes to use it.

    inputs (N, 3H) float32, rounding (N, H) float32; per layer: products (N, 3H or 3H + V) int32, rounded (N, H) int8,
    both also as tensors over the same memory.
    """

    def __init__(self, num_rows: int, units: int, product_widths: Sequence[int]) -> None:
        self.num_rows = num_rows
        self.inputs = np.empty((num_rows, 3 * units), np.float32)
        self.rounding = np.empty((num_rows, units), np.float32)
        self.products = [np.empty((num_rows, width), np.int32) for width in product_widths]
        self.product_tensors = [torch.from_numpy(array) for array in self.products]
        self.rounded = [np.empty((num_rows, units), np.int8) for _ in product_widths]
        self.rounded_tensors = [torch.from_numpy(array) for array in self.rounded]


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

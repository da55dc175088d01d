"""The stepper with torch and numpy: torch multiplies integers, numpy does everything else, element by element.

numpy takes half as long as torch for an operation on 1,024 numbers. Both give the same bits for +, -, * and /.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.arrays import Float32, Float64, Ids
from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.gates import Gates, gate_scales
from service.engine.integer_product import IntegerProduct
from service.engine.sampling import draw_one, draw_plain, uniforms
from service.engine.scores import Distribution, Scores, score, score_among
from service.engine.stepper import InvalidRows, Row, StepResult, Steps
from service.model.quantize import STATE_SCALE, QuantizedGRU, QuantizedLinear

_SCALE = np.array(STATE_SCALE, np.float32)
_NOTHING = np.empty(0, np.int64)
_DENSE_ROWS = 1024  # of the dense weights that are converted to int32 at a time: limits the memory


class TorchStepper:
    """Implements `Stepper` for a quantised model."""

    def __init__(self, model: QuantizedGRU) -> None:
        self.config = model.config
        units = self.config.num_units
        self._table = model.table * gate_scales(units)
        self._gates = [Gates(layer.recurrent) for layer in model.layers]
        self._inputs = [None if layer.inputs is None else _Inputs(layer.inputs) for layer in model.layers]
        # A character is drawn from dense weights times the last layer's state; then the step multiplies that state with
        # the last layer's recurrent weights. One product of the concatenated weights gives both.
        weights = [layer.recurrent.weight for layer in model.layers]
        weights[-1] = np.concatenate([weights[-1], model.dense.weight])
        self._products = [IntegerProduct(weight) for weight in weights]
        self._dense = model.dense
        self._scratch = _Scratch(1, units, [len(weight) for weight in weights])

    def initial_hidden(self) -> Float32:
        """See Stepper."""
        return np.zeros((self.config.num_layers, self.config.num_units), np.float32)

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        """See Stepper."""
        shape = (self.config.num_layers, self.config.num_units)
        # Those at their start, and at their first draw: another row may have read their prompt.
        new = [row for row in rows if row.finished is None and not row.num_generated]
        new = [row for row in new if not (row.num_read and row.is_reading)]
        if invalid := InvalidRows.among(new, lambda row: row.check(shape, self.config.vocab_size)):
            raise invalid
        num_read, running = sum(row.num_read for row in rows), [row.finished is None for row in rows]
        results: dict[Row, list[StepResult]] = {row: [] for row in rows}
        left = dict.fromkeys(rows, num_chars)
        for row in rows:
            _finish_if_done(row)
        while active := [row for row in rows if row.finished is None and left[row] > 0]:
            num_steps = min(min(left[row], _until_change(row)) for row in active)
            num_steps = self._run(active, num_steps, results)
            for row in active:
                left[row] -= num_steps
        _report_next(self._dense, rows)
        num_read = sum(row.num_read for row in rows) - num_read
        finished = [i for i, row in enumerate(rows) if running[i] and row.finished is not None]
        return Steps.of([StepResult.join(results[row]) for row in rows], finished, num_read)

    def _run(self, rows: list[Row], num_steps: int, results: dict[Row, list[StepResult]]) -> int:
        """Advance rows by num_steps, in which none may change from reading to generating. Append to their results.

        Returns the number of steps done, which is smaller if an automaton has ended a text.
        """
        # First rows that generate, then rows that read and score, then the others: rows that need logits are one slice.
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
        scoring = np.array(
            [i for i, row in enumerate(rows[:num_logits]) if row.request.num_logprobs is not None], np.int64
        )
        scored_logits = np.empty((num_steps, len(scoring), self.config.vocab_size), np.float32)
        counted = [(i, row.history) for i, row in enumerate(rows[:num_drawing]) if row.history is not None]

        done = num_steps
        for t in range(num_steps):
            for product, rounded, out in zip(self._products, batch.rounded_tensors, outs, strict=True):
                product(rounded, out)
            if num_logits:
                logits = self._logits(products[-1][:num_logits])  # (K, V)
                if num_drawing:
                    batch.draw(logits, t)
                if len(scoring):
                    scored_logits[t] = logits[scoring]
            chars = batch.chars[t]  # (B,)
            self._step(batch, products, chars)
            batch.store_checkpoints(t)
            for i, history in counted:
                history.add(int(chars[i]))
            if batch.follow(t):
                done = t + 1
                break
        batch.store(done)
        chars_of = batch.chars[:done].T.copy()  # (B, T)
        scores = {int(i): score(scored_logits[:done, k], chars_of[i], rows[i].request.num_logprobs or 0)
                  for k, i in enumerate(scoring)}  # fmt: skip
        for i, row in enumerate(rows):
            if i < num_drawing:
                results[row].append(
                    StepResult(chars_of[i], batch.scores_of(i, scores.get(i), done), None, row.num_withheld)
                )
            elif i in scores:
                results[row].append(StepResult(_NOTHING, None, scores[i], row.num_withheld))
        return done

    def _scratch_for(self, num_rows: int) -> _Scratch:
        if num_rows > self._scratch.num_rows:
            widths = [products.shape[1] for products in self._scratch.products]
            self._scratch = _Scratch(2 ** (num_rows - 1).bit_length(), self.config.num_units, widths)
        return self._scratch

    def _logits(self, products: NDArray[np.int32]) -> Float32:
        """Return (K, V) logits of the next character, from the (K, 3H + V) products of the last layer."""
        logits = products[:, 3 * self.config.num_units :].astype(np.float32)
        np.multiply(logits, self._dense.scale, logits)
        np.add(logits, self._dense.bias, logits)
        return logits

    def _step(self, batch: _Batch, products: list[NDArray[np.int32]], chars: Ids) -> None:
        """Consume one character in every row: replace each layer's (B, H) states by the states after it."""
        np.take(self._table, chars, axis=0, out=batch.inputs, mode="clip")  # (B, 3H)
        for index, (gates, inputs) in enumerate(zip(self._gates, self._inputs, strict=True)):
            input_gates = batch.inputs if inputs is None else inputs(batch.rounded_tensors[index - 1])
            gates.advance(products[index], input_gates, batch.hidden[index])
            batch.round(index)


class _Inputs:
    """Computes the input gates of a layer above the first, times `gate_scales`: (B, H) int8 -> (B, 3H) float32."""

    def __init__(self, linear: QuantizedLinear) -> None:
        scales = gate_scales(linear.weight.shape[1])
        self._product = IntegerProduct(linear.weight)
        self._scale, self._bias = linear.scale * scales, linear.bias * scales

    def __call__(self, below: Tensor) -> Float32:
        input_gates: Float32 = self._product(below).to(torch.float32).numpy()
        np.multiply(input_gates, self._scale, input_gates)
        np.add(input_gates, self._bias, input_gates)
        return input_gates


class _Batch:
    """The states of the rows in one call of `_run`, and the characters that they consume."""

    def __init__(self, rows: list[Row], num_steps: int, num_drawing: int, scratch: _Scratch) -> None:
        self.rows, self.num_drawing = rows, num_drawing
        b = len(rows)
        states = np.concatenate([row.hidden for row in rows]).reshape(b, *rows[0].hidden.shape)  # (B, L, H)
        # For each layer (B, H) float32, and (B, H) int8 of round(127 h).
        self.hidden = [np.ascontiguousarray(states[:, layer]) for layer in range(states.shape[1])]
        self.rounded_tensors = [tensor[:b] for tensor in scratch.rounded_tensors]
        self._rounded = [array[:b] for array in scratch.rounded]  # the same memory
        self._rounding = scratch.rounding[:b]
        for layer in range(len(self.hidden)):
            self.round(layer)
        self.inputs = scratch.inputs[:b]
        self.chars = np.empty((num_steps, len(rows)), np.int64)  # (T, B)
        for i, row in enumerate(rows[num_drawing:], num_drawing):
            self.chars[:, i] = row.request.prompt[row.num_read : row.num_read + num_steps]
        drawing = rows[:num_drawing]
        seeds = np.array([[row.request.seed & (2**64 - 1)] for row in drawing], np.uint64).reshape(-1, 1)
        starts = np.array([[row.position] for row in drawing], np.uint64).reshape(-1, 1)
        steps: NDArray[np.uint64] = np.arange(num_steps, dtype=np.uint64)
        self._uniforms: Float64 = uniforms(seeds, starts + steps)  # (G, T)
        self._walks = _walks(drawing)
        masked = {i for walk in self._walks if walk.automaton.restricts for i in walk.indices.tolist()}
        self._among_allowed = {
            i: np.empty(num_steps, np.float32) for i in masked if drawing[i].request.num_logprobs is not None
        }
        is_plain = [row.request.sampling.is_plain for row in drawing]
        self._special = [i for i in range(num_drawing) if not is_plain[i] and i not in masked]
        plain = [i for i in range(num_drawing) if is_plain[i] and i not in masked]
        is_all = len(plain) == num_drawing
        self._plain: slice | NDArray[np.int64] = slice(0, num_drawing) if is_all else np.array(plain, np.int64)
        self._num_plain = len(plain)
        self._temperatures = _temperatures(drawing[i] for i in plain)
        self._checkpoints: dict[int, list[int]] = {}  # step -> indices of the rows whose state after it is copied
        for i, row in enumerate(rows):
            for position in row.request.checkpoint_positions[len(row.checkpoints) :]:
                if position > row.position + num_steps:
                    break
                self._checkpoints.setdefault(position - row.position - 1, []).append(i)

    def round(self, layer: int) -> None:
        """Update `rounded_tensors` from `hidden`. Rounds ties to even numbers."""
        np.multiply(self.hidden[layer], _SCALE, self._rounding)
        np.rint(self._rounding, self._rounding)
        np.copyto(self._rounded[layer], self._rounding, casting="unsafe")

    def draw(self, logits: Float32, step: int) -> None:
        """Draw the characters of this step for the G rows that generate, from (>= G, V) logits."""
        chars = self.chars[step]
        if self._num_plain:
            drawn = draw_plain(logits[self._plain], self._temperatures, self._uniforms[self._plain, step, None])
            chars[self._plain] = drawn
        for i in self._special:
            row = self.rows[i]
            chars[i] = draw_one(logits[i], row.request.sampling, float(self._uniforms[i, step]), row.history)
        for walk in self._walks:
            if walk.automaton.restricts:
                self._draw_allowed(walk, logits, step)

    def _draw_allowed(self, walk: _Walk, logits: Float32, step: int) -> None:
        """Draw for rows with an automaton that restricts them."""
        chars, mask = self.chars[step], walk.mask()
        if len(walk.plain):
            indices = walk.indices[walk.plain]
            chars[indices] = draw_plain(
                logits[indices], walk.temperatures, self._uniforms[indices, step, None], mask[walk.plain]
            )
        for place in walk.special:
            row, i = walk.rows[place], int(walk.indices[place])
            uniform = float(self._uniforms[i, step])
            chars[i] = draw_one(logits[i], row.request.sampling, uniform, row.history, mask[place])
        for place, i in enumerate(walk.indices.tolist()):
            if i in self._among_allowed:
                self._among_allowed[i][step] = score_among(logits[i], int(chars[i]), mask[place])

    def follow(self, step: int) -> bool:
        """Follow the automata with the characters of a step. Return whether that has ended a text."""
        ended = [walk.follow(self.chars[step], step) for walk in self._walks]
        return any(ended)

    def scores_of(self, i: int, scores: Scores | None, num_steps: int) -> Scores | None:
        """Return the scores of a row's drawn characters, with those among the allowed ones."""
        among = self._among_allowed.get(i)
        return scores if scores is None or among is None else replace(scores, allowed=among[:num_steps].copy())

    def store_checkpoints(self, step: int) -> None:
        """Copy the states of rows that have a checkpoint after this step."""
        for i in self._checkpoints.get(step, ()):
            self.rows[i].checkpoints.append(np.stack([hidden[i] for hidden in self.hidden]))

    def store(self, num_steps: int) -> None:
        """Update the rows after num_steps steps."""
        for row, state in zip(self.rows, np.stack(self.hidden, axis=1), strict=True):  # (L, H) each
            row.hidden[...] = state
            row.progress.position += num_steps
        for row in self.rows[: self.num_drawing]:
            row.progress.num_generated += num_steps
            _finish_if_done(row)
        for row in self.rows[self.num_drawing :]:
            row.progress.num_read += num_steps
            _finish_if_done(row)


class _Scratch:
    """Memory that every call of `_run` reuses: allocating it would take as long as using it in a step."""

    def __init__(self, num_rows: int, units: int, product_widths: Sequence[int]) -> None:
        self.num_rows = num_rows
        self.inputs = np.empty((num_rows, 3 * units), np.float32)
        self.rounding = np.empty((num_rows, units), np.float32)
        # For each layer (N, 3H) int32, (N, 3H + V) in the last, and (N, H) int8. The tensors share their memory.
        self.products = [np.empty((num_rows, width), np.int32) for width in product_widths]
        self.product_tensors = [torch.from_numpy(array) for array in self.products]
        self.rounded = [np.empty((num_rows, units), np.int8) for _ in product_widths]
        self.rounded_tensors = [torch.from_numpy(array) for array in self.rounded]


def _until_change(row: Row) -> int:
    """Return the number of steps until the row changes from reading to generating, or reaches its length."""
    return len(row.request.prompt) - row.num_read if row.is_reading else row.request.max_chars - row.num_generated


def _finish_if_done(row: Row) -> None:
    if row.finished is not None or row.is_reading:
        return
    if row.ends_empty:
        row.finished = "stop"
    elif row.num_generated >= row.request.max_chars:
        row.finished = "length"


class _Walk:
    """The rows of a batch that generate with the same automaton. Keeps their states in the rows."""

    def __init__(self, automaton: Automaton, indices: list[int], rows: list[Row]) -> None:
        self.automaton, self.rows = automaton, rows
        self.indices = np.array(indices, np.int64)  # (K,), in the batch
        is_plain = [row.request.sampling.is_plain for row in rows]
        self.plain = np.flatnonzero(is_plain)  # places of rows whose only setting is temperature
        self.special = [place for place in range(len(rows)) if not is_plain[place]]
        self.temperatures = _temperatures(rows[place] for place in self.plain)
        self._states = np.array([row.state for row in rows], np.int64)
        self._num_left = np.array([row.num_left for row in rows], np.int64)
        self._first_stop = np.array([row.first_stop for row in rows], np.int64)

    def mask(self) -> NDArray[np.bool_]:
        """Return (K, V): which characters the rows may draw; see `Automaton.allowed`."""
        following = self.automaton.transitions[self._states]
        by_class = (following >= 0) & (self.automaton.fewest[following] < self._num_left[:, None])
        return np.asarray(by_class[:, self.automaton.classes])

    def follow(self, chars: Ids, step: int) -> bool:
        """Follow the characters that the B rows of the batch have drawn. Return whether that has ended a text."""
        automaton = self.automaton
        self._states = automaton.transitions[self._states, automaton.classes[chars[self.indices]]].astype(np.int64)
        self._num_left -= 1
        ended = (automaton.stop_chars[self._states] > 0) & (step >= self._first_stop)
        if automaton.restricts:
            after = automaton.fewest_after[self._states]
            ended |= (after == NEVER) | ((self._num_left > 0) & (after > self._num_left))
        for row, state in zip(self.rows, self._states.tolist(), strict=True):
            row.progress.state = state
        for place in np.flatnonzero(ended):
            self.rows[place].finished = "stop"
        return bool(ended.any())


def _walks(rows: Sequence[Row]) -> list[_Walk]:
    groups: dict[Automaton, list[int]] = {}
    for i, row in enumerate(rows):
        if row.request.automaton is not None:
            groups.setdefault(row.request.automaton, []).append(i)
    return [_Walk(automaton, indices, [rows[i] for i in indices]) for automaton, indices in groups.items()]


def _temperatures(rows: Iterable[Row]) -> Float64 | None:
    """Return (B, 1) temperatures; None if all are 1."""
    temperatures = np.array([[row.request.sampling.temperature] for row in rows], np.float64)
    return temperatures if (temperatures != 1).any() else None


def _report_next(dense: QuantizedLinear, rows: Sequence[Row]) -> None:
    """Give finished rows the distribution of their next character if they ask for it, with the bits of a draw."""
    asking = [row for row in rows if row.finished is not None and row.request.num_next is not None and row.next is None]
    if not asking:
        return
    states = np.stack([row.hidden[-1] for row in asking])
    rounded = np.rint(states * np.float32(STATE_SCALE)).astype(np.int32)  # (K, H)
    # Not `@`: for integers it is slower, and for floats it would start threads.
    parts = [
        np.einsum("kh,vh->kv", rounded, dense.weight[start : start + _DENSE_ROWS].astype(np.int32))
        for start in range(0, len(dense.weight), _DENSE_ROWS)
    ]
    logits = np.concatenate(parts, axis=1).astype(np.float32) * dense.scale + dense.bias  # (K, V)
    num_top = max(row.request.num_next or 0 for row in asking)
    scores = score(logits, np.zeros(len(asking), np.int64), num_top)
    for row, ids, logprobs in zip(asking, scores.top_ids, scores.top, strict=True):
        row.next = Distribution(ids[: row.request.num_next], logprobs[: row.request.num_next])

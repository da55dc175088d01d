"""A row as the kernel reads and updates it, from the row's first call to its end."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import MAX_POSITION, Float32, Ids
from service.engine.automaton.automaton import Automaton
from service.engine.sampling import History
from service.engine.sampling_settings import NUMBERS, SamplingSettings
from service.engine.scores import Distribution, Scores
from service.engine.stepper import Progress, Row, StepResult
from service.model.config import ModelConfig

_MASK = 2**64 - 1


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array. Raises TypeError if it is not contiguous.

    Takes a third of the time of `array.ctypes.data`.
    """
    return addressof(c_char.from_buffer(array.data)) if array.size else 0


class PackedRow:
    """A GruRow, which the kernel updates so that each call continues after the last, and the memory that it points to.

    States and histories are not copied: the kernel updates the row's own arrays. So most calls need only `address`.
    Only a call that takes the row beyond the position `plain_until` needs more: `begin` before it and `store` after it.
    Refers to the row's arrays but not to the row, which owns it: both are freed together.
    """

    __slots__ = (
        "__weakref__",
        "_among_allowed",
        "_checkpoints",
        "_config",
        "_next",
        "_pointed_to",
        "_record",
        "_scores",
        "address",
        "plain_until",
    )  # fmt: skip

    def __init__(self, row: Row, config: ModelConfig, record: Any) -> None:
        """Raises ValueError or TypeError if the kernel can't advance the row. record: a GruRow of zeros."""
        request, shape = row.request, (config.num_layers, config.num_units)
        if row.hidden.shape != shape or row.hidden.dtype != np.float32:
            raise ValueError(f"the state of a row must be {shape} float32")
        hidden = address_of(row.hidden)
        self._config, self._record, self.address = config, record, addressof(record)
        self._pointed_to: list[NDArray[Any]] = [row.hidden]
        self._scores: Scores | None = None
        self._among_allowed: Float32 | None = None
        self._checkpoints: Float32 | None = None
        self._next: Distribution | None = None
        self.plain_until = MAX_POSITION
        record.seed, record.hidden = request.seed & _MASK, hidden
        before = row.progress
        record.position, record.num_read = before.position, before.num_read
        record.num_generated, record.state = before.num_generated, before.state
        record.num_top = record.num_next = -1
        record.temperature, record.is_plain = request.sampling.temperature, request.sampling.is_plain
        if not request.sampling.is_plain:
            self._add_sampling(request.sampling, row.history)
        elif row.history is not None:
            self._add_history(row.history)
        if row.finished is not None:  # then the kernel does nothing
            return
        self._set_plain_until(row)
        if row.is_reading:
            record.num_prompt = len(request.prompt) - row.num_read
            record.prompt = self._address(request.prompt, np.int64)
        record.max_draws = 0 if row.ends_empty else request.max_chars - row.num_generated
        if request.automaton is not None:
            self._add_automaton(request.automaton, row)
        if request.num_next is not None:
            size = min(request.num_next, config.vocab_size)
            self._next = Distribution(np.empty(size, np.int32), np.empty(size, np.float32))
            record.num_next, record.next_ids = size, address_of(self._next.ids)
            record.next = address_of(self._next.logprobs)

    def begin(self, row: Row, num_chars: int) -> None:
        """Prepare the scores and checkpoints of the next call."""
        record = self._record
        num_steps = min(num_chars, record.num_prompt + record.max_draws)
        if row.request.num_logprobs is not None:
            self._add_scores(row, row.request.num_logprobs, num_steps)
        positions = row.request.checkpoint_positions[len(row.checkpoints) :]
        if positions and positions[0] <= row.position + num_steps:
            reached = np.array([one for one in positions if one <= row.position + num_steps], np.int64)
            self._checkpoints = np.empty((len(reached), *row.hidden.shape), np.float32)
            record.num_checkpoints, record.checkpoints = len(reached), address_of(self._checkpoints)
            record.checkpoint_positions = address_of(reached)
            self._pointed_to.append(reached)

    def store(self, row: Row, chars: Ids, num_read: int, num_withheld: int) -> StepResult:
        """Store what a call has reported. Return all results of the call."""
        if self._checkpoints is not None:
            num_stored = len(row.checkpoints)
            num_reached = sum(position <= row.position for position in row.request.checkpoint_positions) - num_stored
            row.checkpoints.extend(state.copy() for state in self._checkpoints[:num_reached])
            self._checkpoints = None
            self._pointed_to.pop()
            self._set_plain_until(row)
        if self._scores is None:
            return StepResult(chars, None, None, num_withheld)
        scores, self._scores = self._scores, None
        if len(scores.chosen) == num_read and row.request.score_prompt:
            return StepResult(chars, None, scores if num_read else None, num_withheld)
        num_scored = num_read if row.request.score_prompt else 0  # characters of the prompt
        drawn = scores.slice(num_scored, num_scored + len(chars))
        if self._among_allowed is not None:
            drawn = Scores(drawn.chosen, drawn.top_ids, drawn.top, self._among_allowed[: len(chars)])
        return StepResult(
            chars, drawn if len(chars) else None, scores.slice(0, num_scored) if num_scored else None, num_withheld
        )

    def finish(self, row: Row, *, has_stopped: bool) -> None:
        """Store the end of a row. Nothing of the row refers to this object any more."""
        record = self._record
        row.progress = Progress(record.position, record.num_read, record.num_generated, record.state)
        row.finished = "stop" if has_stopped or row.ends_empty else "length"
        row.next = self._next
        row.packed = None

    def _set_plain_until(self, row: Row) -> None:
        """Set the position up to which the kernel reports nothing but characters and the automaton's state."""
        if row.request.num_logprobs is not None:
            self.plain_until = -1
        else:
            positions = row.request.checkpoint_positions[len(row.checkpoints) :]
            self.plain_until = positions[0] - 1 if positions else MAX_POSITION

    def _address(self, array: NDArray[Any], dtype: type[np.generic]) -> int:
        """Return the address of an array, or of a contiguous copy with this dtype. Keeps it alive."""
        array = np.ascontiguousarray(array, dtype)
        self._pointed_to.append(array)
        return address_of(array) if array.flags.writeable else array.ctypes.data

    def _add_sampling(self, sampling: SamplingSettings, history: History | None) -> None:
        record, vocab_size = self._record, self._config.vocab_size
        for name in NUMBERS:
            setattr(record, name, getattr(sampling, name))
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError("logit_bias has the id of a character that the model doesn't have")
            record.num_biases = len(ids)
            record.bias_ids = self._address(np.array(ids), np.int64)
            record.biases = self._address(np.array(biases), np.float64)
        if sampling.allowed is not None:
            if not 0 <= min(sampling.allowed) <= max(sampling.allowed) < vocab_size:
                raise ValueError("allowed has the id of a character that the model doesn't have")
            allowed = np.zeros(vocab_size, np.bool_)
            allowed[[*sampling.allowed]] = True
            record.allowed = self._address(allowed, np.bool_)
        if sampling.penalizes:
            if history is None:
                raise ValueError("penalties need a history")
            self._add_history(history)

    def _add_history(self, history: History) -> None:
        """The kernel counts characters in the history's own arrays."""
        for name, array, dtype in (
            ("in_prompt", history.in_prompt, np.bool_),
            ("times_generated", history.num_generated, np.float64),
        ):
            if array.shape != (self._config.vocab_size,) or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"the arrays of a history must be contiguous, ({self._config.vocab_size},)")
            setattr(self._record, name, self._address(array, dtype))

    def _add_automaton(self, automaton: Automaton, row: Row) -> None:
        record = self._record
        record.num_classes = automaton.transitions.shape[1]
        record.num_left, record.first_stop = row.num_left, row.first_stop
        names = ["classes", "transitions", "stop_chars", "withheld"]
        for name in [*names, "fewest", "fewest_after"] if automaton.restricts else names:
            setattr(record, name, self._address(getattr(automaton, name), np.int32))

    def _add_scores(self, row: Row, num_logprobs: int, num_steps: int) -> None:
        record = self._record
        num_read = min(num_steps, record.num_prompt)
        start = 0 if row.request.score_prompt else num_read
        num_top, num_scores = min(num_logprobs, self._config.vocab_size), num_steps - start
        self._scores = scores = Scores(
            np.empty(num_scores, np.float32),
            np.empty((num_scores, num_top), np.int32),
            np.empty((num_scores, num_top), np.float32),
        )
        record.num_top, record.scores_start = num_top, start
        record.chosen, record.top_ids = address_of(scores.chosen), address_of(scores.top_ids)
        record.top = address_of(scores.top)
        if record.fewest:  # the automaton restricts
            self._among_allowed = np.empty(num_steps - num_read, np.float32)
            record.among_allowed = address_of(self._among_allowed)


class PackedBatch:
    """The rows of a `Batch` as the kernel reads them. Most calls look at none of them."""

    __slots__ = (
        "_addresses",
        "_first_special",
        "_num_steps",
        "_plain_steps",
        "address",
        "rows",
        "stepped",
        "stepped_address",
    )

    def __init__(self, rows: Sequence[Row], packed: list[PackedRow], make_stepped: Any) -> None:
        self.rows = packed
        self.stepped = np.empty(len(packed), make_stepped.dtype)  # (B,) GruStepped: what the last call did
        self.stepped_address = self.stepped.ctypes.data
        self._addresses = np.array([one.address for one in packed], np.uintp)
        self.address = self._addresses.ctypes.data
        self._num_steps = 0  # that were requested in all calls; rows at their end have done fewer
        # (B,) up to how many of these steps a call needs nothing of a row but `address`
        self._plain_steps = np.array(
            [
                MAX_POSITION if one.plain_until == MAX_POSITION else one.plain_until - row.position
                for row, one in zip(rows, packed, strict=True)
            ],
            np.int64,
        )
        self._first_special = self._plain_steps.min(initial=MAX_POSITION)

    def begin(self, rows: Sequence[Row], num_chars: int) -> list[int]:
        """Prepare the next call. Return the indices of the rows that need `store` after it."""
        self._num_steps += num_chars
        if self._num_steps <= self._first_special:
            return []
        special: list[int] = np.flatnonzero(self._plain_steps < self._num_steps).tolist()
        for i in special:
            self.rows[i].begin(rows[i], num_chars)
        return special

    def store(self, rows: Sequence[Row], special: Sequence[int], drawn: Ids) -> dict[int, StepResult]:
        """Store what a call, which drew (B, n) characters, has reported of the rows that `begin` returned.

        Returns the results, by index, of those that have scores.
        """
        results: dict[int, StepResult] = {}
        stepped = self.stepped[["num_drawn", "num_read", "num_withheld"]][special].tolist()
        for i, (num_drawn, num_read, num_withheld) in zip(special, stepped, strict=True):
            one, row = self.rows[i], rows[i]
            result = one.store(row, drawn[i, :num_drawn], num_read, num_withheld)
            if result.scores is not None or result.prompt_scores is not None:
                results[i] = result
            left = one.plain_until - row.position
            self._plain_steps[i] = MAX_POSITION if row.finished is not None else self._num_steps + left
        self._first_special = self._plain_steps.min()
        return results

"""Prepares rows for one call of the kernel, and stores what the kernel did to them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Ids, Int32
from service.engine.automaton.automaton import Automaton
from service.engine.sampling import History
from service.engine.sampling_settings import NUMBERS, SamplingSettings
from service.engine.scores import Distribution, Scores
from service.engine.stepper import NOTHING, Row, StepResult

_MASK = 2**64 - 1
_TABLES = ("num_classes", "classes", "transitions", "fewest", "fewest_after", "stop_chars")  # of an automaton
_FLOAT32 = np.dtype(np.float32)


class Rows:
    """The rows that have work in one call of the kernel, as records that the kernel reads.

    The records point to arrays that this object keeps alive. States and histories are not copied: the kernel updates
    the rows' own arrays. With hundreds of rows a call spends most of the time outside its steps on preparing rows. So a
    row without special settings takes only a few operations.

    Args:
        shape: (L, H) of the model's states.
        row_dtype: dtype of GruRow.
    """

    def __init__(
        self, rows: Sequence[Row], num_chars: int, shape: tuple[int, int], vocab_size: int, row_dtype: np.dtype[np.void]
    ) -> None:
        self._shape, self._vocab_size, self._row_dtype = shape, vocab_size, row_dtype
        self.active: list[Row] = []  # the rows that have work
        self._results = [NOTHING] * len(rows)
        self._places: list[int] = []  # index of each active row among all rows
        self._num_steps: list[int] = []  # of each active row in this call
        self._num_left: list[int] = []  # characters that each active row reads and generates until it is finished
        for place, row in enumerate(rows):
            left = 0
            if row.finished is None:
                request = row.request
                left = len(request.prompt) - row.num_read
                ends_empty = request.automaton is not None and not row.num_generated and row.ends_empty
                if request.max_chars > row.num_generated and not ends_empty:
                    left += request.max_chars - row.num_generated
                if left == 0:
                    row.finished = "stop" if ends_empty else "length"
            if (left > 0 and num_chars > 0) or (left == 0 and row.request.num_next is not None and row.next is None):
                self.active.append(row)
                self._places.append(place)
                self._num_left.append(left)
                self._num_steps.append(num_chars if num_chars < left else left)
        if self.active:
            self._make_records()

    def _make_records(self) -> None:
        active, size, longest = self.active, len(self.active), max(self._num_steps)
        for row in active:
            if row.hidden.shape != self._shape or row.hidden.dtype != _FLOAT32:
                raise ValueError(f"the state of a row must be {self._shape} float32")
        self._states = [c_char.from_buffer(row.hidden.data) for row in active]  # raises if one is not contiguous
        self._chars: Ids = np.empty((size, longest), np.int64)
        records = self.records = np.zeros(size, self._row_dtype)  # (B,) GruRow
        requests = [row.request for row in active]
        records["seed"] = [request.seed & _MASK for request in requests]
        records["position"] = [row.position for row in active]
        records["hidden"] = [addressof(state) for state in self._states]
        records["num_steps"] = self._num_steps
        records["chars"] = self._chars.ctypes.data + 8 * longest * np.arange(size)
        records["temperature"] = [request.sampling.temperature for request in requests]
        records["is_plain"] = plain = [request.sampling.is_plain for request in requests]
        records["num_top"] = records["num_next"] = -1
        self._pointed_to: list[NDArray[Any]] = []
        # Output arrays of rows that need them, by index in `active`.
        self._among_allowed: dict[int, Float32] = {}
        self._walking: list[int] = []  # indices of the rows that have an automaton
        self._scores: dict[int, Scores] = {}
        self._checkpoints: dict[int, Float32] = {}
        self._next: dict[int, Distribution] = {}
        for i, (row, request) in enumerate(zip(active, requests, strict=True)):
            if row.num_read < len(request.prompt):
                ids = request.prompt[row.num_read : row.num_read + self._num_steps[i]]
                records["num_prompt"][i], records["prompt"][i] = len(ids), self._address(ids, np.int64)
            if not plain[i]:
                self._add_sampling(records[i], request.sampling, row.history)
            elif row.history is not None:
                self._add_history(records[i], row.history)
            if request.automaton is not None:
                self._walking.append(i)
            if request.num_logprobs is not None:
                self._add_scores(i, row, request.num_logprobs)
            if request.checkpoint_positions:
                self._add_checkpoints(i, row)
            if request.num_next is not None:
                self._add_next(i, request.num_next)
        if self._walking:
            self._add_automata()

    def finish(self) -> list[StepResult]:
        """Update the rows after the call. Return the result of each row that was passed in, in their order."""
        if not self.active:
            return self._results
        done = zip(*(self.records[name].tolist() for name in ("num_prompt", "num_steps", "stopped")), strict=True)
        withheld = self._store_states() if self._walking else {}
        for i, (row, place, (num_read, num_steps, stopped)) in enumerate(
            zip(self.active, self._places, done, strict=True)
        ):
            row.position += num_steps
            row.num_read += num_read
            row.num_generated += num_steps - num_read
            if stopped:
                row.finished = "stop"
            elif row.finished is None and num_steps == self._num_left[i]:
                row.finished = "stop" if row.ends_empty else "length"
            if i in self._checkpoints:
                self._store_checkpoints(i, row)
            if i in self._next and row.finished is not None:
                row.next = self._next[i]
            chars = self._chars[i, num_read:num_steps]
            num_withheld = withheld.get(i, 0) if withheld else 0
            if i in self._scores:
                scores, prompt_scores = self._split_scores(i, row, num_read, num_steps)
                self._results[place] = StepResult(chars, scores, prompt_scores, num_withheld)
            elif num_steps > 0:
                self._results[place] = StepResult(chars, None, None, num_withheld)
        return self._results

    def _address(self, array: NDArray[Any], dtype: type[np.generic]) -> int:
        """Return the address of an array, or of a contiguous copy with this dtype. Keeps it alive during the call."""
        array = np.ascontiguousarray(array, dtype)
        self._pointed_to.append(array)
        return array.ctypes.data

    def _add_sampling(self, record: np.void, sampling: SamplingSettings, history: History | None) -> None:
        for name in NUMBERS:
            record[name] = getattr(sampling, name)
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise ValueError("logit_bias has the id of a character that the model doesn't have")
            record["num_biases"] = len(ids)
            record["bias_ids"] = self._address(np.array(ids), np.int64)
            record["biases"] = self._address(np.array(biases), np.float64)
        if sampling.allowed is not None:
            if not 0 <= min(sampling.allowed) <= max(sampling.allowed) < self._vocab_size:
                raise ValueError("allowed has the id of a character that the model doesn't have")
            allowed = np.zeros(self._vocab_size, np.bool_)
            allowed[[*sampling.allowed]] = True
            record["allowed"] = self._address(allowed, np.bool_)
        if sampling.penalizes:
            if history is None:
                raise ValueError("penalties need a history")
            self._add_history(record, history)

    def _add_history(self, record: np.void, history: History) -> None:
        """The kernel counts characters in the history's own arrays."""
        for name, array, dtype in (
            ("in_prompt", history.in_prompt, np.bool_),
            ("num_generated", history.num_generated, np.float64),
        ):
            if array.shape != (self._vocab_size,) or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"the arrays of a history must be contiguous, ({self._vocab_size},)")
            record[name] = array.ctypes.data

    def _add_automata(self) -> None:
        """Add the automata of rows. Rows often share one, so all are added at once."""
        records, walking = self.records, self._walking
        is_all = len(walking) == len(self.active)
        where = slice(None) if is_all else np.array(walking)
        rows = self.active if is_all else [self.active[i] for i in walking]
        requests = [row.request for row in rows]
        automata = [request.automaton for request in requests if request.automaton is not None]
        tables = {automaton: self._tables(automaton) for automaton in dict.fromkeys(automata)}
        for place, name in enumerate(_TABLES):
            values = {automaton: values[place] for automaton, values in tables.items()}
            records[name][where] = [values[one] for one in automata] if len(tables) > 1 else next(iter(values.values()))
        records["state"][where] = [row.state for row in rows]
        # At the first character that is drawn in this call.
        num_generated = np.array([row.num_generated for row in rows])
        records["num_left"][where] = np.array([request.chars_left for request in requests]) - num_generated
        first_stops = np.array([request.first_stop for request in requests]) - num_generated
        records["first_stop"][where] = np.maximum(first_stops, 0)
        if self._scores:
            scored = [i for i, one in zip(walking, automata, strict=True) if i in self._scores and one.restricts]
            among = np.empty((len(scored), self._chars.shape[1]), np.float32)
            self._among_allowed = dict(zip(scored, among, strict=True))
            records["among_allowed"][scored] = among.ctypes.data + among.strides[0] * np.arange(len(scored))

    def _store_states(self) -> dict[int, int]:
        """Store the states of automata. Return how many characters each row withholds, if any."""
        withheld: dict[int, int] = {}
        for i, state in zip(self._walking, self.records["state"][self._walking].tolist(), strict=True):
            row = self.active[i]
            row.state = state
            automaton = row.request.automaton
            if automaton is not None and automaton.has_stops:
                withheld[i] = automaton.withheld.item(state)
        return withheld

    def _tables(self, automaton: Automaton) -> tuple[int, ...]:
        """Return the values of _TABLES."""
        restricts = automaton.restricts
        return (
            automaton.transitions.shape[1],
            self._address(automaton.classes, np.int32),
            self._address(automaton.transitions, np.int32),
            self._address(automaton.fewest, np.int32) if restricts else 0,
            self._address(automaton.fewest_after, np.int32) if restricts else 0,
            self._address(automaton.stop_chars, np.int32),
        )

    def _add_scores(self, i: int, row: Row, num_logprobs: int) -> None:
        record, num_steps = self.records[i], self._num_steps[i]
        num_read = 0 if row.request.score_prompt else int(record["num_prompt"])
        num_top, num_scores = min(num_logprobs, self._vocab_size), num_steps - num_read
        arrays: tuple[Float32, Int32, Float32] = (
            np.empty(num_scores, np.float32),
            np.empty((num_scores, num_top), np.int32),
            np.empty((num_scores, num_top), np.float32),
        )
        self._scores[i] = Scores(*arrays)
        record["num_top"], record["scores_start"] = num_top, num_read
        record["chosen"], record["top_ids"], record["top"] = (array.ctypes.data for array in arrays)

    def _split_scores(self, i: int, row: Row, num_read: int, num_steps: int) -> tuple[Scores | None, Scores | None]:
        """Return the scores of generated characters and those of the prompt's, each None if there are none."""
        scores = self._scores[i]
        num_prompt = num_read if row.request.score_prompt else 0
        num_generated = num_steps - num_read
        generated = scores.slice(num_prompt, num_prompt + num_generated)
        if i in self._among_allowed:
            among = self._among_allowed[i][:num_generated]
            generated = Scores(generated.chosen, generated.top_ids, generated.top, among)
        return (
            generated if num_generated else None,
            scores.slice(0, num_prompt) if num_prompt else None,
        )

    def _add_checkpoints(self, i: int, row: Row) -> None:
        end = row.position + self._num_steps[i]
        positions = [
            position for position in row.request.checkpoint_positions[len(row.checkpoints) :] if position <= end
        ]
        if positions:
            record, checkpoints = self.records[i], np.empty((len(positions), *self._shape), np.float32)
            self._checkpoints[i] = checkpoints
            record["num_checkpoints"], record["checkpoints"] = len(positions), checkpoints.ctypes.data
            record["checkpoint_positions"] = self._address(np.array(positions), np.int64)

    def _add_next(self, i: int, num_next: int) -> None:
        record, size = self.records[i], min(num_next, self._vocab_size)
        following = self._next[i] = Distribution(np.empty(size, np.int32), np.empty(size, np.float32))
        record["reaches_length"] = self._num_steps[i] == self._num_left[i]
        record["num_next"] = size
        record["next_ids"], record["next"] = following.ids.ctypes.data, following.logprobs.ctypes.data

    def _store_checkpoints(self, i: int, row: Row) -> None:
        num_reached = sum(position <= row.position for position in row.request.checkpoint_positions) - len(
            row.checkpoints
        )
        row.checkpoints.extend(state.copy() for state in self._checkpoints[i][:num_reached])

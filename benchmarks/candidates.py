"""Ways of generating text that are compared by characters/s, each with a number of rows and of threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines import FortyLines
from benchmarks.pairs import in_turns
from service.commands.bench import Texts
from service.engine.stepper import Stepper
from service.engine.torch_stepper import TorchStepper
from service.model.artifact import Artifact
from service.model.quantize import IntegerPrecision, quantize
from service.store.model_store import ModelStore

BASELINE = "forty lines of torch"
_STEPS = 8  # characters of each text between two readings of the clock


@dataclass(frozen=True)
class Candidate:
    """A way of generating text."""

    what: str  # its name in a table
    rows: int  # texts that it generates side by side
    threads: int
    turn: Callable[[float], float]  # generates for a number of seconds; returns characters/s of all rows together


@dataclass(frozen=True)
class Measured:
    """The results of a candidate."""

    what: str
    rows: int
    threads: int
    rates: list[float]  # characters/s of all rows together, in each round

    @property
    def rate(self) -> float:
        """The median rate of the rounds."""
        return statistics.median(self.rates)

    def ratios(self, other: Measured) -> list[float]:
        """Return, for each round, how many times as fast as the other candidate this one was."""
        return [rate / other_rate for rate, other_rate in zip(self.rates, other.rates, strict=True)]


@dataclass(frozen=True)
class Shipped:
    """The model with which all candidates generate."""

    ref: str  # name@version
    directory: Path  # of its config.json and model.safetensors
    artifact: Artifact
    precision: IntegerPrecision  # of the torch stepper

    @classmethod
    def load(cls, model: str, model_store: Path, precision: IntegerPrecision | None) -> Shipped:
        """Load a model from the store. With `precision` None it has the precision in which it is served."""
        version, artifact = ModelStore(model_store).load(model)
        return cls(version.ref, version.path, artifact, precision or artifact.training.serving_precision)

    def candidates(self, rows: Sequence[int], threads: Sequence[int]) -> list[Candidate]:
        """Return the torch stepper and the baseline, for each number of rows and of threads."""
        stepper = TorchStepper(quantize(self.artifact.config, self.artifact.tensors, self.precision))
        forty_lines = self.forty_lines()
        candidates = []
        for num_rows in rows:
            candidates += [
                Candidate(self.stepper_name, num_rows, t, stepper_turn(stepper, num_rows, t)) for t in threads
            ]
            candidates += [Candidate(BASELINE, num_rows, t, baseline_turn(forty_lines, num_rows, t)) for t in threads]
        return candidates

    def forty_lines(self) -> FortyLines:
        """Return the baseline with this model's weights."""
        return FortyLines(self.artifact.config, self.artifact.tensors)

    @property
    def stepper_name(self) -> str:
        """The name of the torch stepper in a table."""
        return f"torch stepper, {self.precision}"


def stepper_turn(stepper: Stepper, num_rows: int, threads: int) -> Callable[[float], float]:
    """Return a turn of a stepper. All its turns continue the same texts."""
    texts = Texts(stepper, num_rows)

    def turn(seconds: float) -> float:
        torch.set_num_threads(threads)
        return texts.chars_per_s(seconds)

    return turn


def baseline_turn(model: FortyLines, num_rows: int, threads: int) -> Callable[[float], float]:
    """Return a turn of the baseline. All its turns continue the same texts."""
    chars = torch.zeros(num_rows, dtype=torch.int64)
    hidden = torch.zeros(num_rows, model.gru.hidden_size)

    def turn(seconds: float) -> float:
        nonlocal chars, hidden
        torch.set_num_threads(threads)
        num_chars, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            generated, hidden = model.generate(chars, hidden, _STEPS)
            chars = generated[:, -1]
            num_chars += generated.numel()
        return num_chars / elapsed

    return turn


def compare(candidates: Sequence[Candidate], rounds: int, seconds: float) -> list[Measured]:
    """Let all candidates generate in turns, `seconds` each. A warm-up round before them is not counted."""
    rates = in_turns([partial(c.turn, seconds) for c in candidates], rounds)
    return [Measured(c.what, c.rows, c.threads, rate) for c, rate in zip(candidates, rates, strict=True)]


def best_baseline(measured: Sequence[Measured], rows: int) -> Measured:
    """Return the results of the baseline with this number of rows, with its faster number of threads."""
    return max((m for m in measured if m.what == BASELINE and m.rows == rows), key=lambda m: m.rate)

"""What takes part in a comparison of characters/s: each generates with a number of rows and threads for a while."""

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
_STEPS = 8  # between two looks at the clock


@dataclass(frozen=True)
class Contestant:
    """turn: generate for so many seconds, and return characters/s of all rows together."""

    what: str
    rows: int
    threads: int
    turn: Callable[[float], float]


@dataclass(frozen=True)
class Measured:
    """rates: characters/s of a contestant in each round."""

    what: str
    rows: int
    threads: int
    rates: list[float]

    @property
    def rate(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)

    def ratios(self, other: Measured) -> list[float]:
        """How many times as fast as the other it was in each round."""
        return [mine / its for mine, its in zip(self.rates, other.rates, strict=True)]


@dataclass(frozen=True)
class Shipped:
    """The model that everybody generates with. directory: its config.json and model.safetensors."""

    ref: str
    directory: Path
    artifact: Artifact
    precision: IntegerPrecision

    @classmethod
    def load(cls, model: str, model_store: Path, precision: IntegerPrecision | None) -> Shipped:
        """Precision None: the one that it is served in."""
        version, artifact = ModelStore(model_store).load(model)
        return cls(version.ref, version.path, artifact, precision or artifact.training.serving_precision)

    def contestants(self, rows: Sequence[int], threads: Sequence[int]) -> list[Contestant]:
        """The torch stepper and the baseline, for each number of rows and threads."""
        stepper = TorchStepper(quantize(self.artifact.config, self.artifact.tensors, self.precision))
        forty_lines = self.forty_lines()
        found = []
        for number in rows:
            found += [Contestant(self.stepper_name, number, t, stepper_turn(stepper, number, t)) for t in threads]
            found += [Contestant(BASELINE, number, t, baseline_turn(forty_lines, number, t)) for t in threads]
        return found

    def forty_lines(self) -> FortyLines:
        """The baseline with this model's weights."""
        return FortyLines(self.artifact.config, self.artifact.tensors)

    @property
    def stepper_name(self) -> str:
        """Our stepper in a table."""
        return f"torch stepper, {self.precision}"


def stepper_turn(stepper: Stepper, num_rows: int, threads: int) -> Callable[[float], float]:
    """A stepper's turns go on with the same texts."""
    texts = Texts(stepper, num_rows)

    def turn(seconds: float) -> float:
        torch.set_num_threads(threads)
        return texts.chars_per_s(seconds)

    return turn


def baseline_turn(model: FortyLines, num_rows: int, threads: int) -> Callable[[float], float]:
    """The baseline's turns go on with the same texts."""
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


def compete(contestants: Sequence[Contestant], rounds: int, seconds: float) -> list[Measured]:
    """Let all of them generate in turns, `seconds` each, after a round that doesn't count."""
    rates = in_turns([partial(c.turn, seconds) for c in contestants], rounds)
    return [Measured(c.what, c.rows, c.threads, rate) for c, rate in zip(contestants, rates, strict=True)]


def best_baseline(measured: Sequence[Measured], rows: int) -> Measured:
    """The baseline with as many rows, at its better number of threads."""
    return max((m for m in measured if m.what == BASELINE and m.rows == rows), key=lambda m: m.rate)

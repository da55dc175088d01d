"""Ways of doing the same, timed in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Measure = TypeVar("Measure")


@dataclass(frozen=True)
class Pair:
    """Median seconds a call of either, and the ratios baseline / candidate of the rounds."""

    baseline_s: float
    candidate_s: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster the candidate is: the median of the rounds."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f} times ({min(self.ratios):.2f} to {max(self.ratios):.2f} over {len(self.ratios)} rounds)"
        )


def in_turns(measures: Sequence[Callable[[], Measure]], rounds: int) -> list[list[Measure]]:
    """What each measure returns in each round: one list a measure. A first round doesn't count."""
    found = [[measure() for measure in measures] for _ in range(rounds + 1)][1:]
    return [list(values) for values in zip(*found, strict=True)]


def time_in_turns(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    rounds: int,
    baseline_calls: int = 1,
    candidate_calls: int = 1,
) -> Pair:
    """Call either `..._calls` times a round, after one round that doesn't count."""

    def seconds(call: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    first, second = in_turns(
        [lambda: seconds(baseline, baseline_calls), lambda: seconds(candidate, candidate_calls)], rounds
    )
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return Pair(statistics.median(first), statistics.median(second), ratios)

"""Measuring alternatives in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Measure = TypeVar("Measure")


@dataclass(frozen=True)
class Pair:
    """The times of a baseline and of a candidate."""

    baseline_s: float  # median seconds a call
    candidate_s: float  # median seconds a call
    ratios: list[float]  # baseline / candidate, in each round

    @property
    def ratio(self) -> float:
        """How many times as fast the candidate is: the median of the rounds."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f} times ({min(self.ratios):.2f} to {max(self.ratios):.2f} over {len(self.ratios)} rounds)"
        )


def in_turns(measures: Sequence[Callable[[], Measure]], rounds: int) -> list[list[Measure]]:
    """Call all measures once in every round. Return a list for each measure, with its value of every round.

    A warm-up round before them is not counted.
    """
    results = [[measure() for measure in measures] for _ in range(rounds + 1)][1:]
    return [list(values) for values in zip(*results, strict=True)]


def time_in_turns(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    rounds: int,
    baseline_calls: int = 1,
    candidate_calls: int = 1,
) -> Pair:
    """Time both functions in turns, each with its number of calls in a round, after a warm-up round."""

    def seconds(call: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    baseline_s, candidate_s = in_turns(
        [lambda: seconds(baseline, baseline_calls), lambda: seconds(candidate, candidate_calls)], rounds
    )
    ratios = [slow / fast for slow, fast in zip(baseline_s, candidate_s, strict=True)]
    return Pair(statistics.median(baseline_s), statistics.median(candidate_s), ratios)

"""Two ways of doing the same, timed in turns, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


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

    times = [(seconds(baseline, baseline_calls), seconds(candidate, candidate_calls)) for _ in range(rounds + 1)][1:]
    return Pair(
        statistics.median(first for first, _ in times),
        statistics.median(second for _, second in times),
        [first / second for first, second in times],
    )

"""How many log-probabilities may be in memory, for all requests together."""

from __future__ import annotations

import threading

from service.errors import InvalidValue, TooManyScores


class ScoreBudget:
    """Limits the log-probabilities that are computed or wait to be sent. Any number of threads may use it.

    Each takes 8 bytes, and up to three times that while parts of an answer are joined.
    """

    def __init__(self, max_scores: int) -> None:
        self.max_scores = max_scores
        self._num_reserved = 0
        self._lock = threading.Lock()

    @property
    def num_reserved(self) -> int:
        """Log-probabilities that requests have reserved now."""
        return self._num_reserved

    def reservation(self) -> ScoreReservation:
        """Return a new reservation, of nothing so far."""
        return ScoreReservation(self)

    def change(self, before: int, after: int) -> None:
        """Replace a reservation of `before` scores by one of `after`. Raises InvalidValue, TooManyScores."""
        if after > self.max_scores:
            raise InvalidValue(
                f"logprobs: this request has {after} log-probabilities, and the server computes at most "
                f"{self.max_scores} at a time: request fewer characters, or fewer alternatives",
                param="logprobs",
            )
        with self._lock:
            if self._num_reserved - before + after > self.max_scores:
                raise TooManyScores(
                    "the server computes log-probabilities for as many characters as it can: try again in a second"
                )
            self._num_reserved += after - before


class ScoreReservation:
    """What one request has reserved, from before it computes until its answer is sent. One thread at a time uses it."""

    def __init__(self, budget: ScoreBudget) -> None:
        self._budget = budget
        self._num_scores = 0

    def require(self, num_scores: int) -> None:
        """Reserve this many log-probabilities, instead of what was reserved before.

        Raises TooManyScores if other requests leave too few, and InvalidValue if there never are so many.
        """
        self._budget.change(self._num_scores, num_scores)
        self._num_scores = num_scores

    def release(self) -> None:
        """Reserve nothing any more. Harmless if that was done before."""
        self.require(0)

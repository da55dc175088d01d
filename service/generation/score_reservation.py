"""How many log-probabilities a request has in memory, out of the budget that all requests share."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.errors import ClientGone, InvalidValue, TooManyScores
from service.shares import SharedBudget, current_client

MAX_WAIT_S = 30.0
_LOOK_S = 0.5  # a request that waits looks so often whether its client has left
_TOO_MANY = (
    "the server computes as many log-probabilities as it can, or as many as it can for you: try again in a second"
)


class ScoreReservation:
    """What one request has reserved, from before it computes until its answer is sent. One thread at a time uses it.

    A log-probability takes 8 bytes, and up to three times that while parts of an answer are joined.
    """

    def __init__(
        self,
        budget: SharedBudget,
        param: str = "logprobs",
        remedy: str = "request fewer characters, or fewer alternatives",
    ) -> None:
        """Reserve nothing so far, for the client of the current thread.

        A refusal names `param` and says what to do about it.
        """
        self._budget, self._client, self._param, self._remedy = budget, current_client(), param, remedy
        self._num_scores = 0

    def require(self, num_scores: int) -> None:
        """Reserve this many log-probabilities, instead of what was reserved before.

        Raises TooManyScores if the requests in progress leave too few, and InvalidValue if one client never gets this
        many.
        """
        self._check(num_scores)
        more = num_scores - self._num_scores
        if more < 0:
            self._budget.give_back(self._client, -more)
        elif more and not self._budget.take(self._client, more):
            raise TooManyScores(_TOO_MANY)
        self._num_scores = num_scores

    def wait_for(self, num_scores: int, client_has_left: Callable[[], bool] = lambda: False) -> None:
        """Reserve this many log-probabilities as the first ones, and wait until other requests leave as many.

        Raises TooManyScores after `MAX_WAIT_S`, InvalidValue if one client never gets this many, and ClientGone.
        """
        self._check(num_scores)
        deadline = time.monotonic() + MAX_WAIT_S
        while not self._budget.take(self._client, num_scores, wait_s=_LOOK_S):
            if client_has_left():
                raise ClientGone("the client has closed the connection")
            if time.monotonic() >= deadline:
                raise TooManyScores(_TOO_MANY)
        self._num_scores = num_scores

    def _check(self, num_scores: int) -> None:
        if num_scores > self._budget.max_per_client:
            raise InvalidValue(
                f"{self._param}: this request has {num_scores} log-probabilities, and the server computes at most "
                f"{self._budget.max_per_client} at a time for one client: {self._remedy}",
                param=self._param,
            )

    def release(self) -> None:
        """Reserve nothing any more. Harmless if that was done before."""
        self.require(0)

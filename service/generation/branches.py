"""Steps the network over many short texts that begin at known states, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from service.arrays import Float32, Ids
from service.engine.handle import Handle
from service.engine.prefix_cache import CacheScope
from service.engine.request import Request
from service.engine.scores import Distribution, Scores
from service.engine.stepper import Row, StepResult
from service.errors import ClientGone, InvalidValue, Overloaded
from service.generation.reader import step, whole
from service.registry.loaded_models import LoadedModel

_MAX_ROWS = 128  # that one request has in the engine at a time


@dataclass(frozen=True)
class Branch:
    """Characters to read from a state, and what to report of them."""

    hidden: Float32  # (L, H), the state after `position` characters
    position: int
    ids: Ids  # (n,), the characters to read; may be empty
    is_root: bool = False  # no other branch gave or had its state, so that its numbers must be checked
    checkpoints: tuple[int, ...] = ()  # the numbers of read characters, from 1 to n, after which the state is reported
    # Report the log-probabilities of the characters that are read, and of this many likeliest ones at each place.
    num_logprobs: int | None = None
    wants_next: bool = False  # report the distribution of the next character


@dataclass(frozen=True)
class Grown:
    """What came of a branch."""

    scores: Scores  # of the characters that were read; of none if not requested
    states: Mapping[int, Float32]  # (L, H) by the number of read characters, for the checkpoints
    hidden: Float32  # (L, H), the state after the last character
    next: Distribution | None  # all characters, the likeliest first; None if not requested


class Branches:
    """Grows branches of the texts of one request, as many at a time as the engine accepts. One thread may use it.

    `grow` raises Overloaded, EngineFailed, ClientGone. After an error, no text is left in the engine.
    """

    def __init__(self, model: LoadedModel, client_has_left: Callable[[], bool] | None = None) -> None:
        self._model, self._client_has_left = model, client_has_left
        self._max_rows = _MAX_ROWS
        self._num_admitted = 0  # the most texts that the engine has accepted at a time
        self.num_stepped = 0  # characters

    def grow(self, branches: Sequence[Branch]) -> list[Grown]:
        """Return what came of each branch, in their order."""
        grown: list[Grown] = []
        while len(grown) < len(branches):
            if self._client_has_left is not None and self._client_has_left():
                raise ClientGone("the client has closed the connection")
            part = branches[len(grown) : len(grown) + self._max_rows]
            requests = [self._request(branch) for branch in part]
            if (read := self._model.engine.read_at_once(requests)) is not None:
                grown += [_read(branch, row, result) for branch, (row, result) in zip(part, read, strict=True)]
                continue
            handles = self._submitted(requests)
            if handles is None:
                continue
            try:
                grown += [self._grown(branch, handle) for branch, handle in zip(part, handles, strict=True)]
            finally:
                for handle in handles:
                    handle.cancel()
        self.num_stepped += sum(len(branch.ids) for branch in branches)
        return grown

    def _submitted(self, requests: list[Request]) -> list[Handle] | None:
        """Submit requests. If these are too many at a time, accept fewer from now on, and return None."""
        try:
            handles = self._model.engine.submit(requests, already_admitted=len(requests) <= self._num_admitted)
        except (Overloaded, InvalidValue):  # too many places, or too much memory
            if len(requests) == 1:
                raise
            self._max_rows = len(requests) // 2
            return None
        self._num_admitted = max(self._num_admitted, len(requests))
        return handles

    def _request(self, branch: Branch) -> Request:
        return Request(
            prompt=branch.ids,
            max_chars=0,
            seed=0,
            num_logprobs=branch.num_logprobs,
            score_prompt=branch.num_logprobs is not None,
            hidden=branch.hidden,
            has_known_state=not branch.is_root,
            position=branch.position,
            checkpoint_positions=tuple(branch.position + count for count in branch.checkpoints),
            num_next=len(self._model.charset) if branch.wants_next else None,
        )

    def _grown(self, branch: Branch, handle: Handle) -> Grown:
        result, end = whole(handle, self._client_has_left)
        states = {position - branch.position: state for position, state in end.checkpoints.items()}
        return Grown(result.prompt_scores or Scores.none(), states, end.hidden, end.next)


def _read(branch: Branch, row: Row, result: StepResult) -> Grown:
    states = dict(zip(branch.checkpoints, row.checkpoints, strict=True))
    return Grown(result.prompt_scores or Scores.none(), states, row.hidden, row.next)


def state_after(
    model: LoadedModel,
    scope: CacheScope,
    prompt: Ids,
    client_has_left: Callable[[], bool] | None = None,
) -> tuple[Float32, int]:
    """Return the (L, H) state after (n,) characters of a prompt, and how many of them the prefix cache saved.

    Raises Overloaded, EngineFailed, ClientGone.
    """
    text = model.charset.decode(prompt)
    start, hidden = model.prefixes.longest(scope, text)
    if hidden is None:
        hidden = model.engine.initial_hidden()
    if start < len(prompt):
        hidden = step(model, prompt[start:], hidden, start, client_has_left=client_has_left)[0].hidden
        model.prefixes.put(scope, text, hidden)
    return hidden, start

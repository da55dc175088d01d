"""Steps the network over many short texts that begin at known states, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.arrays import Float32, Ids
from service.engine.handle import Handle
from service.engine.prefix_cache import CacheScope
from service.engine.request import Request
from service.engine.scores import Scores
from service.engine.short_text import ReadText, ShortText
from service.errors import ClientGone, InvalidValue, Overloaded
from service.generation.reader import step, whole
from service.registry.loaded_models import LoadedModel

_MAX_ROWS = 128  # that one request has in the engine at a time


class Branches:
    """Grows branches of the texts of one request, as many at a time as the engine accepts. One thread may use it.

    `grow` raises Overloaded, EngineFailed, ClientGone. After an error, no text is left in the engine.
    """

    def __init__(self, model: LoadedModel, client_has_left: Callable[[], bool] | None = None) -> None:
        self._model, self._client_has_left = model, client_has_left
        self._max_rows = _MAX_ROWS
        self._num_admitted = 0  # the most texts that the engine has accepted at a time
        self.num_stepped = 0  # characters

    def grow(self, branches: Sequence[ShortText]) -> list[ReadText]:
        """Return what came of each branch, in their order."""
        grown: list[ReadText] = []
        while len(grown) < len(branches):
            if self._client_has_left is not None and self._client_has_left():
                raise ClientGone("the client has closed the connection")
            part = branches[len(grown) : len(grown) + self._max_rows]
            if (read := self._model.engine.read_at_once(part)) is not None:
                grown += read
                continue
            handles = self._submitted([self._request(branch) for branch in part])
            if handles is None:
                continue
            try:
                grown += [self._read(branch, handle) for branch, handle in zip(part, handles, strict=True)]
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

    def _request(self, branch: ShortText) -> Request:
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

    def _read(self, branch: ShortText, handle: Handle) -> ReadText:
        result, end = whole(handle, self._client_has_left)
        states = {position - branch.position: state for position, state in end.checkpoints.items()}
        return ReadText(result.prompt_scores or Scores.none(), states, end.hidden, end.next)


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

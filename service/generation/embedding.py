"""Embeddings of texts: the state of the top layer after a text, or its mean over the text's characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from service.arrays import Float32, Float64, Ids
from service.engine.prefix_cache import NOBODY, CacheScope
from service.errors import ClientGone
from service.generation.completion import Completion, CompletionRequest
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel

Pooling = Literal["last", "mean"]

_GROUP_TEXTS = 32  # read side by side
_SEGMENT_CHARS = 128  # whose states are in memory at a time, for their mean
_IDLE_S = 0.5  # how often it is checked whether the client is still connected


def embed(
    model: LoadedModel,
    texts: Sequence[Ids],
    pooling: Pooling = "last",
    scope: CacheScope = NOBODY,
    max_texts: int = _GROUP_TEXTS,
    client_has_left: Callable[[], bool] = lambda: False,
) -> Float32:
    """Return (n, H) float32, a vector of length 1 for each text. It doesn't depend on the other texts.

    Args:
        model: the model that reads the texts.
        texts: (n,) int64 ids of each, n > 0.
        pooling: `last` takes the state after the text, `mean` the mean of the states after each of its characters.
        scope: whose cached states are used.
        max_texts: texts that the engine accepts at a time.
        client_has_left: returns true if nobody waits for the result any more.

    Raises Overloaded, EngineFailed, ClientGone.
    """
    vectors = np.empty((len(texts), model.state_shape[1]), np.float32)
    if pooling == "mean":
        for place, ids in enumerate(texts):
            vectors[place] = _unit(_mean_state(model, ids, client_has_left))
        return vectors
    size = min(_GROUP_TEXTS, max_texts)
    for begin in range(0, len(texts), size):
        states = _last_states(model, texts[begin : begin + size], scope, client_has_left)
        for place, state in enumerate(states, begin):
            vectors[place] = _unit(state.astype(np.float64))
    return vectors


def _last_states(
    model: LoadedModel, texts: Sequence[Ids], scope: CacheScope, client_has_left: Callable[[], bool]
) -> list[Float32]:
    """Return the (H,) states of the top layer after some texts: completions that generate nothing."""
    request = CompletionRequest(tuple(texts), max_chars=0, seed=0, cache_scope=scope)
    completion = Completion(model, request)
    try:
        for item in completion.wholes(_IDLE_S):
            if item is None and client_has_left():
                raise ClientGone("the client has closed the connection")
        return [choice.handle.wait().hidden[-1] for choice in completion.choices]
    finally:
        completion.cancel()


def _mean_state(model: LoadedModel, ids: Ids, client_has_left: Callable[[], bool]) -> Float64:
    """Return the (H,) mean of the top layer's states after each character."""
    total = np.zeros(model.state_shape[1], np.float64)
    hidden: Float32 | None = None
    for begin in range(0, len(ids), _SEGMENT_CHARS):
        part = ids[begin : begin + _SEGMENT_CHARS]
        positions = tuple(range(begin + 1, begin + len(part) + 1))
        end, _ = step(
            model, part, hidden, begin, positions, already_admitted=begin > 0, client_has_left=client_has_left
        )  # fmt: skip
        for position in positions:
            total += end.checkpoints[position][-1]
        hidden = end.hidden
    return total / len(ids)


def _unit(state: Float64) -> Float32:
    """Return a vector of this direction and of length 1. Its bits don't depend on how a processor adds."""
    length = math.sqrt(math.fsum((state * state).tolist()))
    return (state / (length or 1.0)).astype(np.float32)

"""Reading text: the engine steps over characters and returns the state after them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from service.arrays import Float32, Ids
from service.engine.request import End, Request
from service.engine.scores import Scores
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Session
from service.sessions.transcript import Transcript


def stop_ids(charset: Charset, stops: Sequence[str]) -> tuple[Ids, ...]:
    """Return the (n,) int64 ids of each stop string. Strings with characters that the model lacks are left out.

    Such a string can never be generated.
    """
    normalised = [unicodedata.normalize("NFC", stop) for stop in stops]
    return tuple(charset.encode(stop) for stop in normalised if all(char in charset for char in stop))


def read(
    model: LoadedModel,
    ids: Ids,
    hidden: Float32 | None = None,
    position: int = 0,
    checkpoint_positions: tuple[int, ...] = (),
    num_logprobs: int | None = None,
    num_next: int | None = None,
    *,
    already_admitted: bool = False,
) -> tuple[End, Scores | None]:
    """Step the network over (n,) ids from a state. Return the end, and the scores of the ids if num_logprobs is given.

    The arguments are those of `Request` and `Engine.submit`. Raises Overloaded, EngineFailed.
    """
    request = Request(
        ids,
        max_chars=0,
        seed=0,
        hidden=hidden,
        position=position,
        checkpoint_positions=checkpoint_positions,
        num_logprobs=num_logprobs,
        score_prompt=num_logprobs is not None,
        num_next=num_next,
    )
    handle = model.engine.submit([request], already_admitted=already_admitted)[0]
    part = handle.read(None)
    return handle.wait(), part.prompt_scores if part is not None else None


def state_at(model: LoadedModel, session: Session, position: int) -> Float32:
    """Return a session's (L, H) state at a position. Raises PositionGone, Overloaded, EngineFailed."""
    if position == session.position:
        return session.hidden
    return state_in(model, session.transcript, position)


def state_in(model: LoadedModel, transcript: Transcript, position: int, *, already_admitted: bool = False) -> Float32:
    """Return a transcript's (L, H) state at a position, stepping from the nearest checkpoint. Raises as `state_at`."""
    start, hidden = transcript.nearest_checkpoint(position)
    if hidden is not None and start == position:
        return hidden
    ids = model.charset.exact(transcript.text(start, position))
    return read(model, ids, hidden, start, already_admitted=already_admitted)[0].hidden

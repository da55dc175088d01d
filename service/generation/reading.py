"""Text into states: what completions and sessions have in common."""

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
    """(n,) int64 ids of each stop string; one with a character that the model doesn't know can never be completed."""
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
    """Step the network over (n,) ids from a state; how it stands then, and the scores of the ids, if they are wanted.

    The arguments mean what they mean in `Request` and `Engine.submit`. Raises Overloaded, EngineFailed.
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
    """(L, H) state after so many characters of a session. Raises PositionGone, Overloaded, EngineFailed."""
    if position == session.position:
        return session.hidden
    return state_in(model, session.transcript, position)


def state_in(model: LoadedModel, transcript: Transcript, position: int, *, already_admitted: bool = False) -> Float32:
    """The same in a transcript: stepped from the nearest state that is kept."""
    start, hidden = transcript.nearest_checkpoint(position)
    if hidden is not None and start == position:
        return hidden
    ids = model.charset.exact(transcript.text(start, position))
    return read(model, ids, hidden, start, already_admitted=already_admitted)[0].hidden

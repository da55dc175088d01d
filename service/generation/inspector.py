"""Inspecting: the network's state after each character of a text, and the gates that made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.arrays import Float16, Float32, Ids
from service.engine.scores import Distribution, Scores, num_scores
from service.errors import InvalidValue, UnknownCharacters, plural
from service.generation.portable_states import PortableStates
from service.generation.reader import state_at, step
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateSealer
from service.sessions.session import Session, SessionKey

MAX_CHARS = 2048
_MAX_NUMBERS = 2**23  # state values in one answer: large models answer for fewer characters at a time
_SEGMENT_CHARS = 128  # read at a time, so that the engine's memory for checkpoints doesn't grow with the text


@dataclass(frozen=True)
class InspectionRequest:
    """Which text to inspect: `text` alone, `text` after a portable `state`, or that of a `session`."""

    model: str | None = None  # name, name@version or name@alias; not needed for a state or a session
    text: str | None = None
    unknown_chars: UnknownChars = "error"  # what happens to unknown characters of `text`
    session: str | None = None  # id
    state: str | None = None  # portable state, after which the text is read
    # Positions of the first character to inspect, and after the last one. By default all characters of the text; of a
    # session that is too long for one answer, the last ones.
    start: int | None = None
    end: int | None = None
    gates: bool = False  # return the gates
    embedding: bool = False  # return the characters' embeddings
    # Return the log-probability of every character, and of this many likeliest characters at its place. None if no
    # log-probabilities are returned.
    num_logprobs: int | None = None
    seal: bool = False  # return the state after the last character as a portable state


@dataclass(frozen=True)
class InspectionResult:
    """What the network computed for n characters from position `start` on."""

    model: LoadedModel
    start: int
    text: str  # the n characters
    before: Float16  # (L, H), the state before the first character
    states: Float16  # (n, L, H), the state after each character
    gates: tuple[Float16, Float16, Float16] | None  # reset, update and candidate, (n, L, H) each
    embedding: Float16 | None  # (n, E)
    scores: Scores | None  # of each character, from the state before it
    next: Distribution | None  # the characters that may follow the last one
    state: str | None  # portable state after the last character


@dataclass(frozen=True)
class _Start:
    """Where reading starts, and the characters to read."""

    model: LoadedModel
    hidden: Float32  # (L, H), the state at `position`
    position: int
    ids: Ids  # (n,), of the characters from `position` on
    seed: int


class Inspector:
    """Inspects texts. Changes nothing. Safe for any number of threads.

    All values are computed in float32 and returned in float16.
    """

    def __init__(self, models: LoadedModels, load: Callable[[SessionKey], Session], sealer: StateSealer) -> None:
        """load: returns a session."""
        self._models, self._load, self._states = models, load, PortableStates(models, sealer)

    def inspect(
        self, owner: str, request: InspectionRequest, reserve: Callable[[int], None] = lambda _: None
    ) -> InspectionResult:
        """Inspect a text. `reserve` is called with the number of log-probabilities, and may refuse them.

        Raises InvalidValue, UnknownCharacters, ModelNotFound, SessionNotFound, SessionGone, PositionConflict,
        PositionGone, ModelChanged, InvalidState, Overloaded, EngineFailed.
        """
        if request.session is None:
            origin = self._in_text(request)
        else:
            origin = self._in_session(SessionKey(owner, request.session), request)
        reserve(num_scores(len(origin.ids), request.num_logprobs))
        return self._inspect_from(origin, request)

    def _in_session(self, key: SessionKey, request: InspectionRequest) -> _Start:
        session = self._load(key)
        model = self._models.for_state(session.model, session.identity)
        end = session.position if request.end is None else request.end
        session.require_within(end, "to")
        first = max(session.text.start, end - _max_chars(model))
        start = _check_range(model, first if request.start is None else request.start, end)
        ids = model.charset.exact(session.text.slice(start, end))  # raises PositionGone before anything is stepped
        return _Start(
            model,
            session.hidden if start == session.position else state_at(model, session.text, start),
            start,
            ids,
            session.seed,
        )

    def _in_text(self, request: InspectionRequest) -> _Start:
        text, position, seed = request.text or "", 0, 0
        if len(text) > MAX_CHARS:
            raise InvalidValue(f"text: at most {MAX_CHARS} characters a request, not {len(text)}", param="text")
        if request.state is not None:
            origin = self._states.open(request.state, request.model)
            model, hidden, position, seed = origin.model, origin.hidden, origin.position, origin.seed
        else:
            model = self._models.get(request.model or "")
            hidden = model.engine.initial_hidden()
        try:
            ids = model.charset.encode(text, request.unknown_chars)
        except UnknownCharacters as error:
            error.param = "text"
            raise
        start = position if request.start is None else request.start
        end = position + len(ids) if request.end is None else request.end
        if end > position + len(ids):
            raise InvalidValue(f"to: {end} is greater than the end of the text, {position + len(ids)}", param="to")
        if start < position:
            raise InvalidValue(f"from: {start} is less than the start of the text, {position}", param="from")
        _check_range(model, start, end)
        if start > position:
            hidden = step(model, ids[: start - position], hidden, position)[0].hidden
        return _Start(model, hidden, start, ids[start - position : end - position], seed)

    def _inspect_from(self, origin: _Start, request: InspectionRequest) -> InspectionResult:
        model, hidden, count = origin.model, origin.hidden, len(origin.ids)
        shape = (count, *model.state_shape)
        states = np.empty(shape, np.float16)
        gates = tuple(np.empty(shape, np.float16) for _ in range(3)) if request.gates else None
        scores: list[Scores] = []
        for begin in range(0, count, _SEGMENT_CHARS):
            part = slice(begin, min(begin + _SEGMENT_CHARS, count))
            ids, position = origin.ids[part], origin.position + begin
            positions = tuple(range(position + 1, position + len(ids) + 1))
            end, scored = step(
                model, ids, hidden, position, positions, request.num_logprobs, already_admitted=begin > 0
            )  # fmt: skip
            after = np.stack([end.checkpoints[at] for at in positions])  # (m, L, H)
            states[part] = after
            if gates is not None:
                before = np.concatenate([hidden[None], after[:-1]])
                for values, value in zip(gates, model.gates(ids, before, after), strict=True):
                    values[part] = value
            if scored is not None:
                scores.append(scored)
            hidden = end.hidden
        position = origin.position + count
        following = None
        if request.num_logprobs is not None:
            following = step(
                model, origin.ids[:0], hidden, position, num_next=request.num_logprobs, already_admitted=True
            )[0]
        return InspectionResult(
            model=model,
            start=origin.position,
            text=model.charset.decode(origin.ids),
            before=origin.hidden.astype(np.float16),
            states=states,
            gates=(gates[0], gates[1], gates[2]) if gates is not None else None,
            embedding=model.embedding[origin.ids] if request.embedding else None,
            scores=Scores.join(scores) if scores else None,
            next=following.next if following is not None else None,
            state=self._states.seal(model, hidden, position, origin.seed) if request.seal else None,
        )


def _max_chars(model: LoadedModel) -> int:
    layers, units = model.state_shape
    return max(1, min(MAX_CHARS, _MAX_NUMBERS // (layers * units)))


def _check_range(model: LoadedModel, start: int, end: int) -> int:
    """Return `start` if the range is valid and not too long. Raises InvalidValue."""
    if start > end:
        raise InvalidValue(f"from: {start} is greater than to, {end}", param="from")
    if end - start > _max_chars(model):
        raise InvalidValue(
            f"from: at most {plural(_max_chars(model), 'character')} a request with this model, not {end - start}",
            param="from",
        )
    return start

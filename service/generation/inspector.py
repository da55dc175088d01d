"""What the network holds while it reads: the state after each character, and the gates that made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.arrays import Float16, Float32, Ids
from service.engine.scores import Distribution, Scores
from service.errors import InvalidValue, UnknownCharacters
from service.generation.positions import check_within
from service.generation.reading import read, state_at
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateHeader, StateSealer
from service.sessions.session import Session

MAX_CHARS = 2048
_MAX_NUMBERS = 2**23  # of states in one answer: a model of many layers of many units is looked at in shorter parts
_SEGMENT_CHARS = 128  # read at a time: what the engine notes beside its steps is then the same for all lengths


@dataclass(frozen=True)
class InspectionRequest:
    """What to look at: a text, a text that goes on from a portable state, or a session.

    start, end: of the characters whose states are wanted; None: from the first one, up to the last; of a session that
    is longer than can be answered, the last ones. num_logprobs: log-probability of each character, and of so many
    likeliest. seal: the state after `end` is wanted as a portable one.
    """

    model: str | None = None
    text: str | None = None
    session: str | None = None
    state: str | None = None
    start: int | None = None
    end: int | None = None
    gates: bool = False
    embedding: bool = False
    num_logprobs: int | None = None
    seal: bool = False


@dataclass(frozen=True)
class InspectionResult:
    """n characters, from position start on.

    states: (n, L, H), after each of them; before: (L, H), before the first one. gates: reset, update and candidate,
    (n, L, H) each. embedding: (n, E). scores: of the characters, from the states before them. next: what may follow the
    last one. state: a portable one, after it.
    """

    model: LoadedModel
    start: int
    text: str
    before: Float16
    states: Float16
    gates: tuple[Float16, Float16, Float16] | None
    embedding: Float16 | None
    scores: Scores | None
    next: Distribution | None
    state: str | None


@dataclass(frozen=True)
class _Place:
    """Where reading begins: (L, H) state at a position, and the characters that follow."""

    model: LoadedModel
    hidden: Float32
    position: int
    ids: Ids
    seed: int


class Inspector:
    """Inspects. Safe for any number of threads; changes nothing.

    load: the session of an owner and an id. Everything is computed from float32 and answered in float16.
    """

    def __init__(self, models: LoadedModels, load: Callable[[str, str], Session], sealer: StateSealer) -> None:
        self._models, self._load, self._sealer = models, load, sealer

    def inspect(self, owner: str, asked: InspectionRequest) -> InspectionResult:
        """Raises InvalidValue, UnknownCharacters, ModelNotFound, SessionNotFound, SessionGone, PositionConflict,
        PositionGone, ModelChanged, InvalidState, Overloaded, EngineFailed.
        """
        if asked.session is None:
            return self._looked_at(self._in_text(asked), asked)
        return self._looked_at(self._in_session(owner, asked.session, asked), asked)

    def _in_session(self, owner: str, session_id: str, asked: InspectionRequest) -> _Place:
        session = self._load(owner, session_id)
        model = self._models.for_state(session.model, session.identity)
        end = session.position if asked.end is None else asked.end
        check_within(session, end, "to")
        first = max(session.transcript.start, end - _max_chars(model))
        start = _checked(model, first if asked.start is None else asked.start, end)
        ids = model.charset.exact(session.transcript.text(start, end))  # before anything is stepped: is it retained?
        return _Place(model, state_at(model, session, start), start, ids, session.seed)

    def _in_text(self, asked: InspectionRequest) -> _Place:
        text, position, seed = asked.text or "", 0, 0
        if len(text) > MAX_CHARS:
            raise InvalidValue(f"text: at most {MAX_CHARS} characters a call, not {len(text)}", param="text")
        if asked.state is not None:
            opened = self._sealer.open(asked.state)
            position, seed = opened.header.position, opened.header.seed
            model = self._models.get(asked.model if asked.model is not None else opened.header.model)
            hidden = opened.hidden(model.identity, model.state_shape)
        else:
            model = self._models.get(asked.model or "")
            hidden = model.engine.initial_hidden()
        try:
            ids = model.charset.encode(text)
        except UnknownCharacters as error:
            error.param = "text"
            raise
        start = position if asked.start is None else asked.start
        end = position + len(ids) if asked.end is None else asked.end
        if end > position + len(ids):
            raise InvalidValue(f"to: {end} lies behind the end of the text, {position + len(ids)}", param="to")
        if start < position:
            raise InvalidValue(f"from: {start} lies before the beginning of the text, {position}", param="from")
        _checked(model, start, end)
        if start > position:
            hidden = read(model, ids[: start - position], hidden, position)[0].hidden
        return _Place(model, hidden, start, ids[start - position : end - position], seed)

    def _looked_at(self, place: _Place, asked: InspectionRequest) -> InspectionResult:
        model, hidden, count = place.model, place.hidden, len(place.ids)
        shape = (count, *model.state_shape)
        states = np.empty(shape, np.float16)
        gates = tuple(np.empty(shape, np.float16) for _ in range(3)) if asked.gates else None
        scores: list[Scores] = []
        for begin in range(0, count, _SEGMENT_CHARS):
            part = slice(begin, min(begin + _SEGMENT_CHARS, count))
            ids, position = place.ids[part], place.position + begin
            positions = tuple(range(position + 1, position + len(ids) + 1))
            end, scored = read(
                model, ids, hidden, position, positions, asked.num_logprobs, already_admitted=begin > 0
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
        position = place.position + count
        following = None
        if asked.num_logprobs is not None:
            following = read(
                model, place.ids[:0], hidden, position, num_next=asked.num_logprobs, already_admitted=True
            )[0]
        return InspectionResult(
            model=model,
            start=place.position,
            text=model.charset.decode(place.ids),
            before=place.hidden.astype(np.float16),
            states=states,
            gates=(gates[0], gates[1], gates[2]) if gates is not None else None,
            embedding=model.embedding[place.ids] if asked.embedding else None,
            scores=Scores.join(scores) if scores else None,
            next=following.next if following is not None else None,
            state=self._sealed(place, position, hidden) if asked.seal else None,
        )

    def _sealed(self, place: _Place, position: int, hidden: Float32) -> str:
        model = place.model
        facts = {"model": model.version.ref, "identity": model.identity, "position": position, "seed": place.seed}
        return self._sealer.seal(StateHeader(**facts, expires_at=None), hidden)  # type: ignore[arg-type]


def _max_chars(model: LoadedModel) -> int:
    layers, units = model.state_shape
    return max(1, min(MAX_CHARS, _MAX_NUMBERS // (layers * units)))


def _checked(model: LoadedModel, start: int, end: int) -> int:
    """start, if there are not too many characters up to end. Raises InvalidValue."""
    if start > end:
        raise InvalidValue(f"from: {start} lies behind the end, {end}", param="from")
    if end - start > _max_chars(model):
        raise InvalidValue(
            f"from: at most {_max_chars(model)} characters a call of this model, not {end - start}", param="from"
        )
    return start

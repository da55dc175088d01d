"""All operations on sessions. Those that change one are functions from a session to a session and an answer."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from service.engine.scores import Distribution, Scores, num_scores
from service.errors import (
    InvalidValue,
    ModelNotFound,
    PositionConflict,
    SessionExists,
    SessionGone,
    SessionNotFound,
    plural,
)
from service.generation.portable_states import PortableStates
from service.generation.reader import Reader
from service.generation.runs import SAVE_INTERVAL_S, RunRegistry
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateHeader, StateSealer
from service.sessions.session import Session, SessionKey, SessionSummary
from service.sessions.session_store import Change, SessionStore, safe_to_retry
from service.sessions.text import Retention, Text

_ID_BYTES = 16  # of a random id: 128 bits, 32 hexadecimal digits
_SEED_BITS = 53  # of a random seed: what a browser holds as a number

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class NewSession:
    """What a session is created from. Equal values create equal sessions, unless the seed is left to chance."""

    id: str | None  # None for a random one
    model: str | None  # name, name@version or name@alias; may be None with a state
    text: str = ""
    unknown_chars: UnknownChars = "error"
    seed: int | None = None  # None for that of the state, or a random one
    ttl_s: float | None = None  # None for the default
    state: str | None = None  # a portable state to begin with

    @property
    def origin(self) -> bytes:
        """A hash by which a repeated creation is recognised."""
        return _hash("create", self.model, self.text, self.unknown_chars, self.seed, self.ttl_s, self.state)


@dataclass(frozen=True)
class FeedRequest:
    """Text for a session."""

    text: str
    position: int | None = None  # where the text belongs; None for the end
    num_logprobs: int | None = None  # report each character's log-probability and this many likeliest; None for neither
    num_next: int = 0  # how many of the likeliest next characters to report
    unknown_chars: UnknownChars = "error"
    rebase: str | None = None  # a model that the session changes to before it is fed


@dataclass(frozen=True)
class FeedResult:
    """What came of a feed."""

    model: LoadedModel
    text: str  # as the session has it now: characters may have been folded or dropped
    position: int  # after the text
    next: Distribution | None
    scores: Scores | None  # of the text's characters, if they were requested


class SessionService:
    """Operations on sessions. Any number of threads may call.

    Every method may raise SessionNotFound and SessionGone, and what the store raises; those that change a session,
    SessionBusy; those that step the network, ModelChanged, Overloaded, EngineFailed.
    """

    def __init__(
        self,
        models: LoadedModels,
        store: SessionStore,
        sealer: StateSealer,
        ttl_s: float,
        retention: Retention,
        clock: Callable[[], float] = time.time,
        save_interval_s: float = SAVE_INTERVAL_S,
    ) -> None:
        """ttl_s: default life of a session. clock: seconds since 1970. save_interval_s: see RunRegistry."""
        self._models, self._store, self._sealer, self._ttl_s, self._clock = models, store, sealer, ttl_s, clock
        self._states, self._reader = PortableStates(models, sealer), Reader(retention)
        self.runs = RunRegistry(models, store, self._reader, save_interval_s)

    def get(self, key: SessionKey) -> Session:
        """Return the session as it was saved last."""
        return self._store.load(key)

    def page(self, owner: str, after: str, limit: int) -> list[SessionSummary]:
        """Return up to `limit` of the owner's sessions, in the order of their ids, above the id `after`."""
        return self._store.page(owner, after, limit)

    def text(self, key: SessionKey, start: int | None, end: int | None) -> tuple[str, int, int]:
        """Return retained text from start to end (default: all that is retained), and these two positions.

        Raises PositionGone, PositionConflict.
        """
        session = self._store.load(key)
        start = session.text.start if start is None else start
        end = session.position if end is None else end
        if start > end:
            raise InvalidValue(f"from: {start} is after the end, {end}", param="from")
        session.require_within(end, "to")
        return session.text.slice(start, end), start, end

    def reading(self, key: SessionKey, position: int | None) -> tuple[LoadedModel, Session]:
        """Return a session as it was saved last, and its model, for an operation that doesn't change it.

        If a `position` is given, the session is at it: an unfinished run is generated again up to there.

        Raises PositionConflict.
        """
        session = self.runs.replayed(self._store.load(key), position)
        session.require_position(position)
        return self._models.for_state(session.model, session.identity), session

    def create(
        self, owner: str, new: NewSession, client_has_left: Callable[[], bool] | None = None
    ) -> tuple[Session, bool]:
        """Return the session, and whether it is new: repeating a creation changes nothing.

        Raises SessionExists, ModelNotFound, UnknownCharacters, InvalidState, ClientGone, and OutcomeUnknown if the id
        is not the caller's own.
        """
        if new.id is not None and (there := self._created_before(SessionKey(owner, new.id), new.origin)):
            return there, False
        model, seed, text = self._beginning(new)
        ids = model.charset.encode(new.text, new.unknown_chars)
        return self._store_new(
            Session(
                id=new.id if new.id is not None else secrets.token_hex(_ID_BYTES),
                owner=owner,
                model=model.version.ref,
                identity=model.identity,
                seed=seed,
                ttl_s=new.ttl_s if new.ttl_s is not None else self._ttl_s,
                created_at=0,
                expires_at=0,
                text=self._reader.read(model, text, ids, client_has_left=client_has_left).text,
                origin=new.origin if new.id is not None else None,
            )
        )

    def fork(self, key: SessionKey, new_id: str | None, position: int | None, seed: int | None) -> tuple[Session, bool]:
        """Return a new session with the same text up to a retained position (default: all), and whether it is new.

        Raises SessionExists, PositionConflict, PositionGone.
        """
        origin = _hash("fork", key.id, position, seed)
        if new_id is not None and (there := self._created_before(SessionKey(key.owner, new_id), origin)):
            return there, False

        def change(session: Session) -> tuple[Session, Session]:
            before, session = session, self.runs.replayed(session, position)
            end = session.position if position is None else position
            session.require_within(end)
            return before, replace(session, text=self._truncated(session, end))

        session = self._update(key, change, idempotent=True)
        return self._store_new(
            replace(
                session,
                id=new_id if new_id is not None else secrets.token_hex(_ID_BYTES),
                seed=seed if seed is not None else session.seed,
                run=None,
                origin=origin if new_id is not None else None,
            )
        )

    def feed(
        self,
        key: SessionKey,
        request: FeedRequest,
        client_has_left: Callable[[], bool] | None = None,
        reserve: Callable[[int], None] = lambda _: None,
    ) -> FeedResult:
        """Step the network over more text. Text that the session has already at its position is not stepped again.

        `reserve` is called with the number of log-probabilities, before they are computed, and may refuse them.

        Raises PositionConflict, PositionGone, UnknownCharacters, ModelNotFound (of rebase), ClientGone.
        """

        def change(session: Session) -> tuple[Session, FeedResult]:
            before, target = session, self._rebase_target(request)
            if target is not None and target.identity == session.identity and target.version.ref != session.model:
                session = replace(session, model=target.version.ref)  # it computes the same: nothing is stepped
            session = self.runs.replayed(session, request.position)
            if target is not None and target.identity != session.identity:
                session = self._rebased(session, target, request.position, client_has_left)
            if request.position is not None and request.position != session.position:
                return session, self._repeated_feed(session, request, client_has_left, reserve)
            session, result = self._fed(session, request, client_has_left, reserve)
            return session if result.text or request.rebase is not None else before, result

        return self._update(key, change, idempotent=request.position is not None)

    def rewind(self, key: SessionKey, position: int) -> Session:
        """Drop the text after a retained position, and return the session. Raises PositionConflict, PositionGone."""

        def change(session: Session) -> tuple[Session, Session]:
            session = self.runs.replayed(session, position)
            session.require_within(position)
            run = session.run
            if position < session.position:
                # A run whose text is cut off can neither be resumed nor streamed again.
                run = run if run is not None and run.end is not None and run.end <= position else None
            session = replace(session, text=self._truncated(session, position), run=run)
            return session, session

        return self._update(key, change, idempotent=True)

    def export(self, key: SessionKey, ttl_s: float | None) -> tuple[str, StateHeader]:
        """Return a portable state that is valid for ttl_s seconds (default: without end), and its header."""
        session = self._update(key, lambda session: (session, session), idempotent=True)
        header = StateHeader(
            model=session.model,
            identity=session.identity,
            position=session.position,
            seed=session.seed,
            expires_at=self._clock() + ttl_s if ttl_s is not None else None,
        )
        return self._sealer.seal(header, session.hidden), header

    def delete(self, key: SessionKey) -> None:
        """Delete the session."""
        self.runs.without_left_client(key, lambda: self._store.delete(key))

    def _update(self, key: SessionKey, change: Change[Answer], *, idempotent: bool) -> Answer:
        return self.runs.without_left_client(key, lambda: self._store.update(key, change, idempotent=idempotent))

    def _truncated(self, session: Session, position: int) -> Text:
        if position == session.position:
            return session.text  # no model is needed
        model = self._models.for_state(session.model, session.identity)
        return self._reader.truncate(model, session.text, position)

    def _fed(
        self,
        session: Session,
        request: FeedRequest,
        client_has_left: Callable[[], bool] | None,
        reserve: Callable[[int], None],
    ) -> tuple[Session, FeedResult]:
        """Feed at the end of the session."""
        model = self._models.for_state(session.model, session.identity)
        ids = model.charset.encode(request.text, request.unknown_chars)
        reserve(num_scores(len(ids), request.num_logprobs))
        reading = self._reader.read(model, session.text, ids, request.num_logprobs, request.num_next, client_has_left)
        text = model.charset.decode(ids)
        result = FeedResult(model, text, reading.text.position, reading.next, reading.scores)
        run = session.finished_run if text else session.run
        return replace(session, text=reading.text, run=run), result

    def _rebase_target(self, request: FeedRequest) -> LoadedModel | None:
        """Return the model that the session moves to; None if it stays where it is."""
        if request.rebase is None:
            return None
        try:
            return self._models.get(request.rebase)
        except ModelNotFound as error:
            error.param = "rebase"
            raise

    def _rebased(
        self,
        session: Session,
        model: LoadedModel,
        position: int | None,
        client_has_left: Callable[[], bool] | None,
    ) -> Session:
        """Return the session with its retained text read into a model of other weights; its positions stay the same."""
        session.require_position(position)
        text = self._reader.reread(model, session.text, client_has_left)
        return replace(session, model=model.version.ref, identity=model.identity, text=text, run=session.finished_run)

    def _repeated_feed(
        self,
        session: Session,
        request: FeedRequest,
        client_has_left: Callable[[], bool] | None,
        reserve: Callable[[int], None],
    ) -> FeedResult:
        """Answer a feed whose text the session has already. Raises PositionConflict if it has another text there."""
        model = self._models.for_state(session.model, session.identity)
        text = model.charset.decode(model.charset.encode(request.text, request.unknown_chars))
        start = request.position or 0
        end = start + len(text)
        if end > session.position or session.text.slice(start, end) != text:
            raise PositionConflict(
                f"the text has {plural(session.position, 'character')} and not this text at {start}: read it "
                "and send its end as "
                "position",
                session.position,
            )
        num_logprobs = request.num_logprobs if text else None
        reserve(num_scores(len(text), num_logprobs))
        scores, following = self._reader.score(
            model, session.text, start, end, num_logprobs, request.num_next, client_has_left
        )
        return FeedResult(model, text, end, following, scores)

    def _beginning(self, new: NewSession) -> tuple[LoadedModel, int, Text]:
        """Return model, seed and text before the new session's own text is read."""
        if new.state is None:
            if new.model is None:
                raise InvalidValue("model: needed without a state", param="model")
            model = self._models.get(new.model)
            seed = new.seed if new.seed is not None else secrets.randbits(_SEED_BITS)
            return model, seed, self._reader.empty(model)
        start = self._states.open(new.state, new.model)
        seed = new.seed if new.seed is not None else start.seed
        return start.model, seed, Text.from_state(start.position, start.hidden)

    def _created_before(self, key: SessionKey, origin: bytes) -> Session | None:
        """Return the session of this id, if there is one. Raises SessionExists if it was created otherwise."""
        try:
            session = self._store.load(key)
        except (SessionNotFound, SessionGone):
            return None
        if session.origin != origin:
            raise SessionExists(
                f"there is a session {key.id}, which was created otherwise: choose another id, or delete it first",
                param="id",
            )
        return session

    def _store_new(self, session: Session) -> tuple[Session, bool]:
        # Repeating a creation under the caller's own id is harmless; another one would create another session.
        try:
            with safe_to_retry(session.origin is not None):
                return self._store.create(session), True
        except SessionExists:
            there = self._created_before(session.key, session.origin or b"")
            if there is None:
                raise  # it was deleted in the same moment: the caller may try again
            return there, False


def _hash(*facts: object) -> bytes:
    return hashlib.sha256(json.dumps(facts).encode()).digest()[:16]

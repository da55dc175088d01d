"""Creating sessions: from text, from a portable state, or as a fork of another session."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, replace

from service.arrays import Float32
from service.errors import InvalidValue, SessionExists, SessionGone, SessionNotFound
from service.generation.reading import read, state_at
from service.generation.runs import RunRegistry
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateSealer
from service.sessions.session import Session
from service.sessions.session_store import SessionStore
from service.sessions.transcript import Retention, Transcript

_ID_BYTES = 16  # of a random id: 128 bits, 32 hexadecimal digits
_SEED_BITS = 53  # of a random seed: JavaScript represents such integers exactly


@dataclass(frozen=True)
class NewSession:
    """A request to create a session. Equal requests make equal sessions, unless the seed is random."""

    id: str | None  # None for a random id
    model: str | None  # name, name@version or name@alias; may be None if there is a `state`
    text: str = ""  # read after the state
    unknown_chars: UnknownChars = "error"
    seed: int | None = None  # None for the seed of the state, or a random one if there is no state
    ttl_s: float | None = None  # None for the default
    state: str | None = None  # portable state to begin with; None for the zero state

    @property
    def origin(self) -> bytes:
        """Hash by which a repeated request is recognised."""
        return _hash("create", self.model, self.text, self.unknown_chars, self.seed, self.ttl_s, self.state)


class SessionCreator:
    """Creates and forks sessions. Safe for any number of threads. The methods raise the errors of `SessionService`."""

    def __init__(
        self,
        models: LoadedModels,
        store: SessionStore,
        runs: RunRegistry,
        sealer: StateSealer,
        ttl_s: float,
        retention: Retention,
    ) -> None:
        self._models, self._store, self._runs, self._sealer = models, store, runs, sealer
        self._ttl_s, self._retention = ttl_s, retention

    def create(self, owner: str, new: NewSession) -> tuple[Session, bool]:
        """Return the session, and whether it is new. A repeated request returns the existing session unchanged.

        Raises SessionExists if another request created the id; ModelNotFound, UnknownCharacters, InvalidState.
        """
        if new.id is not None and (existing := self._existing(owner, new.id, new.origin)):
            return existing, False
        model, seed, transcript, hidden = self._initial_state(new)
        ids = model.charset.encode(new.text, new.unknown_chars)
        if len(ids):
            start = transcript.position
            checkpoint_positions = self._retention.checkpoint_positions(start, start + len(ids))
            end, _ = read(model, ids, hidden, start, checkpoint_positions)
            hidden = end.hidden
            transcript = transcript.extend(model.charset.decode(ids), end.checkpoints, self._retention)
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
                hidden=hidden,
                transcript=transcript,
                origin=new.origin if new.id is not None else None,
            )
        )

    def fork(
        self, owner: str, session_id: str, new_id: str | None, position: int | None, seed: int | None
    ) -> tuple[Session, bool]:
        """Return a new session with the same text up to a retained position (default: the end), and whether it is new.

        A repeated request returns the existing session. Raises SessionExists if another request created `new_id`;
        PositionConflict, PositionGone.
        """
        origin = _hash("fork", session_id, position, seed)
        if new_id is not None and (existing := self._existing(owner, new_id, origin)):
            return existing, False
        with self._runs.lease(owner, session_id, position) as lease:
            session = lease.session
            position = session.position if position is None else position
            session.require_within(position)
            hidden = session.hidden
            if position < session.position:
                hidden = state_at(self._models.for_state(session.model, session.identity), session, position)
        return self._store_new(
            replace(
                session,
                id=new_id if new_id is not None else secrets.token_hex(_ID_BYTES),
                seed=seed if seed is not None else session.seed,
                hidden=hidden,
                transcript=session.transcript.truncate(position),
                run=None,
                origin=origin if new_id is not None else None,
            )
        )

    def _initial_state(self, new: NewSession) -> tuple[LoadedModel, int, Transcript, Float32]:
        """Return model, seed, transcript and (L, H) state before the text is read."""
        if new.state is None:
            if new.model is None:
                raise InvalidValue("model: required, unless there is a state", param="model")
            model = self._models.get(new.model)
            seed = new.seed if new.seed is not None else secrets.randbits(_SEED_BITS)
            return model, seed, Transcript(), model.engine.initial_hidden()
        opened = self._sealer.open(new.state)
        header = opened.header
        model = self._models.get(new.model if new.model is not None else header.model)
        hidden = opened.hidden(model.identity, model.state_shape)
        seed = new.seed if new.seed is not None else header.seed
        return model, seed, Transcript.from_state(header.position, hidden), hidden

    def _existing(self, owner: str, session_id: str, origin: bytes) -> Session | None:
        """Return the session with this id, or None. Raises SessionExists if its request had another `origin`."""
        try:
            session = self._store.load(owner, session_id)
        except (SessionNotFound, SessionGone):
            return None
        if session.origin != origin:
            raise SessionExists(f"there is already a session {session_id}, which another request created", param="id")
        return session

    def _store_new(self, session: Session) -> tuple[Session, bool]:
        try:
            return self._store.create(session), True
        except SessionExists:
            existing = self._existing(session.owner, session.id, session.origin or b"")
            if existing is None:
                raise  # it was deleted in the meantime: the client can try again
            return existing, False


def _hash(*facts: object) -> bytes:
    return hashlib.sha256(json.dumps(facts).encode()).digest()[:16]

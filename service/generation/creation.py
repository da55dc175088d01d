"""How sessions come to be: from text, from a portable state, from one another."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, replace

from service.arrays import Float32
from service.errors import InvalidValue, SessionExists, SessionGone, SessionNotFound
from service.generation.positions import check_within
from service.generation.reading import read, state_at
from service.generation.runs import RunRegistry
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateSealer
from service.sessions.session import Session
from service.sessions.session_store import SessionStore
from service.sessions.transcript import Retention, Transcript

_ID_BYTES = 16  # random ones: 128 bits, 32 hexadecimal digits
_SEED_BITS = 53  # of random ones: what a browser holds as a number


@dataclass(frozen=True)
class NewSession:
    """What a session is created from. Equal ones make equal sessions, but for a seed that is left to chance.

    id: None is a random one. model: name, name@version, name@alias. state: a portable one, to begin with; then the
    model may be None. seed: None is that of the state, or a random one. ttl_s: None is the default.
    """

    id: str | None
    model: str | None
    text: str = ""
    unknown_chars: UnknownChars = "error"
    seed: int | None = None
    ttl_s: float | None = None
    state: str | None = None

    @property
    def origin(self) -> bytes:
        """By which a repetition is known."""
        facts = [self.model, self.text, self.unknown_chars, self.seed, self.ttl_s, self.state]
        return _hash("create", *facts)


class SessionCreator:
    """Creates and forks sessions. Safe for any number of threads.

    Its methods raise what those of `Sessions` do.
    """

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
        """The session, and whether it is new: to create it once more as it was created changes nothing.

        Raises SessionExists, ModelNotFound, UnknownCharacters, InvalidState.
        """
        if new.id is not None and (there := self._created_before(owner, new.id, new.origin)):
            return there, False
        model, seed, transcript, hidden = self._beginning(new)
        ids = model.charset.encode(new.text, new.unknown_chars)
        if len(ids):
            start = transcript.position
            checkpoint_positions = self._retention.checkpoint_positions(start, start + len(ids))
            end, _ = read(model, ids, hidden, start, checkpoint_positions)
            hidden, transcript = (
                end.hidden,
                transcript.extended(model.charset.decode(ids), end.checkpoints, self._retention),
            )
        return self._keep(
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
        """A new session with the same text up to a retained position, None: all of it; and whether it is new.

        Raises SessionExists, PositionConflict, PositionGone.
        """
        origin = _hash("fork", session_id, position, seed)
        if new_id is not None and (there := self._created_before(owner, new_id, origin)):
            return there, False
        with self._runs.leased(owner, session_id, position) as lease:
            session = lease.session
            position = session.position if position is None else position
            check_within(session, position)
            hidden = session.hidden
            if position < session.position:
                hidden = state_at(self._models.for_state(session.model, session.identity), session, position)
        return self._keep(
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

    def _beginning(self, new: NewSession) -> tuple[LoadedModel, int, Transcript, Float32]:
        """Model, seed, transcript and state before the text is read."""
        if new.state is None:
            if new.model is None:
                raise InvalidValue("model: needed without a state", param="model")
            model = self._models.get(new.model)
            seed = new.seed if new.seed is not None else secrets.randbits(_SEED_BITS)
            return model, seed, Transcript(), model.engine.initial_hidden()
        opened = self._sealer.open(new.state)
        header = opened.header
        model = self._models.get(new.model if new.model is not None else header.model)
        hidden = opened.hidden(model.identity, model.state_shape)
        seed = new.seed if new.seed is not None else header.seed
        return model, seed, Transcript.from_state(header.position, hidden), hidden

    def _created_before(self, owner: str, session_id: str, origin: bytes) -> Session | None:
        """The session of this id, if it is there. Raises SessionExists if it was created otherwise."""
        try:
            session = self._store.load(owner, session_id)
        except (SessionNotFound, SessionGone):
            return None
        if session.origin != origin:
            raise SessionExists(f"there is a session {session_id}, which was created otherwise", param="id")
        return session

    def _keep(self, session: Session) -> tuple[Session, bool]:
        try:
            return self._store.create(session), True
        except SessionExists:
            there = self._created_before(session.owner, session.id, session.origin or b"")
            if there is None:
                raise  # it was deleted in the same moment: try again
            return there, False


def _hash(*facts: object) -> bytes:
    return hashlib.sha256(json.dumps(facts).encode()).digest()[:16]

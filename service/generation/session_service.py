"""All operations on sessions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from service.errors import InvalidValue
from service.generation.creation import SessionCreator
from service.generation.feeding import SessionFeeder
from service.generation.reading import state_at
from service.generation.runs import RunRegistry
from service.registry.loaded_models import LoadedModels
from service.sessions.portable import StateHeader, StateSealer
from service.sessions.session import Session
from service.sessions.session_store import SessionStore
from service.sessions.transcript import Retention


class SessionService:
    """The operations on sessions, of which `creation`, `feeding` and `runs` have some. Safe for any number of threads.

    Every method takes the session's owner, and may raise SessionNotFound and SessionGone. Methods that change a session
    or need it unchanged may raise SessionBusy; methods that compute may raise ModelChanged, Overloaded, EngineFailed.
    A store outside the process adds StoreUnavailable, OutcomeUnknown, RevisionConflict and SessionLost.
    """

    def __init__(
        self,
        models: LoadedModels,
        store: SessionStore,
        sealer: StateSealer,
        ttl_s: float,
        retention: Retention,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.runs = RunRegistry(models, store, retention)
        self.creation = SessionCreator(models, store, self.runs, sealer, ttl_s, retention)
        self.feeding = SessionFeeder(models, store, self.runs, retention)
        self._models, self._store, self._sealer, self._clock = models, store, sealer, clock

    def get(self, owner: str, session_id: str) -> Session:
        """Return the session as it was last saved."""
        return self._store.load(owner, session_id)

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """Return up to `limit` of the owner's sessions with ids greater than `after`, in the order of their ids."""
        return self._store.page(owner, after, limit)

    def text(self, owner: str, session_id: str, start: int | None, end: int | None) -> tuple[str, int, int]:
        """Return the text from `start` (default: the first retained position) to `end` (default: the end), and both.

        Raises PositionGone, PositionConflict, InvalidValue.
        """
        session = self._store.load(owner, session_id)
        start = session.transcript.start if start is None else start
        end = session.position if end is None else end
        if start > end:
            raise InvalidValue(f"from: {start} is greater than to, {end}", param="from")
        session.require_within(end, "to")
        return session.transcript.text(start, end), start, end

    def delete(self, owner: str, session_id: str) -> None:
        """Delete the session."""
        with self.runs.lease(owner, session_id) as lease:
            self._store.delete(lease)

    def rewind(self, owner: str, session_id: str, position: int) -> Session:
        """Drop the text after a retained position, and return the session. Raises PositionConflict, PositionGone."""
        with self.runs.lease(owner, session_id, position) as lease:
            session = lease.session
            session.require_within(position)
            if position < session.position:
                model = self._models.for_state(session.model, session.identity)
                hidden, transcript = state_at(model, session, position), session.transcript.truncate(position)
                run = session.finished_run
                run = run if run is not None and run.end is not None and run.end <= position else None
                session = replace(session, hidden=hidden, transcript=transcript, run=run)
            self._store.save(lease, session, release=True)
            return session

    def export(self, owner: str, session_id: str, ttl_s: float | None) -> tuple[str, StateHeader]:
        """Return a portable state and its header. It expires after ttl_s seconds, or never if that is None."""
        with self.runs.lease(owner, session_id) as lease:
            session = lease.session
            header = StateHeader(
                model=session.model,
                identity=session.identity,
                position=session.position,
                seed=session.seed,
                expires_at=self._clock() + ttl_s if ttl_s is not None else None,
            )
            return self._sealer.seal(header, session.hidden), header

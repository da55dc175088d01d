"""What can be done with a session."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from service.errors import InvalidValue
from service.generation.creation import SessionCreator
from service.generation.feeding import SessionFeeder
from service.generation.positions import check_within
from service.generation.reading import state_at
from service.generation.runs import RunRegistry, finished
from service.registry.loaded_models import LoadedModels
from service.sessions.portable import StateHeader, StateSealer
from service.sessions.session import Session
from service.sessions.session_store import SessionStore
from service.sessions.transcript import Retention


class SessionService:
    """All that works on sessions; `creation`, `feeding` and `runs` do the rest. Safe for any number of threads.

    Every method takes the owner of what it works on. All of them may raise SessionNotFound and SessionGone; those that
    change something, or need it not to change, SessionBusy; those that step, ModelChanged, Overloaded, EngineFailed.
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
        """As it was saved last."""
        return self._store.load(owner, session_id)

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """The owner's sessions in the order of their ids, those above `after`."""
        return self._store.page(owner, after, limit)

    def text(self, owner: str, session_id: str, start: int | None, end: int | None) -> tuple[str, int, int]:
        """Retained text from start to end, None: all there is; and from where to where that is.

        Raises PositionGone, PositionConflict.
        """
        session = self._store.load(owner, session_id)
        start = session.transcript.start if start is None else start
        end = session.position if end is None else end
        if start > end:
            raise InvalidValue(f"from: {start} lies behind the end, {end}", param="from")
        check_within(session, end, "to")
        return session.transcript.text(start, end), start, end

    def delete(self, owner: str, session_id: str) -> None:
        """Forget it."""
        with self.runs.leased(owner, session_id) as lease:
            self._store.delete(lease)

    def rewind(self, owner: str, session_id: str, position: int) -> Session:
        """Back to a retained position. Raises PositionConflict, PositionGone."""
        with self.runs.leased(owner, session_id, position) as lease:
            session = lease.session
            check_within(session, position)
            if position < session.position:
                model = self._models.for_state(session.model, session.identity)
                hidden, transcript = state_at(model, session, position), session.transcript.truncate(position)
                run = finished(session)
                run = run if run is not None and run.end is not None and run.end <= position else None
                session = replace(session, hidden=hidden, transcript=transcript, run=run)
            self._store.save(lease, session, release=True)
            return session

    def export(self, owner: str, session_id: str, ttl_s: float | None) -> tuple[str, StateHeader]:
        """A portable state, good for ttl_s seconds, None: without end; and what it says about itself."""
        with self.runs.leased(owner, session_id) as lease:
            session = lease.session
            header = StateHeader(
                model=session.model,
                identity=session.identity,
                position=session.position,
                seed=session.seed,
                expires_at=self._clock() + ttl_s if ttl_s is not None else None,
            )
            return self._sealer.seal(header, session.hidden), header

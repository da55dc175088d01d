"""Continuations of sessions: begun, taken up again, and taken over from connections that are gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from service.engine.request import Handle
from service.errors import (
    GruServeError,
    ModelChanged,
    NoRun,
    PositionConflict,
    SessionBusy,
)
from service.generation.active_run import ActiveRun
from service.generation.positions import check_position
from service.generation.replay import remaining_request, replayed
from service.generation.run_request import RunRequest
from service.generation.run_stream import RunStream
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.outcome import repeatable
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease, SessionStore
from service.sessions.transcript import Retention

_POLL_S = 0.01  # how often is looked whether runs are over
_ATTEMPTS = 3  # to take a run over, when others try the same


class RunRegistry:
    """The runs under way in this process, and how they begin and end. Safe for any number of threads."""

    def __init__(self, models: LoadedModels, store: SessionStore, retention: Retention) -> None:
        self._models, self._store, self._retention = models, store, retention
        self._live: dict[tuple[str, str], ActiveRun] = {}
        self.are_ending = False

    @contextmanager
    def leased(self, owner: str, session_id: str, position: int | None = None) -> Iterator[Lease]:
        """A session for one operation. Raises SessionBusy, SessionNotFound, SessionGone.

        position: how far the caller has seen the text. A run that was cut before is drawn again up to there.
        """
        lease = self._lease(owner, session_id)
        try:
            lease.session = self._replayed(lease.session, position)
            yield lease
        finally:
            self._store.release(lease)

    def generate(
        self,
        owner: str,
        session_id: str,
        request: RunRequest,
        position: int | None,
        client_has_left: Callable[[], bool] = lambda: False,
    ) -> RunStream:
        """Continue a session, or, if position says that this was asked for before, take that up again.

        Raises SessionBusy, SessionNotFound, SessionGone, PositionConflict, ModelChanged, Overloaded, EngineFailed.
        """
        begun = self._begin_at_once(owner, session_id, request, position, client_has_left)
        if begun is not None:
            return begun
        try:
            lease = self._lease(owner, session_id)
        except SessionBusy:
            if not request.made_last_of(self._store.load(owner, session_id), position):
                raise
            lease = self._take_over(owner, session_id)
        with self._released_on_failure(lease):
            if request.made_last_of(lease.session, position):
                return self._take_up(lease, position, client_has_left)
            session = self._replayed(lease.session, position)
            check_position(session, position)
            return self._begin(lease, session, request.run_of(session), session.position, client_has_left)

    def cached_copy(self, owner: str, session_id: str, position: int | None) -> Session | None:
        """See SessionStore. None also if it is in use, or not as long as the caller says."""
        session = self._store.cached_copy(owner, session_id) if (owner, session_id) not in self._live else None
        return session if session is not None and position in (None, session.position) else None

    def resume(
        self,
        owner: str,
        session_id: str,
        after: int | None,
        client_has_left: Callable[[], bool] = lambda: False,
    ) -> RunStream:
        """The last run after a position, None: all of it; one that was cut goes on. Whoever has it now loses it.

        Raises NoRun, PositionGone and what `generate` raises.
        """
        lease = self._take_over(owner, session_id)
        with self._released_on_failure(lease):
            return self._take_up(lease, after, client_has_left)

    @contextmanager
    def _released_on_failure(self, lease: Lease) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._store.release(lease)
            raise

    def _take_up(self, lease: Lease, after: int | None, client_has_left: Callable[[], bool]) -> RunStream:
        """The last run after a position, from whoever had it."""
        session = lease.session
        run, start = _resumable(session, after)
        if run.finish_reason is None:
            return self._begin(lease, session, run, start, client_has_left)
        self._store.release(lease)
        return RunStream(session, run, start, None)

    def end_all(self, timeout_s: float) -> None:
        """Interrupt all runs, also those that begin from now on; they can be taken up in another process.

        Who takes from them saves them. Those of whom nobody has done so in time, because he waits for a client that
        reads nothing, are saved here.
        """
        self.are_ending = True
        for live in list(self._live.values()):
            live.interrupt()
        deadline = time.monotonic() + timeout_s
        while self._live and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for live in list(self._live.values()):
            with suppress(GruServeError):  # one that can't be saved is not to keep the others from it
                live.stop()

    def _take_over(self, owner: str, session_id: str) -> Lease:
        """The lease of a session whose run, if it has one, is stopped."""
        for _ in range(_ATTEMPTS):
            live = self._live.get((owner, session_id))
            if live is not None:
                live.stop()
            with suppress(SessionBusy):
                return self._store.lease(owner, session_id, take_over=True)
        return self._store.lease(owner, session_id, take_over=True)

    def _replayed(self, session: Session, position: int | None) -> Session:
        if position is None or position <= session.position or finished(session) is session.run:
            return session
        try:
            model = self._models.for_state(session.model, session.identity)
        except ModelChanged:
            return session  # whoever needs the model meets this again
        return replayed(model, session, position, self._retention)

    def _lease(self, owner: str, session_id: str) -> Lease:
        try:
            return self._store.lease(owner, session_id)
        except SessionBusy:
            live = self._live.get((owner, session_id))
            if live is None or not live.client_has_left():
                raise
            live.stop()  # its thread has not noticed yet
            return self._store.lease(owner, session_id)

    def _begin(
        self, lease: Lease, session: Session, run: Run, after: int, client_has_left: Callable[[], bool]
    ) -> RunStream:
        """Let a run go on. On failure the lease is the caller's to release."""
        model, handle = self._submit(session, run)
        try:
            session = replace(session, run=run)
            with repeatable():
                session = replace(session, revision=self._store.save(lease, session))
        except BaseException:
            handle.cancel()
            raise
        return self._watched(model, lease, session, run, handle, after, client_has_left)

    def _begin_at_once(
        self,
        owner: str,
        session_id: str,
        request: RunRequest,
        position: int | None,
        client_has_left: Callable[[], bool],
    ) -> RunStream | None:
        """With one question to the store, if the session stands as it was seen last. None: go the long way."""
        session = self.cached_copy(owner, session_id, position)
        if session is None or request.made_last_of(session, position):
            return None
        run = request.run_of(session)
        try:
            model, handle = self._submit(session, run)
        except GruServeError:
            return None  # of a session that others may have changed
        try:
            with repeatable():
                lease = self._store.compare_and_save(session, replace(session, run=run))
        except BaseException:
            handle.cancel()
            raise
        if lease is None:
            handle.cancel()
            return None
        return self._watched(model, lease, lease.session, run, handle, session.position, client_has_left)

    def _submit(self, session: Session, run: Run) -> tuple[LoadedModel, Handle]:
        """Let the engine generate what is left of a run."""
        model = self._models.for_state(session.model, session.identity)
        request = remaining_request(model, session, run, self._retention, run.start + run.max_chars)
        return model, model.engine.submit([request])[0]

    def _watched(
        self,
        model: LoadedModel,
        lease: Lease,
        session: Session,
        run: Run,
        handle: Handle,
        after: int,
        client_has_left: Callable[[], bool],
    ) -> RunStream:
        """A run that is saved and under way."""
        live = ActiveRun(
            model, self._store, self._retention, lease, session, run, handle, client_has_left, self._forget
        )
        lease.on_takeover = live.stop
        self._live[session.owner, session.id] = live
        if self.are_ending:
            live.interrupt()
        return RunStream(session, run, after, live)

    def _forget(self, live: ActiveRun) -> None:
        key = (live.session.owner, live.session.id)
        if self._live.get(key) is live:
            del self._live[key]


def finished(session: Session) -> Run | None:
    """Its last run, if it is over: one that was cut can't go on in a text that has changed."""
    return session.run if session.run is not None and session.run.finish_reason is not None else None


def _resumable(session: Session, after: int | None) -> tuple[Run, int]:
    """The last run, and after which position to tell it. Raises NoRun, PositionConflict, PositionGone."""
    run = session.run
    if run is None:
        raise NoRun("the session has no continuation to take up, or its text has been changed since")
    after = run.start if after is None else after
    # One that was cut goes on, also from what was sent and not saved any more.
    end = run.end if run.end is not None else run.start + run.max_chars
    if after > end:
        raise PositionConflict(f"the continuation ends at position {end}, not {after}", end, param="after")
    session.transcript.nearest_checkpoint(min(after, run.start))
    return run, after

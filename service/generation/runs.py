"""Continuations of sessions: how they start, are resumed, and are taken over from other connections.

A run that was interrupted, for instance by the death of its server, can be generated again anywhere: the same model,
state, settings and seed give the same characters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np

from service.engine.request import Handle, Request
from service.engine.sampling_settings import SamplingSettings
from service.engine.stop import completed
from service.errors import (
    GruServeError,
    ModelChanged,
    NoRun,
    PositionConflict,
    SessionBusy,
)
from service.generation.reading import stop_ids
from service.generation.run_stream import ActiveRun, RunStream
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease, SessionStore, safe_to_retry
from service.sessions.transcript import Retention

_POLL_S = 0.01  # between two checks whether all runs are over
_ATTEMPTS = 3  # to take a session over while others try the same
_NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class RunRequest:
    """How to continue a session."""

    max_chars: int
    sampling: SamplingSettings
    stops: tuple[str, ...] = ()
    seed: int | None = None  # None for the session's seed

    def new_run(self, session: Session) -> Run:
        """Return the run that this request starts at the end of a session."""
        context = ""
        if self.sampling.repetition_penalty != 1:
            text = session.transcript.text(session.transcript.start, session.position)
            context = "".join(sorted(set(text)))
        return Run(session.position, self.max_chars, self._seed(session), self.sampling, self.stops, context)

    def matches_last_run(self, session: Session, position: int | None) -> bool:
        """Whether the session's last run was started by an equal request at this position."""
        run, expected = session.run, (position, self.max_chars, self.sampling, self.stops, self._seed(session))
        return run is not None and (run.start, run.max_chars, run.sampling, run.stops, run.seed) == expected

    def _seed(self, session: Session) -> int:
        return self.seed if self.seed is not None else session.seed


class RunRegistry:
    """Starts, resumes and ends runs, and knows the active runs of this process. Safe for any number of threads."""

    def __init__(self, models: LoadedModels, store: SessionStore, retention: Retention) -> None:
        self._models, self._store, self._retention = models, store, retention
        self._active: dict[tuple[str, str], ActiveRun] = {}  # by owner and id of the session
        self.is_draining = False

    @contextmanager
    def lease(self, owner: str, session_id: str, position: int | None = None) -> Iterator[Lease]:
        """Lease a session for one operation. Raises SessionBusy, SessionNotFound, SessionGone.

        position: length of the text that the client has seen. The rest of an interrupted run is generated again up to
        this position; the lease's session then has more text than the stored one.
        """
        lease = self._acquire_lease(owner, session_id)
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
        """Continue a session. If an equal request started the last run at `position`, resume that run instead.

        client_has_left: whether the client has closed its connection. Then another operation may stop the run.

        Raises SessionBusy, SessionNotFound, SessionGone, PositionConflict, ModelChanged, Overloaded, EngineFailed.
        """
        started = self._start_from_cache(owner, session_id, request, position, client_has_left)
        if started is not None:
            return started
        try:
            lease = self._acquire_lease(owner, session_id)
        except SessionBusy:
            if not request.matches_last_run(self._store.load(owner, session_id), position):
                raise
            lease = self._take_over(owner, session_id)
        with self._released_on_failure(lease):
            if request.matches_last_run(lease.session, position):
                return self._resume(lease, position, client_has_left)
            session = self._replayed(lease.session, position)
            session.require_position(position)
            return self._start(lease, session, request.new_run(session), session.position, client_has_left)

    def cached_copy(self, owner: str, session_id: str, position: int | None) -> Session | None:
        """See SessionStore. None also if a run is active here, or if the copy isn't at `position`."""
        session = self._store.cached_copy(owner, session_id) if (owner, session_id) not in self._active else None
        return session if session is not None and position in (None, session.position) else None

    def resume(
        self,
        owner: str,
        session_id: str,
        after: int | None,
        client_has_left: Callable[[], bool] = lambda: False,
    ) -> RunStream:
        """Stream the last run from `after` (default: its start), resuming it if it was interrupted.

        Takes it over from any other connection. Raises NoRun, PositionGone and the errors of `generate`.
        """
        lease = self._take_over(owner, session_id)
        with self._released_on_failure(lease):
            return self._resume(lease, after, client_has_left)

    @contextmanager
    def _released_on_failure(self, lease: Lease) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._store.release(lease)
            raise

    def _resume(self, lease: Lease, after: int | None, client_has_left: Callable[[], bool]) -> RunStream:
        session = lease.session
        run, start = _resumable_run(session, after)
        if run.finish_reason is None:
            return self._start(lease, session, run, start, client_has_left)
        self._store.release(lease)
        return RunStream(session, run, start, None)

    def interrupt_all(self, timeout_s: float) -> None:
        """Interrupt all runs, also those that start from now on. They can be resumed in another process.

        The thread that streams a run saves it. Runs whose thread is blocked on a slow client are saved here after
        `timeout_s`.
        """
        self.is_draining = True
        for active in list(self._active.values()):
            active.interrupt()
        deadline = time.monotonic() + timeout_s
        while self._active and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for active in list(self._active.values()):
            with suppress(GruServeError):  # the other runs must be saved all the same
                active.stop()

    def _take_over(self, owner: str, session_id: str) -> Lease:
        """Stop the session's active run, if it has one in this process or another, and lease the session."""
        for _ in range(_ATTEMPTS):
            active = self._active.get((owner, session_id))
            if active is not None:
                active.stop()
            with suppress(SessionBusy):
                return self._store.lease(owner, session_id, take_over=True)
        return self._store.lease(owner, session_id, take_over=True)

    def _replayed(self, session: Session, position: int | None) -> Session:
        if position is None or position <= session.position or session.finished_run is session.run:
            return session
        try:
            model = self._models.for_state(session.model, session.identity)
        except ModelChanged:
            return session  # an operation that needs the model raises this again
        return replayed(model, session, position, self._retention)

    def _acquire_lease(self, owner: str, session_id: str) -> Lease:
        try:
            return self._store.lease(owner, session_id)
        except SessionBusy:
            active = self._active.get((owner, session_id))
            if active is None or not active.client_has_left():
                raise
            active.stop()  # the thread that streams it has not noticed yet that the client has left
            return self._store.lease(owner, session_id)

    def _start(
        self, lease: Lease, session: Session, run: Run, after: int, client_has_left: Callable[[], bool]
    ) -> RunStream:
        """Start a run or the rest of one, and save that it has started. The caller releases the lease if this fails."""
        model, handle = self._submit(session, run)
        try:
            session = replace(session, run=run)
            with safe_to_retry():
                session = replace(session, revision=self._store.save(lease, session))
        except BaseException:
            handle.cancel()
            raise
        return self._register(model, lease, session, run, handle, after, client_has_left)

    def _start_from_cache(
        self,
        owner: str,
        session_id: str,
        request: RunRequest,
        position: int | None,
        client_has_left: Callable[[], bool],
    ) -> RunStream | None:
        """Start a run with one exchange with the store. None if the cached copy can't be used: use a lease then."""
        session = self.cached_copy(owner, session_id, position)
        if session is None or request.matches_last_run(session, position):
            return None
        run = request.new_run(session)
        try:
            model, handle = self._submit(session, run)
        except GruServeError:
            return None  # the copy may be stale, and the error with it
        try:
            with safe_to_retry():
                lease = self._store.compare_and_save(session, replace(session, run=run))
        except BaseException:
            handle.cancel()
            raise
        if lease is None:
            handle.cancel()
            return None
        return self._register(model, lease, lease.session, run, handle, session.position, client_has_left)

    def _submit(self, session: Session, run: Run) -> tuple[LoadedModel, Handle]:
        """Submit the rest of a run to the engine."""
        model = self._models.for_state(session.model, session.identity)
        request = remaining_request(model, session, run, self._retention, run.start + run.max_chars)
        return model, model.engine.submit([request])[0]

    def _register(
        self,
        model: LoadedModel,
        lease: Lease,
        session: Session,
        run: Run,
        handle: Handle,
        after: int,
        client_has_left: Callable[[], bool],
    ) -> RunStream:
        """Register a run that is saved and submitted, and return its stream."""
        active = ActiveRun(
            model, self._store, self._retention, lease, session, run, handle, client_has_left, self._unregister
        )
        lease.on_takeover = active.stop
        self._active[session.owner, session.id] = active
        if self.is_draining:
            active.interrupt()
        return RunStream(session, run, after, active)

    def _unregister(self, active: ActiveRun) -> None:
        key = (active.session.owner, active.session.id)
        if self._active.get(key) is active:
            del self._active[key]


def remaining_request(model: LoadedModel, session: Session, run: Run, retention: Retention, end: int) -> Request:
    """Return the engine's request for the rest of a run, from the session's position up to `end`."""
    generated = session.transcript.text(run.start, session.position)
    return Request(
        prompt=_NO_IDS,
        max_chars=end - session.position,
        seed=run.seed,
        sampling=run.sampling,
        stops=stop_ids(model.charset, run.stops),
        hidden=session.hidden,
        position=session.position,
        history_prompt=model.charset.exact(run.context),
        generated=model.charset.exact(generated),
        checkpoint_positions=retention.checkpoint_positions(session.position, end),
    )


def replayed(model: LoadedModel, session: Session, position: int, retention: Retention) -> Session:
    """Return the session as it was at a later position of its interrupted run, by generating the characters again.

    Returns it unchanged if the run doesn't reach that position. Raises Overloaded, EngineFailed.
    """
    run = session.run
    if run is None or run.finish_reason is not None or not session.position < position <= run.start + run.max_chars:
        return session
    handle = model.engine.submit([remaining_request(model, session, run, retention, position)])[0]
    part, end = handle.read(None), handle.wait()
    text = model.charset.decode(part.chars) if part is not None else ""
    if end.position < position or completed(session.transcript.text(run.start, session.position) + text, run.stops):
        return session
    return replace(session, hidden=end.hidden, transcript=session.transcript.extend(text, end.checkpoints, retention))


def _resumable_run(session: Session, after: int | None) -> tuple[Run, int]:
    """Return the last run and the position from which it is sent. Raises NoRun, PositionConflict, PositionGone."""
    run = session.run
    if run is None:
        raise NoRun("the session has no continuation to resume, or its text has been changed since")
    after = run.start if after is None else after
    # An interrupted run can also be resumed after its saved end: those characters were sent before they were lost.
    end = run.end if run.end is not None else run.start + run.max_chars
    if after > end:
        raise PositionConflict(f"the continuation ends at position {end}, not {after}", end, param="after")
    session.transcript.nearest_checkpoint(min(after, run.start))
    return run, after

"""Runs of sessions: how they start, are resumed, taken over and interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog

from service.engine.automaton.form import Form
from service.engine.handle import Handle
from service.engine.sampling_settings import SamplingSettings
from service.errors import (
    GruServeError,
    ModelChanged,
    NoRun,
    OutcomeUnknown,
    PositionConflict,
    SessionBusy,
    StoreUnavailable,
)
from service.generation.automata import automaton_of, require_chars
from service.generation.reader import Reader, with_biases, written_stops
from service.generation.run_stream import ActiveRun, RunStream
from service.model.charset import Charset, UnknownChars
from service.periodic import PeriodicThread
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.session import Run, Session, SessionKey, digest_of
from service.sessions.session_store import SessionStore
from service.shares import current_client

log = structlog.get_logger(__name__)

_POLL_S = 0.01  # between two checks whether all runs have ended
_ROUNDS = 4  # in each save interval: what is saved is at most one round old
SAVE_INTERVAL_S = 1.0
_SHORT_CHARS = 256  # even among 256 others, a run of this length takes less than the save interval
_TAKEOVER_ATTEMPTS = 4  # other connections may take the same run over in the meantime

Result = TypeVar("Result")


@dataclass(frozen=True)
class RunRequest:
    """How to continue a session."""

    max_chars: int
    sampling: SamplingSettings
    stops: tuple[str, ...] = ()
    seed: int | None = None  # None for the session's seed
    # (character, added to its logit) pairs. They get ids with the session's model when the run starts, because until
    # then another request may move the session to another model. `sampling` has no biases.
    biases: tuple[tuple[str, float], ...] = ()
    unknown_chars: UnknownChars = "error"  # what happens to unknown characters of `stops` and `biases`
    min_chars: int = 0  # none of the first `min_chars` characters completes a stop string
    includes_stop: bool = False  # the stop string that ends the run becomes part of the text
    stop_ids: tuple[int, ...] = ()  # of characters that end the run; they become `stops` as `biases` do
    allowed: tuple[int, ...] | None = None  # ids of the only characters that the run may draw; the same
    form: Form | None = None  # of what the run generates; None for any

    @property
    def needs_charset(self) -> bool:
        """Whether the request has what only the session's model gives a meaning to, besides stop strings."""
        return bool(self.biases or self.stop_ids or self.allowed)

    def for_charset(self, charset: Charset) -> RunRequest:
        """Return the request with its biases and ids in `sampling`, and its stop strings as the model writes them.

        Raises Overloaded, UnknownCharacters, InvalidValue, also if the model can't write the form within `max_chars`.
        """
        sampling = with_biases(self.sampling, charset, dict(self.biases), self.unknown_chars, self.allowed)
        stops = written_stops(charset, self.stops, self.unknown_chars, self.stop_ids)
        if self.form is not None:
            require_chars(automaton_of(charset, self.form, sampling.allowed, stops), self.max_chars)
        return replace(self, sampling=sampling, stops=stops, biases=(), stop_ids=(), allowed=None)

    def new_run(self, session: Session) -> Run:
        """Return the run that this request starts at the end of a session."""
        context = ""
        if self.sampling.repetition_penalty != 1:
            text = session.text.slice(session.text.start, session.position)
            context = "".join(sorted(set(text)))
        return Run(
            session.position,
            self.max_chars,
            self._seed(session),
            self.sampling,
            self.stops,
            context,
            min_chars=self.min_chars,
            includes_stop=self.includes_stop,
            form=self.form,
        )

    def matches_last_run(self, session: Session, position: int | None) -> bool:
        """Whether the session's last run was started by an equal request at this position."""
        run = session.run
        if run is None or run.start != position:
            return False
        if run.form_digest != digest_of(self.form):
            return False
        expected = (self.max_chars, self.sampling, self.stops, self._seed(session), self.min_chars, self.includes_stop)
        return (run.max_chars, run.sampling, run.stops, run.seed, run.min_chars, run.includes_stop) == expected

    def _seed(self, session: Session) -> int:
        return self.seed if self.seed is not None else session.seed


class RunRegistry:
    """The active runs of this process: begins, resumes, saves and ends them. Any number of threads may call.

    Args:
        models: Their engines generate.
        store: Where the sessions are.
        reader: Makes the sessions' texts longer.
        save_interval_s: How old the last save of an active run may become, in a store that outlives this process. 0: it
            is saved at its start and its end only.
    """

    def __init__(
        self, models: LoadedModels, store: SessionStore, reader: Reader, save_interval_s: float = SAVE_INTERVAL_S
    ) -> None:
        self._models, self._store, self._reader = models, store, reader
        self._save_interval_s = save_interval_s
        self._active: dict[SessionKey, ActiveRun] = {}
        self.is_draining = False
        self._saver: PeriodicThread | None = None
        if store.outlives_process and save_interval_s:
            self._saver = PeriodicThread("saving-runs", save_interval_s / _ROUNDS, self._save_progress)

    def close(self) -> None:
        """End the thread that saves runs on their way. Harmless if it was ended before."""
        if self._saver is not None:
            self._saver.close()

    def generate(
        self,
        key: SessionKey,
        request: RunRequest,
        position: int | None,
        client_has_left: Callable[[], bool] = lambda: False,
        *,
        as_whole: bool = False,
    ) -> RunStream:
        """Continue a session; or, if `position` says that this is a repeated request, resume the run that it began.

        as_whole: The client gets nothing before the run's end. A short run is then a change like a feed: it is saved
            once, with its text.

        Raises SessionBusy, SessionNotFound, SessionGone, PositionConflict, ModelChanged, UnknownCharacters,
        InvalidValue, Overloaded, EngineFailed.
        """

        def choose(session: Session) -> tuple[Session, Run, int]:
            wanted = self._in_its_charset(request, session)
            if wanted.matches_last_run(session, position):
                return session, *_resumable(session, position)
            session = self.replayed(session, position)
            session.require_position(position)
            return session, wanted.new_run(session), session.position

        def change(session: Session) -> tuple[Session, RunStream]:
            chosen, run, after = choose(session)
            if run.is_finished:
                return session, RunStream(session, run, after, None)
            model = self._models.for_state(chosen.model, chosen.identity)
            text, run, handle = self._reader.generate(model, chosen.text, run, client_has_left)
            session = replace(chosen, text=text, run=run)
            return session, RunStream(session, run, after, None, handle)

        if request.form is not None:
            # Before the session is leased: a form that was not used lately is compiled, and may be refused.
            self._in_its_charset(request, self._store.load(key))
        start = _Start(self._models, self._reader, choose)
        begin = partial(self._begin, key, start, client_has_left)
        if as_whole and request.max_chars <= _SHORT_CHARS:
            begin = partial(self._store.update, key, change, idempotent=position is not None)
        try:
            return self.without_left_client(key, begin)
        except SessionBusy:
            session = self._store.load(key)
            if not self._in_its_charset(request, session).matches_last_run(session, position):
                raise
            return self._take_over(session, start, client_has_left)

    def _in_its_charset(self, request: RunRequest, session: Session) -> RunRequest:
        """Return `request.for_charset` of the session's model. Raises ModelChanged, UnknownCharacters, InvalidValue."""
        if not (request.needs_charset or request.stops or request.form):
            return request
        try:
            charset = self._models.for_state(session.model, session.identity).charset
        except ModelChanged:
            if request.needs_charset:
                raise
            return request  # a finished run can be sent again; anything else raises this again
        return request.for_charset(charset)

    def resume(
        self,
        key: SessionKey,
        after: int | None,
        client_has_left: Callable[[], bool] = lambda: False,
        *,
        take_over: bool = True,
    ) -> RunStream:
        """Stream the last run from `after` (default: its start), resuming it if it was interrupted.

        Takes it over from any other connection; without `take_over`, only from one whose client has left. Raises NoRun,
        PositionGone and what `generate` raises.
        """
        start = _Start(self._models, self._reader, lambda session: (session, *_resumable(session, after)))
        if take_over:
            return self._take_over(self._store.load(key), start, client_has_left)
        return self.without_left_client(key, lambda: self._begin(key, start, client_has_left))

    def replayed(self, session: Session, position: int | None) -> Session:
        """Return the session at a later position of its unfinished run, which the client says it has received.

        Generates the missing characters again. Returns the session itself if the run doesn't reach that position.
        """
        run = session.run
        if position is None or position <= session.position or run is None or run.is_finished:
            return session
        try:
            model = self._models.for_state(session.model, session.identity)
        except ModelChanged:
            return session  # an operation that needs the model raises this again
        text = self._reader.replay(model, session.text, run, position)
        return session if text is session.text else replace(session, text=text)

    def without_left_client(self, key: SessionKey, operation: Callable[[], Result]) -> Result:
        """Do something that needs the session's lease. Stop a run of this process in the way whose client has left."""
        try:
            return operation()
        except SessionBusy:
            active = self._active.get(key)
            if active is None or not active.client_has_left():
                raise
            active.stop()  # its thread has not noticed yet
            return operation()

    def interrupt_all(self, timeout_s: float) -> None:
        """Interrupt all runs, also those that begin from now on; they can be resumed in another process.

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
            with suppress(GruServeError):  # one that can't be saved must not keep the others from it
                active.stop()

    def _save_progress(self) -> None:
        for active in list(self._active.values()):
            try:
                active.save_progress(self._save_interval_s)
            except (StoreUnavailable, OutcomeUnknown):
                continue  # the store has logged it; the next round tries again
            except Exception as error:
                log.error("saving an active run failed", exc_info=error)

    def _take_over(self, session: Session, start: _Start, client_has_left: Callable[[], bool]) -> RunStream:
        """Begin a run that another connection may stream, as soon as it has handed the session over.

        What can be refused is refused first, by the session as it is saved now: the other stream then continues.
        """
        key = session.key
        start.require(session, needs_room=key not in self._active)
        for attempt in range(_TAKEOVER_ATTEMPTS):
            active = self._active.get(key)
            if active is not None:
                active.stop()
            try:
                return self._begin(key, start, client_has_left, take_over=True)
            except SessionBusy:
                if attempt == _TAKEOVER_ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _begin(
        self, key: SessionKey, start: _Start, client_has_left: Callable[[], bool], *, take_over: bool = False
    ) -> RunStream:
        try:
            lease, chosen = self._store.begin(key, start, take_over=take_over)
        except BaseException:
            start.cancel()
            raise
        if lease is None or chosen.model is None or chosen.handle is None:
            return RunStream(chosen.session, chosen.run, chosen.after, None)
        active = ActiveRun(chosen.model, self._reader, lease, chosen.handle, client_has_left, self._unregister)
        lease.on_takeover = active.stop
        self._active[key] = active
        if self.is_draining:
            active.interrupt()
        return RunStream(lease.session, chosen.run, chosen.after, active)

    def _unregister(self, active: ActiveRun) -> None:
        key = active.session.key
        if self._active.get(key) is active:
            del self._active[key]


@dataclass(frozen=True)
class _Chosen:
    """What a start has chosen to do with a session."""

    session: Session
    run: Run
    after: int  # the position after which the client wants the text
    model: LoadedModel | None = None
    handle: Handle | None = None  # None if the run is finished


class _Start:
    """The change that begins or resumes a run: it submits the run to the engine.

    A store may call it again on a later copy of the session; then what was submitted before is cancelled.
    """

    def __init__(
        self, models: LoadedModels, reader: Reader, choose: Callable[[Session], tuple[Session, Run, int]]
    ) -> None:
        """choose: returns the session at which the run continues, the run, and after which position to stream it."""
        self._models, self._reader, self._choose = models, reader, choose
        self._handle: Handle | None = None

    def __call__(self, session: Session) -> tuple[Session, _Chosen]:
        self.cancel()
        chosen, run, after = self._choose(session)
        if run.is_finished:
            return session, _Chosen(session, run, after)
        model = self._models.for_state(chosen.model, chosen.identity)
        request = self._reader.remaining_request(model, chosen.text, run, run.start + run.max_chars)
        self._handle = model.engine.submit([request])[0]
        return replace(chosen, run=run), _Chosen(chosen, run, after, model, self._handle)

    def require(self, session: Session, *, needs_room: bool) -> None:
        """Raise what a call with this session would raise, without submitting the run.

        needs_room: Also if the engine has no room for it.
        """
        chosen, run, _ = self._choose(session)
        if run.is_finished:
            return
        model = self._models.for_state(chosen.model, chosen.identity)
        if needs_room:
            model.engine.require_room(current_client())

    def cancel(self) -> None:
        """Cancel what was submitted and not begun."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _resumable(session: Session, after: int | None) -> tuple[Run, int]:
    """Return the last run, and the position after which to stream it. Raises NoRun, PositionConflict, PositionGone."""
    run = session.run
    if run is None:
        raise NoRun("the session has no continuation to resume, or its text has been changed since: start one")
    after = run.start if after is None else after
    # An interrupted run is resumed even from a position that was sent and not saved.
    end = run.end if run.end is not None else run.start + run.max_chars
    if after > end:
        raise PositionConflict(f"the continuation ends at position {end}, not {after}", session.position, param="after")
    session.text.nearest_checkpoint(min(after, run.start))
    return run, after

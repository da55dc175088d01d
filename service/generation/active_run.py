"""A run of a session while the engine is at it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import structlog

from service.engine.request import Handle
from service.engine.stepper import StepResult
from service.engine.stop import completed
from service.errors import EngineFailed, GruServeError, RunTakenOver
from service.generation.reading import state_in
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease, SessionStore
from service.sessions.transcript import Retention

log = structlog.get_logger(__name__)


class ActiveRun:
    """Gives out characters as they come; saves the session and gives its lease back when it ends, however it ends.

    One thread takes characters. Any other may stop it, also while the first one is stuck in sending to a client that no
    longer reads: whoever sees the end first does what is to be done then.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: SessionStore,
        retention: Retention,
        lease: Lease,
        session: Session,
        run: Run,
        handle: Handle,
        client_has_left: Callable[[], bool],
        forget: Callable[[ActiveRun], None],
    ) -> None:
        self.session = session  # as it was at the beginning; after the end, as it is saved
        self.is_over = False
        self.is_interrupted = False
        self._was_stopped = False
        self._is_whole = False  # who takes from it wants all or nothing
        self.client_has_left = client_has_left
        self.engine = model.engine
        self._model, self._store, self._retention = model, store, retention
        self._lease, self._run, self._handle, self._forget = lease, run, handle, forget
        self._generated = ""
        self._lock = threading.Lock()  # of who takes from the handle, and of the end

    def read(self, flush_interval_s: float | None, timeout_s: float | None) -> str:
        """The characters since the last call, waited for as by `Handle.read`. With the last ones, it `is_over`.

        Raises RunTakenOver, EngineFailed, and what saving raises.
        """
        with self._lock:
            self._is_whole = flush_interval_s is None
            text = "" if self.is_over else self._take(flush_interval_s, timeout_s)
            if self._was_stopped and not self.is_interrupted:
                raise RunTakenOver("another connection has taken up this text, or it was stopped")
            return text

    def interrupt(self) -> None:
        """Ask the engine to leave it at the next tick. Who takes characters gets the last ones, and then Draining."""
        self.is_interrupted = True
        self._handle.cancel()

    def stop(self) -> None:
        """End it where it stands, at the next tick. Returns when the session is saved. Harmless at any time.

        If it can't be saved, it stands where it was saved last, and the run can be taken up from there.
        """
        self._was_stopped |= not self.is_over
        self._handle.cancel()
        with self._lock:
            try:
                if not self.is_over:
                    self._take(None, None)
            except GruServeError as error:
                log.warning("a stopped continuation was not saved", error=error.code)

    def _take(self, flush_interval_s: float | None, timeout_s: float | None) -> str:
        try:
            text = self._decoded(self._handle.read(flush_interval_s, timeout_s))
            if self._handle.end is not None:
                text += self._decoded(self._handle.read(0.0))  # what came in between these two lines
        except EngineFailed:
            self._end()  # the session stands as it did before the run, which can be taken up elsewhere
            raise
        self._generated += text
        if self._handle.end is not None:
            try:
                if not self._is_given_up():
                    self.session = self._ended()
                    self._store.save(self._lease, self.session, release=True)
            finally:
                self._end()
        return text

    def _decoded(self, part: StepResult | None) -> str:
        return self._model.charset.decode(part.chars) if part is not None else ""

    def _is_given_up(self) -> bool:
        """Whether the session is to stand as before: an answer that is all or nothing can't be had to its end here."""
        return self._is_whole and self.is_interrupted and self._handle.wait().reason == "cancelled"

    def _ended(self) -> Session:
        """The session after the run."""
        end, run, before = self._handle.wait(), self._run, self.session.transcript
        text, hidden, stop = self._generated, end.hidden, ""
        if end.reason == "stop":
            stop = completed(before.text(run.start, before.position) + text, run.stops)
        # The text ends before the stop string, which may have begun before this part of the run.
        num_left = len(text) - len(stop)
        if num_left >= 0:
            transcript = before.extended(text[:num_left], end.checkpoints, self._retention)
        else:
            transcript = before.truncate(before.position + num_left)
        if stop:
            hidden = state_in(self._model, transcript, transcript.position, already_admitted=True)
        if end.reason != "cancelled":
            run = replace(run, finish_reason=end.reason, end=transcript.position)
        return replace(self.session, hidden=hidden, transcript=transcript, run=run)

    def _end(self) -> None:
        self.is_over = True
        self._store.release(self._lease)
        self._forget(self)

"""A run of a session while the engine generates it, and its text as one connection receives it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import structlog

from service.engine.pace import flush_interval
from service.engine.request import Handle
from service.engine.stepper import FinishReason, StepResult
from service.engine.stop import StopFilter, completed
from service.errors import Draining, EngineFailed, GruServeError, RunTakenOver
from service.generation.reading import state_in
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease, SessionStore
from service.sessions.transcript import Retention

log = structlog.get_logger(__name__)


class ActiveRun:
    """A run that the engine generates. When it ends, in whatever way, it saves the session and releases its lease.

    One thread reads the characters. Any other thread may stop the run, also while the reading thread is blocked on a
    slow client. The thread that sees the end first saves the session.
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
        unregister: Callable[[ActiveRun], None],
    ) -> None:
        """session: as it was saved at the start of the run. unregister: is called once, when the run is over."""
        self.session = session  # as it was saved at the start, and from the end of the run on as it is saved then
        self.is_over = False
        self.is_interrupted = False
        self.client_has_left = client_has_left
        self.engine = model.engine
        self._was_stopped = False
        self._is_all_or_nothing = False  # the reader waits for the whole run, and can't use a part of it
        self._model, self._store, self._retention = model, store, retention
        self._lease, self._run, self._handle, self._unregister = lease, run, handle, unregister
        self._generated = ""
        self._lock = threading.Lock()  # guards reading from the handle, and ending the run

    def read(self, flush_interval_s: float | None, timeout_s: float | None) -> str:
        """Return the characters since the last call, waiting as `Handle.read` does. After the last ones, `is_over`.

        Raises RunTakenOver, EngineFailed, and the errors of `SessionStore.save`.
        """
        with self._lock:
            self._is_all_or_nothing = flush_interval_s is None
            text = "" if self.is_over else self._read(flush_interval_s, timeout_s)
            if self._was_stopped and not self.is_interrupted:
                raise RunTakenOver("another connection has resumed this continuation, or it was stopped")
            return text

    def interrupt(self) -> None:
        """Make the engine stop at the next tick. The run can be resumed.

        The reading thread gets the remaining characters, and its `RunStream` then raises Draining.
        """
        self.is_interrupted = True
        self._handle.cancel()

    def stop(self) -> None:
        """Make the engine stop at the next tick, and return when the session is saved. Can be called at any time.

        If the session can't be saved, the run can be resumed from its last save.
        """
        self._was_stopped |= not self.is_over
        self._handle.cancel()
        with self._lock:
            try:
                if not self.is_over:
                    self._read(None, None)
            except GruServeError as error:
                log.warning("a stopped continuation was not saved", error=error.code)

    def _read(self, flush_interval_s: float | None, timeout_s: float | None) -> str:
        try:
            text = self._decode(self._handle.read(flush_interval_s, timeout_s))
            if self._handle.end is not None:
                text += self._decode(self._handle.read(0.0))  # characters that arrived between these two lines
        except EngineFailed:
            self._finish()  # the session stays as it was before the run, which can be resumed elsewhere
            raise
        self._generated += text
        if self._handle.end is not None:
            try:
                if not self._is_discarded():
                    self.session = self._session_after_run()
                    self._store.save(self._lease, self.session, release=True)
            finally:
                self._finish()
        return text

    def _decode(self, part: StepResult | None) -> str:
        return self._model.charset.decode(part.chars) if part is not None else ""

    def _is_discarded(self) -> bool:
        """Whether the session stays as it was before: a reader who waits for the whole run gets nothing of it."""
        return self._is_all_or_nothing and self.is_interrupted and self._handle.wait().reason == "cancelled"

    def _session_after_run(self) -> Session:
        end, run, before = self._handle.wait(), self._run, self.session.transcript
        text, hidden, stop = self._generated, end.hidden, ""
        if end.reason == "stop":
            stop = completed(before.text(run.start, before.position) + text, run.stops)
        # The text ends before the stop string, which may have begun in an earlier part of the run.
        num_added = len(text) - len(stop)
        if num_added >= 0:
            transcript = before.extend(text[:num_added], end.checkpoints, self._retention)
        else:
            transcript = before.truncate(before.position + num_added)
        if stop:
            hidden = state_in(self._model, transcript, transcript.position, already_admitted=True)
        if end.reason != "cancelled":
            run = replace(run, finish_reason=end.reason, end=transcript.position)
        return replace(self.session, hidden=hidden, transcript=transcript, run=run)

    def _finish(self) -> None:
        self.is_over = True
        self._store.release(self._lease)
        self._unregister(self)


@dataclass(frozen=True)
class TextChunk:
    """A part of a run's text."""

    text: str
    position: int  # after the text


class RunStream:
    """Yields every character of a run after a position once, in order: stored ones first, then generated ones."""

    def __init__(self, session: Session, run: Run, after: int, active: ActiveRun | None) -> None:
        """Can't fail: the request has been accepted.

        Args:
            session: as it is saved now.
            run: the run, which belongs to the session.
            after: the position of the first character to send.
            active: generates the rest; None if the run is finished.
        """
        self._session, self._run, self._after, self._active = session, run, after, active
        self._position = run.start  # after the last character that the stop filter has let through

    def chunks(self, flush_interval_s: float | None, idle_s: float) -> Iterator[TextChunk | None]:
        """Yield the text: the first part at once, then a part every flush_interval_s.

        If the engine is busy, parts are longer. If flush_interval_s is None, all generated characters are one part, at
        the end. Yields None when there was nothing for idle_s, so that the caller can check whether its client is still
        connected.

        Raises RunTakenOver, EngineFailed, and Draining after the last part of a run that was interrupted. The rest can
        be had elsewhere, by resuming after `resume_position`.
        """
        stop_filter = StopFilter(self._run.stops if self._active is not None else ())
        yield from self._stored_chunks(stop_filter)
        active, first, is_over = self._active, True, self._active is None
        while active is not None and not is_over:
            gather = (
                flush_interval_s
                if flush_interval_s is None
                else 0.0
                if first
                else flush_interval(active.engine.num_open, flush_interval_s)
            )
            text = active.read(gather, idle_s)
            shown, is_over = stop_filter.feed(text), active.is_over
            if is_over:
                self._session = active.session
                if self.finish_reason is not None:
                    shown += stop_filter.end(stopped=self.finish_reason == "stop")
            if text:
                first = False
            elif not is_over:
                yield None
            yield from self._unsent_chunks(shown)
        if self.finish_reason is None:
            raise Draining("the server is shutting down and has not finished this request: send it again")

    @property
    def resume_position(self) -> int:
        """Position after the last character that was sent."""
        return max(self._position, self._after)

    def close(self) -> None:
        """Stop the run if it is still active: nobody receives it any more. Can be called at any time."""
        if self._active is not None:
            self._active.stop()

    # The following are valid after `chunks` has ended.

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the run ended; None if it was stopped or interrupted."""
        return self._session.run.finish_reason if self._session.run is not None else None

    @property
    def position(self) -> int:
        """Position at which the run ended."""
        run = self._session.run
        return run.end if run is not None and run.end is not None else self._session.position

    @property
    def text(self) -> str:
        """All text that the run generated."""
        return self._session.transcript.text(self._run.start, self.position)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of `text` in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def _stored_chunks(self, stop_filter: StopFilter) -> Iterator[TextChunk]:
        transcript, run = self._session.transcript, self._run
        if self._after < run.start:
            yield TextChunk(transcript.text(self._after, run.start), run.start)
        end = run.end if run.end is not None else self._session.position
        yield from self._unsent_chunks(stop_filter.feed(transcript.text(run.start, end)))

    def _unsent_chunks(self, text: str) -> Iterator[TextChunk]:
        """Advance over text that the stop filter let through; yield the part of it that the client doesn't have."""
        self._position += len(text)
        num_new = min(len(text), self._position - self._after)
        if num_new > 0:
            yield TextChunk(text[-num_new:], self._position)

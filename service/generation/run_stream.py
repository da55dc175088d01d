"""One run of a session: while the engine generates it, and as one connection receives it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import structlog

from service.engine.handle import End, Handle, Snapshot, Update
from service.engine.pace import flush_interval
from service.engine.stepper import FinishReason
from service.errors import Draining, EngineFailed, GruServeError, RevisionConflict, RunTakenOver, SessionLost
from service.generation.reader import Reader
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease

log = structlog.get_logger(__name__)


class RunState(Enum):
    """What is happening to an active run."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"  # this process ends; another one may resume it
    STOPPED = "stopped"  # its client has left, or another connection has taken it over


class Generated(NamedTuple):
    """Characters that the engine has generated, if any."""

    text: str
    num_withheld: int  # of the last characters of the run, those of earlier reads included: may belong to a stop string


class ActiveRun:
    """A run that the engine works on. Saves the session and releases its lease when the run ends, however it ends.

    One thread reads characters. Any other thread may stop the run, even while the first one is blocked on a client that
    doesn't read: the thread that sees the end first saves. Another thread saves the session on the run's way, so that
    little has to be generated again if this process dies.
    """

    def __init__(
        self,
        model: LoadedModel,
        reader: Reader,
        lease: Lease,
        handle: Handle,
        client_has_left: Callable[[], bool],
        forget: Callable[[ActiveRun], None],
    ) -> None:
        self.session = lease.session  # as it was at the start; after the end, as it was saved
        self.sent_position = lease.session.position  # how far the reader has sent the text; a save goes no further
        self.client_has_left = client_has_left
        self.engine = model.engine
        self.client = handle.request.client  # for whom the engine works
        self.state = RunState.RUNNING
        self.is_over = False  # the session was saved, or could not be
        self._all_or_nothing = False  # the reader wants the whole text; a part would be useless
        self._model, self._reader, self._lease, self.handle, self._forget = model, reader, lease, handle, forget
        self._generated = ""
        self._saved_at = time.monotonic()  # when the session was saved last
        self._lost: RevisionConflict | SessionLost | None = None  # why nothing can be saved any more
        self._lock = threading.Lock()  # held by the thread that reads from the handle, and while the run is ended
        self._leasing = threading.Lock()  # held while the lease is used; never while waiting for the engine or a client

    def read(self, flush_interval_s: float, timeout_s: float | None) -> Generated:
        """Return the characters since the last call, waited for as by `Handle.read`. After the last ones it `is_over`.

        Raises RunTakenOver, EngineFailed, and what saving raises.
        """
        return self._read_unless_over(lambda: self.handle.read(flush_interval_s, timeout_s))

    def read_whole(self, timeout_s: float | None) -> Generated:
        """Return all characters if the run has ended within `timeout_s`, else nothing. A part would be useless.

        Raises what `read` raises.
        """
        self._all_or_nothing = True
        return self._read_unless_over(lambda: self.handle.read_whole(timeout_s))

    def _read_unless_over(self, read: Callable[[], Update]) -> Generated:
        with self._lock:
            generated = Generated("", 0) if self.is_over else self._read(read)
            if self.state is RunState.STOPPED:
                if isinstance(self._lost, SessionLost):
                    raise SessionLost(str(self._lost))
                raise RunTakenOver("another connection has resumed this continuation, or it was stopped")
            return generated

    def interrupt(self) -> None:
        """Ask the engine to leave the run at the next tick. Its reader gets the last characters, and then Draining."""
        self.state = RunState.INTERRUPTED
        self.handle.cancel()

    def stop(self) -> None:
        """End the run at the next tick, and return when the session is saved. Harmless at any time.

        If it can't be saved, the session stays as it was saved last, and the run can be resumed from there.
        """
        if not self.is_over and self.state is RunState.RUNNING:
            self.state = RunState.STOPPED
        self.handle.cancel()
        with self._lock:
            try:
                if not self.is_over:
                    self._read(self.handle.read_whole)
            except GruServeError as error:
                log.warning("a stopped continuation was not saved", error=error.code)
                if isinstance(error, SessionLost):
                    self._lost = error

    def save_progress(self, interval_s: float) -> None:
        """Save the unfinished run as far as its text was sent, if the last save is older than `interval_s`.

        Called several times in each interval, always on the same thread. No save goes further than the text was sent,
        so that a client may also feed the session, where its stream broke off, after this process has died. If the save
        fails, a later call tries again. Raises StoreUnavailable, OutcomeUnknown.
        """
        snapshot = self.handle.snapshot
        num_sent = min(self.sent_position - self.session.position, len(self._generated))
        if snapshot is not None and snapshot.position - self.session.position > num_sent:
            return  # it is saved when it was sent
        try:
            if snapshot is not None and time.monotonic() - self._saved_at >= interval_s:
                self._save_snapshot(snapshot)
        except (RevisionConflict, SessionLost) as error:
            self._lost = error
            self.stop()
        finally:
            self.handle.request_snapshot()

    def _save_snapshot(self, snapshot: Snapshot) -> None:
        with self._leasing:
            saved, start = self._lease.session, self.session.position
            if self.is_over or self.handle.end is not None or saved.run is None or snapshot.position <= saved.position:
                return  # after the end, the thread that sees it saves
            generated = self._generated[saved.position - start : snapshot.position - start]
            text = self._reader.extend(saved.text, saved.run, generated, snapshot)
            if text is not None:
                self._lease.save(replace(saved, text=text))
                self._saved_at = time.monotonic()

    def _read(self, read: Callable[[], Update]) -> Generated:
        try:
            result, end = read()
        except EngineFailed:
            self._end()  # the session stays as it was saved last, and the run can be resumed elsewhere
            raise
        text = self._model.charset.decode(result.chars)
        self._generated += text
        if end is not None:
            try:
                if not self._is_worthless(end):
                    self._save_end(end)
            finally:
                self._end()
        return Generated(text, result.num_withheld)

    def _is_worthless(self, end: End) -> bool:
        """Whether the session has to stay as it is: it can't be saved, or its reader wanted all and got interrupted."""
        if self._lost is not None:
            return True
        return self._all_or_nothing and self.state is RunState.INTERRUPTED and end.reason == "cancelled"

    def _save_end(self, end: End) -> None:
        """Save the session after the run."""
        run = self.session.run
        if run is None:
            raise AssertionError("an active run belongs to its session")
        # From the text before the run, whatever was saved since: a stop string may begin before the last save.
        text = self._reader.finish(self._model, self.session.text, run, self._generated, end)
        if end.reason != "cancelled":
            run = run.ended(end.reason, text.position)
        with self._leasing:
            self._lease.save(replace(self._lease.session, text=text, run=run), release=True)
            self.session = self._lease.session

    def _end(self) -> None:
        with self._leasing:
            self.is_over = True
            self._lease.release()
        self._forget(self)


@dataclass(frozen=True)
class TextChunk:
    """A part of a run's text."""

    text: str
    position: int  # after the text


class RunStream:
    """Yields every character of a run after a position once, in order: stored ones first, then generated ones."""

    def __init__(
        self, session: Session, run: Run, after: int, active: ActiveRun | None, generated: Handle | None = None
    ) -> None:
        """Can't fail: the request has been accepted.

        Args:
            session: as it is saved now.
            run: the run, which belongs to the session.
            after: the position of the first character to send.
            active: generates the rest; None if the run is finished.
            generated: what the engine did if it has just finished the run.
        """
        self._session, self._run, self._after, self._active = session, run, after, active
        self._generated = active.handle if active is not None else generated
        self._position = run.start  # after the last character that certainly doesn't belong to a stop string

    def chunks(self, flush_interval_s: float, idle_s: float) -> Iterator[TextChunk | None]:
        """Yield the text: the first part at once, then a part every flush_interval_s.

        If the engine is busy, parts are longer. Yields None when there was nothing for idle_s, so that the caller can
        check whether its client is still connected.

        Raises RunTakenOver, EngineFailed, and Draining after the last part of a run that was interrupted. The rest can
        be had elsewhere, by resuming after `resume_position`.
        """
        begun = False

        def read(active: ActiveRun) -> Generated:
            nonlocal begun
            crowd = active.engine.crowd_of(active.client)
            generated = active.read(flush_interval(crowd, flush_interval_s) if begun else 0.0, idle_s)
            begun = begun or bool(generated.text)
            return generated

        return self._chunks(read)

    def whole(self, idle_s: float) -> Iterator[TextChunk | None]:
        """Yield the text with all generated characters in one part, at the end. None and errors: see `chunks`."""
        return self._chunks(lambda active: active.read_whole(idle_s))

    def _chunks(self, read: Callable[[ActiveRun], Generated]) -> Iterator[TextChunk | None]:
        active, is_over = self._active, self._active is None
        stored, run = self._session.text, self._run
        if self._after < run.start:
            yield TextChunk(stored.slice(self._after, run.start), run.start)
        pending = stored.slice(run.start, run.end if run.end is not None else self._session.position)
        num_withheld = active.handle.num_withheld_before if active is not None and not run.includes_stop else 0
        num_shown = len(pending) - num_withheld
        yield from self._unsent_chunks(pending[:num_shown])
        while active is not None and not is_over:
            active.sent_position = self.resume_position
            generated = read(active)
            pending, is_over = pending[num_shown:] + generated.text, active.is_over
            if generated.text and not run.includes_stop:  # another thread may have read the rest
                num_withheld = generated.num_withheld
            num_shown = len(pending) - num_withheld
            if is_over:
                self._session = active.session
                if self.finish_reason is not None:
                    num_shown = self.position - self._position  # the run ends before a stop string
            if not generated.text and not is_over:
                yield None
            yield from self._unsent_chunks(pending[:num_shown])
        if self.finish_reason is None:
            raise Draining("the server is shutting down and has not finished this request: send it again")

    @property
    def model_name(self) -> str:
        """The full name of the session's model version."""
        return self._session.model

    @property
    def handles(self) -> list[Handle]:
        """The text that the engine generates for this request; none if it had been generated before."""
        return [self._generated] if self._generated is not None else []

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
        return self._session.text.slice(self._run.start, self.position)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of `text` in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def _unsent_chunks(self, text: str) -> Iterator[TextChunk]:
        """Advance over text that can't belong to a stop string any more; yield what the client doesn't have of it."""
        self._position += len(text)
        num_new = min(len(text), self._position - self._after)
        if num_new > 0:
            yield TextChunk(text[-num_new:], self._position)

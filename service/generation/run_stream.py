"""A run of a session as one connection gets it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from service.engine.pace import flush_interval
from service.engine.stepper import FinishReason
from service.engine.stop import StopFilter
from service.errors import Draining
from service.generation.active_run import ActiveRun
from service.sessions.session import Run, Session


@dataclass(frozen=True)
class TextChunk:
    """More of a text. position: after it."""

    text: str
    position: int


class RunStream:
    """Every character of a run after a position, once, in order: those that are known, then the rest as it comes."""

    def __init__(self, session: Session, run: Run, after: int, live: ActiveRun | None) -> None:
        """session: as it stands now. live: None if the run is over. Nothing is left to refuse."""
        self._session, self._run, self._after, self._live = session, run, after, live
        self._position = run.start  # up to which characters were let through

    def pieces(self, flush_interval_s: float | None, idle_s: float) -> Iterator[TextChunk | None]:
        """Parts of the text, the first at once, later ones gathered for flush_interval_s, or longer if the engine is busy.

        flush_interval_s None: what comes live is one part, at the end. None comes out when there was nothing for idle_s: a
        chance to look whether anybody still listens. Raises RunTakenOver, EngineFailed, and, after the last part of a
        run that was interrupted, Draining: it can be taken up elsewhere after `told`.
        """
        stop_filter = StopFilter(self._run.stops if self._live is not None else ())
        yield from self._known(stop_filter)
        live, first, is_over = self._live, True, self._live is None
        while live is not None and not is_over:
            gather = (
                flush_interval_s
                if flush_interval_s is None
                else 0.0
                if first
                else flush_interval(live.engine.num_open, flush_interval_s)
            )
            text = live.read(gather, idle_s)
            shown, is_over = stop_filter.feed(text), live.is_over
            if is_over:
                self._session = live.session
                if self.finish_reason is not None:
                    shown += stop_filter.end(stopped=self.finish_reason == "stop")
            if text:
                first = False
            elif not is_over:
                yield None
            yield from self._shown(shown)
        if self.finish_reason is None:
            raise Draining("the server is draining and has not come to the end: send it again")

    @property
    def resume_position(self) -> int:
        """After which position the next part begins."""
        return max(self._position, self._after)

    def close(self) -> None:
        """Stop the run, if it is still under way: nobody listens any more. Harmless at any time."""
        if self._live is not None:
            self._live.stop()

    # When all pieces are out:

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None: it was stopped."""
        return self._session.run.finish_reason if self._session.run is not None else None

    @property
    def position(self) -> int:
        """Where it ended."""
        run = self._session.run
        return run.end if run is not None and run.end is not None else self._session.position

    @property
    def text(self) -> str:
        """All that the run generated."""
        return self._session.transcript.text(self._run.start, self.position)

    @property
    def sha256(self) -> str:
        """Of that, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def _known(self, stop_filter: StopFilter) -> Iterator[TextChunk]:
        transcript, run = self._session.transcript, self._run
        if self._after < run.start:
            yield TextChunk(transcript.text(self._after, run.start), run.start)
        end = run.end if run.end is not None else self._session.position
        yield from self._shown(stop_filter.feed(transcript.text(run.start, end)))

    def _shown(self, text: str) -> Iterator[TextChunk]:
        """What of it the connection doesn't have yet."""
        self._position += len(text)
        num_new = min(len(text), self._position - self._after)
        if num_new > 0:
            yield TextChunk(text[-num_new:], self._position)

"""How to continue a session."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.sampling_settings import SamplingSettings
from service.sessions.session import Run, Session


@dataclass(frozen=True)
class RunRequest:
    """What a continuation is asked for with. seed: None is the session's own."""

    max_chars: int
    sampling: SamplingSettings
    stops: tuple[str, ...] = ()
    seed: int | None = None

    def run_of(self, session: Session) -> Run:
        """What it makes of a session, at its end."""
        context = ""
        if self.sampling.repetition_penalty != 1:
            text = session.transcript.text(session.transcript.start, session.position)
            context = "".join(sorted(set(text)))
        return Run(session.position, self.max_chars, self._seed(session), self.sampling, self.stops, context)

    def made_last_of(self, session: Session, position: int | None) -> bool:
        """Whether a session's last run was begun with this, at this position."""
        run, asked = session.run, (position, self.max_chars, self.sampling, self.stops, self._seed(session))
        return run is not None and (run.start, run.max_chars, run.sampling, run.stops, run.seed) == asked

    def _seed(self, session: Session) -> int:
        return self.seed if self.seed is not None else session.seed

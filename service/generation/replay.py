"""RunRegistry that were cut, drawn again: the same model, state, settings and seed give the same characters anywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from service.engine.request import Request
from service.engine.stop import completed
from service.generation.reading import stop_ids
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Run, Session
from service.sessions.transcript import Retention

_NOTHING = np.empty(0, np.int64)


def remaining_request(model: LoadedModel, session: Session, run: Run, retention: Retention, end: int) -> Request:
    """What the engine is asked for, to take a run from where the session stands up to a position."""
    generated = session.transcript.text(run.start, session.position)
    return Request(
        prompt=_NOTHING,
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
    """The session as it stood further on in a run that was cut, by the death of its server for instance.

    As it is if the run doesn't come to that position. Raises Overloaded, EngineFailed.
    """
    run = session.run
    if run is None or run.finish_reason is not None or not session.position < position <= run.start + run.max_chars:
        return session
    handle = model.engine.submit([remaining_request(model, session, run, retention, position)])[0]
    part, end = handle.read(None), handle.wait()
    text = model.charset.decode(part.chars) if part is not None else ""
    if end.position < position or completed(session.transcript.text(run.start, session.position) + text, run.stops):
        return session
    return replace(session, hidden=end.hidden, transcript=session.transcript.extended(text, end.checkpoints, retention))

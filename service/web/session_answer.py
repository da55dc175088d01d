"""Answers about sessions: JSON, and the events of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import structlog
from flask import Response
from pydantic_core import to_json

from service.errors import Draining, GruServeError
from service.generation.feeding import FeedResult
from service.generation.run_stream import RunStream
from service.sessions.session import Session
from service.web import session_schemas as schemas
from service.web.completion_answer import logprobs_of
from service.web.error_responses import body_of, error_response
from service.web.schemas import Usage
from service.web.sse import FLUSH_INTERVAL_S, IDLE_S, event

log = structlog.get_logger(__name__)


def session_answer(session: Session) -> schemas.SessionAnswer:
    """How a session stands."""
    return schemas.SessionAnswer(
        id=session.id,
        model=session.model,
        position=session.position,
        seed=session.seed,
        ttl_s=session.ttl_s,
        created_at=round(session.created_at, 3),
        expires_at=round(session.expires_at, 3),
        text_from=session.transcript.start,
    )


def feed_answer(fed: FeedResult) -> Response:
    """Position and distribution after a feed; with log-probabilities if they were asked for."""
    characters = fed.model.charset.characters
    ids, logprobs = (fed.next.ids.tolist(), fed.next.logprobs.tolist()) if fed.next is not None else ([], [])
    # Without the schema's objects: this is asked for at every keystroke, and they would take as long as the network.
    after = [{"char": characters[at], "logprob": logprob} for at, logprob in zip(ids, logprobs, strict=True)]
    scores = logprobs_of(fed.text, fed.scores, fed.model.charset, fed.position - len(fed.text))
    answer = {"position": fed.position, "next": after, "logprobs": scores.model_dump() if scores is not None else None}
    return Response(to_json(answer), mimetype="application/json")


def whole_run(continuation: RunStream, client_has_left: Callable[[], bool]) -> Response:
    """The answer when everything is generated. Raises RunTakenOver, EngineFailed, Draining."""
    for piece in continuation.chunks(None, IDLE_S):
        if piece is None and client_has_left():
            return error_response("the client has closed the connection", "client_gone")
    answer = {"text": continuation.text} | _facts(continuation)
    return Response(json.dumps(answer), mimetype="application/json")


def run_events(continuation: RunStream, client_has_left: Callable[[], bool]) -> Iterator[bytes | None]:
    """Server-sent events, each with the position after it as its id; None is a moment of silence."""
    started, ending, num_chars = time.perf_counter(), "left", 0
    try:
        for piece in continuation.chunks(FLUSH_INTERVAL_S, IDLE_S):
            if piece is None:
                if client_has_left():
                    return
                yield None
                continue
            num_chars += len(piece.text)
            yield event(json.dumps({"text": piece.text}), "text", piece.position)
        yield event(json.dumps(_facts(continuation)), "done", continuation.position)
        ending = "done"
    except Draining:
        ending, position = "reconnect", continuation.resume_position
        yield event(json.dumps({"position": position}), "reconnect", position)
    except GruServeError as error:
        ending = error.code
        yield event(json.dumps(body_of(error)), "error")
    finally:
        continuation.close()
        log.info(
            "session stream ended",
            ending=ending,
            num_chars=num_chars,
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )


def _facts(continuation: RunStream) -> dict[str, object]:
    """What is known of a continuation when it is over."""
    num_chars = len(continuation.text)
    usage = Usage(prompt_tokens=0, completion_tokens=num_chars, total_tokens=num_chars)
    return {
        "finish_reason": continuation.finish_reason,
        "position": continuation.position,
        "usage": usage.model_dump(),
        "sha256": continuation.sha256,
    }

"""Answers about sessions: JSON documents, and the events of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import structlog
from flask import Response

from service.engine.scores import Distribution
from service.errors import Draining, GruServeError
from service.generation.run_stream import RunStream
from service.generation.session_service import FeedResult
from service.model.charset import Charset
from service.sessions.session import SessionSummary
from service.web.api.events import DoneEvent, ErrorEvent, Events, ReconnectEvent, TextEvent
from service.web.api.json_pieces import dumps, logprobs_pieces, rounded
from service.web.api.responses import json_response
from service.web.api.schemas import Usage
from service.web.api.sessions import schemas
from service.web.api.sse import FLUSH_INTERVAL_S, IDLE_S
from service.web.gate.error_responses import error_response, stream_body_of

log = structlog.get_logger(__name__)


def session_answer(session: SessionSummary) -> schemas.SessionAnswer:
    """Describe a session."""
    return schemas.SessionAnswer(
        id=session.id,
        model=session.model,
        position=session.position,
        seed=session.seed,
        ttl_s=session.ttl_s,
        created_at=round(session.created_at, 3),
        expires_at=round(session.expires_at, 3),
        text_from=session.text_from,
    )


def feed_answer(result: FeedResult, held: ExitStack) -> Response:
    """Answer a feed: the new position, the next characters, and the log-probabilities if they were requested.

    `held`: see `json_response`.
    """
    return json_response(_feed_pieces(result), held)


def _feed_pieces(result: FeedResult) -> Iterator[str]:
    # Not the schema's objects: a client may feed at every keystroke, and they would take as long as the network does.
    yield f'{{"position":{result.position},"next":{dumps(next_chars(result.model.charset, result.next))},"logprobs":'
    start = result.position - len(result.text)
    yield from logprobs_pieces(result.text, result.scores, result.model.charset, start)
    yield "}"


def next_chars(charset: Charset, distribution: Distribution | None) -> list[dict[str, str | float]]:
    """Return the likeliest next characters with their log-probabilities; an empty list if none were requested."""
    if distribution is None:
        return []
    logprobs = rounded(distribution.logprobs)
    return [
        {"char": charset.characters[char_id], "logprob": logprob}
        for char_id, logprob in zip(distribution.ids.tolist(), logprobs, strict=True)
    ]


def run_answer(stream: RunStream, client_has_left: Callable[[], bool]) -> Response:
    """Wait until a run ends, and return one JSON answer. Raises RunTakenOver, EngineFailed, Draining.

    If `client_has_left()` returns true meanwhile, the answer is the error `client_gone`, for logs and metrics.
    """
    for piece in stream.whole(IDLE_S):
        if piece is None and client_has_left():
            return error_response("the client has closed the connection", "client_gone")
    answer = {"text": stream.text} | _final_fields(stream)
    return Response(json.dumps(answer), mimetype="application/json")


def run_events(stream: RunStream, client_has_left: Callable[[], bool]) -> Events:
    """Yield the events of a run, and None whenever there was nothing to send for `IDLE_S`.

    The id of an event is the position after its text, so a client can resume from it. The last event is `done`;
    `reconnect` if the process drains, so that the client resumes on another server; or `error`.
    """
    started, ending, num_chars = time.perf_counter(), "left", 0
    try:
        for piece in stream.chunks(FLUSH_INTERVAL_S, IDLE_S):
            if piece is None:
                if client_has_left():
                    return
                yield None
                continue
            num_chars += len(piece.text)
            yield TextEvent(json.dumps({"text": piece.text}), piece.position)
        yield DoneEvent(json.dumps(_final_fields(stream)), stream.position)
        ending = "done"
    except Draining:
        ending = "reconnect"
        yield ReconnectEvent(stream.resume_position)
    except GruServeError as error:
        ending = error.code
        yield ErrorEvent(stream_body_of(error))
    finally:
        log.info(
            "session stream ended",
            ending=ending,
            num_chars=num_chars,
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )


def _final_fields(stream: RunStream) -> dict[str, object]:
    """Return the fields of the answer, or of the event `done`, that describe a run that has ended."""
    num_chars = len(stream.text)
    usage = Usage.of(0, num_chars)
    return {
        "finish_reason": stream.finish_reason,
        "position": stream.position,
        "usage": usage.model_dump(),
        "sha256": stream.sha256,
    }

"""/v1/sessions: texts that stay open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flask import Response, request
from flask_openapi import APIBlueprint, Tag
from pydantic import BaseModel
from werkzeug.exceptions import MethodNotAllowed

from service.errors import InvalidValue
from service.generation.creation import NewSession
from service.generation.feeding import FeedRequest
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import SessionService
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModels
from service.web import session_schemas as schemas
from service.web.access import client_key, current_owner
from service.web.admission import AdmissionLimit
from service.web.schemas import ERRORS, ErrorAnswer
from service.web.session_answer import feed_answer, run_events, session_answer, whole_run
from service.web.sse import client_watch, stream_response

_ERRORS = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}


@dataclass(frozen=True)
class SessionLimits:
    """max_tokens: of one continuation. max_text_chars: of text in one request."""

    max_tokens: int
    max_text_chars: int


def sessions_blueprint(
    sessions: SessionService, models: LoadedModels, default_model: str, limits: SessionLimits, admission: AdmissionLimit
) -> APIBlueprint:
    """The resource, over these sessions and within these limits."""
    blueprint = APIBlueprint("sessions", __name__, abp_tags=[Tag(name="sessions")], abp_responses=_ERRORS)

    def create(session_id: str | None, body: schemas.CreateBody) -> Response:
        _check_length(body.text, limits)
        model = body.model if body.model is not None or body.state is not None else default_model
        new = NewSession(session_id, model, body.text, body.unknown_chars, body.seed, body.ttl_s, body.state)
        with admission, _naming("text"):
            session, is_new = sessions.creation.create(current_owner(), new)
        return _json(session_answer(session), 201 if is_new else 200)

    @blueprint.post("/v1/sessions", summary="Create a session", responses={"201": schemas.SessionAnswer})
    def create_anywhere(body: schemas.CreateBody) -> Response:
        """Open a text under a random id, and read what it begins with."""
        return create(None, body)

    @blueprint.put(
        "/v1/sessions/<id>",
        summary="Create a session under an id of your own",
        responses={"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
    )
    def create_here(path: schemas.SessionPath, body: schemas.CreateBody) -> Response:
        """Open a text. To repeat it with the same body changes nothing, and answers 200 instead of 201."""
        return create(path.id, body)

    @blueprint.get("/v1/sessions", summary="Your sessions", responses={"200": schemas.SessionsAnswer})
    def index(query: schemas.PageQuery) -> Response:
        """List sessions in the order of their ids."""
        found = sessions.page(current_owner(), query.after, query.limit + 1)
        data = [session_answer(session) for session in found[: query.limit]]
        return _json(schemas.SessionsAnswer(data=data, has_more=len(found) > query.limit))

    @blueprint.get("/v1/sessions/<id>", summary="A session", responses={"200": schemas.SessionAnswer})
    def show(path: schemas.SessionPath) -> Response:
        """Tell how a session stands. While a continuation is under way: how it stood before."""
        return _json(session_answer(sessions.get(current_owner(), path.id)))

    @blueprint.delete("/v1/sessions/<id>", summary="Forget a session", responses={"204": None})
    def forget(path: schemas.SessionPath) -> Response:
        """Delete a session with everything about it."""
        sessions.delete(current_owner(), path.id)
        return Response(status=204)

    @blueprint.get("/v1/sessions/<id>/text", summary="Its text", responses={"200": schemas.TextAnswer})
    def text(path: schemas.SessionPath, query: schemas.TextQuery) -> Response:
        """Read the transcript, as far as it is retained."""
        found, start, end = sessions.text(current_owner(), path.id, query.start, query.end)
        return _json(schemas.TextAnswer(text=found, start=start, end=end))

    @blueprint.post("/v1/sessions/<id>/feed", summary="More text", responses={"200": schemas.FeedAnswer})
    def feed(path: schemas.SessionPath, body: schemas.FeedBody) -> Response:
        """Step the network over the text, character by character; answer what may come next.

        Text that the session has at this position already is not stepped again: a feed may be repeated.
        """
        _check_length(body.text, limits)
        asked = FeedRequest(body.text, body.position, body.logprobs, body.num_next, body.unknown_chars, body.rebase)
        with admission, _naming("text"):
            return feed_answer(sessions.feeding.feed(current_owner(), path.id, asked))

    @blueprint.post("/v1/sessions/<id>/generate", summary="Continue it", responses={"200": schemas.GenerateAnswer})
    def generate(path: schemas.SessionPath, body: schemas.GenerateBody) -> Response:
        """Draw characters that become part of the text.

        With `stream`: server-sent events `text`, each with the position after it as its id, and at the end `done`; or
        `reconnect`, if the server goes away: to be taken up behind its id.
        With `position`, a continuation that was asked for before is taken up, not begun again.
        """
        if not 0 < body.max_tokens <= limits.max_tokens:
            raise InvalidValue(f"max_tokens: 1 to {limits.max_tokens} characters a request", param="max_tokens")

        def charset() -> Charset:
            session = sessions.get(current_owner(), path.id)
            return models.for_state(session.model, session.identity).charset

        asked = RunRequest(body.max_tokens, body.sampling_settings(charset), body.stop_strings, body.seed)
        stream_key = client_key() if body.stream else None
        admission.acquire(stream_key)
        try:
            watch = client_watch()
            continuation = sessions.runs.generate(current_owner(), path.id, asked, body.position, watch)
        except BaseException:
            admission.release(stream_key)
            raise
        return deliver(continuation, stream_key)

    @blueprint.get(
        "/v1/sessions/<id>/generate",
        summary="Take a broken stream up again",
        responses={"200": {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    def resume(path: schemas.SessionPath, query: schemas.ResumeQuery) -> Response:
        """Stream every character of the last continuation after a position, once and in order: those that are there,
        then live. It goes on with the settings it was begun with; a connection that still has it loses it.
        """
        if request.method == "HEAD":  # Flask takes it for a GET, and it would take the stream from who has it
            raise MethodNotAllowed(valid_methods=["GET", "POST"])
        stream_key = client_key()
        admission.acquire(stream_key)
        try:
            continuation = sessions.runs.resume(current_owner(), path.id, _last_event_id(query.after), client_watch())
        except BaseException:
            admission.release(stream_key)
            raise
        return deliver(continuation, stream_key)

    def deliver(continuation: RunStream, stream_key: str | None) -> Response:
        """stream_key: whose place it takes as a stream; None: it is no stream."""

        def close() -> None:
            try:
                continuation.close()
            finally:
                admission.release(stream_key)

        if stream_key is not None:
            return stream_response(run_events(continuation, client_watch()), close)
        try:
            return whole_run(continuation, client_watch())
        finally:
            close()

    @blueprint.post("/v1/sessions/<id>/rewind", summary="Go back", responses={"200": schemas.SessionAnswer})
    def rewind(path: schemas.SessionPath, body: schemas.RewindBody) -> Response:
        """Forget the text behind a retained position; the session stands there as if it had never gone on."""
        with admission:
            return _json(session_answer(sessions.rewind(current_owner(), path.id, body.position)))

    @blueprint.post(
        "/v1/sessions/<id>/fork",
        summary="Branch off",
        responses={"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
    )
    def fork(path: schemas.SessionPath, body: schemas.ForkBody) -> Response:
        """Make a new session with the same past and, unless another seed is given, the same future."""
        with admission:
            session, is_new = sessions.creation.fork(current_owner(), path.id, body.id, body.position, body.seed)
        return _json(session_answer(session), 201 if is_new else 200)

    @blueprint.get("/v1/sessions/<id>/state", summary="Carry it away", responses={"200": schemas.StateAnswer})
    def state(path: schemas.SessionPath, query: schemas.StateQuery) -> Response:
        """Hand out the state as text, signed. It holds the state, the seed and the position, not the transcript."""
        sealed, header = sessions.export(current_owner(), path.id, query.ttl_s)
        facts = header.model_dump(exclude={"identity"})
        return _json(schemas.StateAnswer(state=sealed, **facts))

    return blueprint


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Name the field that unknown characters were found in."""
    try:
        yield
    except InvalidValue as error:
        if error.param is None:
            error.param = param
        raise


def _check_length(text: str, limits: SessionLimits) -> None:
    if len(text) > limits.max_text_chars:
        raise InvalidValue(f"text: at most {limits.max_text_chars} characters, not {len(text)}", param="text")


def _last_event_id(after: int | None) -> int | None:
    """The header, which browsers send by themselves, or else the query's position."""
    given = request.headers.get("Last-Event-ID")
    if given is None:
        return after
    if not (given.isascii() and given.isdecimal() and len(given) <= 16):
        raise InvalidValue("Last-Event-ID: not the id of one of our events", param="Last-Event-ID")
    return int(given)


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status=status, mimetype="application/json")

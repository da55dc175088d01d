"""/v1/sessions: texts whose hidden state the server keeps, so that they can be continued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flask import Response, request
from flask_openapi import APIBlueprint, Tag
from pydantic import BaseModel
from werkzeug.exceptions import MethodNotAllowed

from service.errors import ClientGone, InvalidValue
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModels
from service.sessions.session import SessionKey
from service.web.api import session_schemas as schemas
from service.web.api.schemas import ERRORS, ErrorAnswer
from service.web.api.session_answer import feed_answer, run_answer, run_events, session_answer
from service.web.api.sse import client_monitor, stream_response
from service.web.gate.access import client_key, current_owner
from service.web.gate.admission import AdmissionLimit

_ERRORS = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}


@dataclass(frozen=True)
class SessionLimits:
    """Limits of one request."""

    max_tokens: int  # characters that a run may generate
    max_text_chars: int  # characters of the text that a request may bring


def sessions_blueprint(
    sessions: SessionService, models: LoadedModels, default_model: str, limits: SessionLimits, admission: AdmissionLimit
) -> APIBlueprint:
    """The routes of sessions."""
    blueprint = APIBlueprint("sessions", __name__, abp_tags=[Tag(name="sessions")], abp_responses=_ERRORS)

    @blueprint.before_request
    def require_client() -> None:
        """Begin nothing for a client that has left: it may have repeated the call at another replica, and gone on.

        A replica that was paused finds such requests when it wakes up.
        """
        if client_monitor()():
            raise ClientGone("the client had closed the connection before the server began")

    def create(session_id: str | None, body: schemas.CreateBody) -> Response:
        _check_length(body.text, limits)
        model = body.model if body.model is not None or body.state is not None else default_model
        new = NewSession(session_id, model, body.text, body.unknown_chars, body.seed, body.ttl_s, body.state)
        with admission, _blaming("text"):
            session, is_new = sessions.create(current_owner(), new, client_monitor())
        return _json(session_answer(session.summary), 201 if is_new else 200)

    @blueprint.post("/v1/sessions", summary="Create a session", responses={"201": schemas.SessionAnswer})
    def create_anywhere(body: schemas.CreateBody) -> Response:
        """Create a session under a random id, and read its initial text."""
        return create(None, body)

    @blueprint.put(
        "/v1/sessions/<id>",
        summary="Create a session under an id of your own",
        responses={"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
    )
    def create_here(path: schemas.SessionPath, body: schemas.CreateBody) -> Response:
        """Create a session, and read its initial text.

        Repeating the request with the same body changes nothing, and answers 200 instead of 201.
        """
        return create(path.id, body)

    @blueprint.get("/v1/sessions", summary="List your sessions", responses={"200": schemas.SessionsAnswer})
    def index(query: schemas.PageQuery) -> Response:
        """List your sessions in the order of their ids, in pages."""
        page = sessions.page(current_owner(), query.after, query.limit + 1)
        data = [session_answer(session) for session in page[: query.limit]]
        return _json(schemas.SessionsAnswer(data=data, has_more=len(page) > query.limit))

    @blueprint.get("/v1/sessions/<id>", summary="Show a session", responses={"200": schemas.SessionAnswer})
    def show(path: schemas.SessionPath) -> Response:
        """Describe a session. While text is being generated, describe it as it was before."""
        return _json(session_answer(sessions.get(_key(path)).summary))

    @blueprint.delete("/v1/sessions/<id>", summary="Delete a session", responses={"204": None})
    def forget(path: schemas.SessionPath) -> Response:
        """Delete a session with its text and its state."""
        sessions.delete(_key(path))
        return Response(status=204)

    @blueprint.get("/v1/sessions/<id>/text", summary="Read a session's text", responses={"200": schemas.TextAnswer})
    def text(path: schemas.SessionPath, query: schemas.TextQuery) -> Response:
        """Return the session's text, or a part of it. Only the most recent text is retained."""
        content, start, end = sessions.text(_key(path), query.start, query.end)
        return _json(schemas.TextAnswer(text=content, start=start, end=end))

    @blueprint.post("/v1/sessions/<id>/feed", summary="Append text to a session", responses={"200": schemas.FeedAnswer})
    def feed(path: schemas.SessionPath, body: schemas.FeedBody) -> Response:
        """Read more text into the session, and answer the characters that are likely to follow.

        A feed with a `position` can be repeated: if the session holds this text there already, the answer is the same
        and nothing is read twice.
        """
        _check_length(body.text, limits)
        feed_request = FeedRequest(
            body.text, body.position, body.logprobs, body.num_next, body.unknown_chars, body.rebase
        )
        with admission, _blaming("text"):
            return feed_answer(sessions.feed(_key(path), feed_request, client_monitor()))

    @blueprint.post(
        "/v1/sessions/<id>/generate", summary="Continue a session's text", responses={"200": schemas.GenerateAnswer}
    )
    def generate(path: schemas.SessionPath, body: schemas.GenerateBody) -> Response:
        """Generate characters, which become part of the session's text. This is called a run.

        With `stream` the answer is a stream of server-sent events. The id of each event `text` is the position after
        its text. The last event is `done`, or `reconnect` if the server shuts down: then resume the stream from its id.

        With `position` the request can be repeated: a run that the same request began there is resumed, not started
        again.
        """
        if not 0 < body.max_tokens <= limits.max_tokens:
            raise InvalidValue(f"max_tokens: 1 to {limits.max_tokens} characters a request", param="max_tokens")

        def charset() -> Charset:
            session = sessions.get(_key(path))
            return models.for_state(session.model, session.identity).charset

        run_request = RunRequest(body.max_tokens, body.sampling_settings(charset), body.stop_strings, body.seed)
        streaming_client = client_key() if body.stream else None
        admission.acquire(streaming_client)
        try:
            client_has_left = client_monitor()
            stream = sessions.runs.generate(_key(path), run_request, body.position, client_has_left)
        except BaseException:
            admission.release(streaming_client)
            raise
        return deliver(stream, streaming_client)

    @blueprint.get(
        "/v1/sessions/<id>/generate",
        summary="Resume a stream",
        responses={"200": {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    def resume(path: schemas.SessionPath, query: schemas.ResumeQuery) -> Response:
        """Stream the last run from a position on: first the characters that were generated already, then new ones.

        A run that was interrupted is continued with its original settings. If another connection still streams the run,
        that connection gets an error and this one takes over, unless `take_over` is false.
        """
        if request.method == "HEAD":  # Flask would handle it as GET, which takes the stream from its connection
            raise MethodNotAllowed(valid_methods=["GET", "POST"])
        streaming_client = client_key()
        admission.acquire(streaming_client)
        try:
            after = _resume_position(query.after)
            stream = sessions.runs.resume(_key(path), after, client_monitor(), take_over=query.take_over)
        except BaseException:
            admission.release(streaming_client)
            raise
        return deliver(stream, streaming_client)

    def deliver(stream: RunStream, streaming_client: str | None) -> Response:
        """Answer with a run: as a stream if there is a `streaming_client`, else as one JSON document."""

        def close() -> None:
            try:
                stream.close()
            finally:
                admission.release(streaming_client)

        if streaming_client is not None:
            return stream_response(run_events(stream, client_monitor()), close)
        try:
            return run_answer(stream, client_monitor())
        finally:
            close()

    @blueprint.post(
        "/v1/sessions/<id>/rewind", summary="Go back to an earlier position", responses={"200": schemas.SessionAnswer}
    )
    def rewind(path: schemas.SessionPath, body: schemas.RewindBody) -> Response:
        """Delete the text after a retained position. The session is then as it was at that position."""
        with admission:
            return _json(session_answer(sessions.rewind(_key(path), body.position).summary))

    @blueprint.post(
        "/v1/sessions/<id>/fork",
        summary="Copy a session",
        responses={"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
    )
    def fork(path: schemas.SessionPath, body: schemas.ForkBody) -> Response:
        """Create a session with the same text. Unless another seed is given, its continuations are the same, too."""
        with admission:
            session, is_new = sessions.fork(_key(path), body.id, body.position, body.seed)
        return _json(session_answer(session.summary), 201 if is_new else 200)

    @blueprint.get(
        "/v1/sessions/<id>/state", summary="Export a session's state", responses={"200": schemas.StateAnswer}
    )
    def state(path: schemas.SessionPath, query: schemas.StateQuery) -> Response:
        """Return a portable state, from which a new session can be created on any server with the same state key.

        It is signed text with the hidden state, the seed and the position. It doesn't contain the session's text.
        """
        sealed, header = sessions.export(_key(path), query.ttl_s)
        facts = header.model_dump(exclude={"identity"})
        return _json(schemas.StateAnswer(state=sealed, **facts))

    return blueprint


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Name `param` as the cause of an InvalidValue that is raised inside the block and names none."""
    try:
        yield
    except InvalidValue as error:
        if error.param is None:
            error.param = param
        raise


def _check_length(text: str, limits: SessionLimits) -> None:
    if len(text) > limits.max_text_chars:
        raise InvalidValue(f"text: at most {limits.max_text_chars} characters, not {len(text)}", param="text")


def _resume_position(after: int | None) -> int | None:
    """Return the position in the header Last-Event-ID, which browsers send by themselves, or else `after`."""
    event_id = request.headers.get("Last-Event-ID")
    if event_id is None:
        return after
    if not (event_id.isascii() and event_id.isdecimal() and len(event_id) <= 16):
        raise InvalidValue(
            "Last-Event-ID: must be the id of an event of this stream, which is a position", param="Last-Event-ID"
        )
    return int(event_id)


def _key(path: schemas.SessionPath) -> SessionKey:
    """Return the key of the caller's session of this id."""
    return SessionKey(current_owner(), path.id)


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status=status, mimetype="application/json")

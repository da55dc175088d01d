"""/v1/sessions: texts whose hidden state the server keeps, so that they can be continued."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from flask import Response
from pydantic import BaseModel

from service.errors import ClientGone, InvalidValue, ListingNeedsKeys, plural
from service.generation.runs import RunRequest
from service.generation.score_reservation import ScoreReservation
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.sessions.session import SessionKey
from service.shares import SharedBudget
from service.web.api.resource import Resource, blaming
from service.web.api.schemas import ERRORS, ErrorAnswer
from service.web.api.sessions import schemas
from service.web.api.sessions.answer import feed_answer, run_answer, run_events, session_answer
from service.web.api.sse import EventStream, client_monitor
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.generation import note_generation
from service.web.gate.route import Route


@dataclass(frozen=True)
class SessionLimits:
    """Limits of one request."""

    max_tokens: int  # characters that a run may generate
    max_text_chars: int  # characters of the text that a request may bring


class SessionRoutes(Resource):
    """The routes of sessions."""

    name = "sessions"
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer, "504": ErrorAnswer}

    def __init__(
        self,
        sessions: SessionService,
        default_model: str,
        limits: SessionLimits,
        admission: AdmissionLimit,
        score_budget: SharedBudget,
    ) -> None:
        self._sessions, self._default_model, self._limits = sessions, default_model, limits
        self._admission, self._score_budget = admission, score_budget

    def before_view(self) -> None:
        """Begin nothing for a client that has left: it may have repeated the call at another replica, and continued it.

        A replica that was paused finds such requests when it continues.
        """
        if client_monitor()():
            raise ClientGone("the client had closed the connection before the server began")

    def _create(self, session_id: str | None, body: schemas.CreateBody) -> Response:
        _check_length(body.text, self._limits)
        model = body.model if body.model is not None or body.state is not None else self._default_model
        new = NewSession(session_id, model, body.text, body.unknown_chars, body.seed, body.ttl_s, body.state)
        with self._admission.admit(), blaming("text"):
            session, is_new = self._sessions.create(current_owner(), new, client_monitor())
        return _json(session_answer(session.summary), 201 if is_new else 200)

    @Route(
        "POST",
        "/v1/sessions",
        "Create a session",
        {"201": schemas.SessionAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def create_anywhere(self, body: schemas.CreateBody) -> Response:
        """Create a session under a random id, and read its initial text."""
        return self._create(None, body)

    @Route(
        "PUT",
        "/v1/sessions/<id>",
        "Create a session under an id of your own",
        {"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def create_here(self, path: schemas.SessionPath, body: schemas.CreateBody) -> Response:
        """Create a session, and read its initial text.

        Repeating the request with the same body changes nothing, and answers 200 instead of 201.
        """
        return self._create(path.id, body)

    @Route("GET", "/v1/sessions", "List your sessions", {"200": schemas.SessionsAnswer})
    def index(self, query: schemas.PageQuery) -> Response:
        """List your sessions in the order of their ids, in pages.

        Only on a server with API keys. Without them all sessions have the same owner, and the id of a session is all
        that protects it.
        """
        if not current_owner():
            raise ListingNeedsKeys(
                "this server has no API keys, so a list would show everybody's sessions, and the id of a session is "
                "all that protects it: remember the ids of your sessions, or let the operator set GRU_SERVE_API_KEYS"
            )
        page = self._sessions.page(current_owner(), query.after, query.limit + 1)
        data = [session_answer(session) for session in page[: query.limit]]
        return _json(schemas.SessionsAnswer(data=data, has_more=len(page) > query.limit))

    @Route("GET", "/v1/sessions/<id>", "Show a session", {"200": schemas.SessionAnswer})
    def show(self, path: schemas.SessionPath) -> Response:
        """Describe a session. While text is being generated, describe it as it was before."""
        return _json(session_answer(self._sessions.get(_key(path)).summary))

    @Route("DELETE", "/v1/sessions/<id>", "Delete a session", {"204": None}, starts_work=True)
    def forget(self, path: schemas.SessionPath) -> Response:
        """Delete a session with its text and its state."""
        self._sessions.delete(_key(path))
        return Response(status=204)

    @Route("GET", "/v1/sessions/<id>/text", "Read a session's text", {"200": schemas.TextAnswer})
    def text(self, path: schemas.SessionPath, query: schemas.TextQuery) -> Response:
        """Return the session's text, or a part of it. Only the most recent text is retained."""
        content, start, end = self._sessions.text(_key(path), query.start, query.end)
        return _json(schemas.TextAnswer(text=content, start=start, end=end))

    @Route(
        "POST",
        "/v1/sessions/<id>/feed",
        "Append text to a session",
        {"200": schemas.FeedAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def feed(self, path: schemas.SessionPath, body: schemas.FeedBody) -> Response:
        """Read more text into the session, and answer the characters that are likely to follow.

        A feed with a `position` can be repeated: if the session holds this text there already, the answer is the same
        and nothing is read twice.
        """
        _check_length(body.text, self._limits)
        feed_request = FeedRequest(
            body.text, body.position, body.logprobs, body.num_next, body.unknown_chars, body.rebase
        )
        with ExitStack() as held:
            scores = ScoreReservation(self._score_budget)
            held.callback(scores.release)
            with self._admission.admit(), blaming("text"):
                result = self._sessions.feed(_key(path), feed_request, client_monitor(), scores.require)
            return feed_answer(result, held)

    @Route(
        "POST",
        "/v1/sessions/<id>/generate",
        "Continue a session's text",
        {"200": schemas.GenerateAnswer},
        starts_work=True,
        counts_as_start=True,
        streams=True,
    )
    def generate(self, path: schemas.SessionPath, body: schemas.GenerateBody) -> Response:
        """Generate characters, which become part of the session's text. This is called a run.

        With `stream` the answer is a stream of server-sent events. The id of each event `text` is the position after
        its text. The last event is `done`, or `reconnect` if the server shuts down: then resume the stream from its id.

        With `position` the request can be repeated: a run that the same request began there is resumed, not started
        again.
        """
        if not 0 < body.max_tokens <= self._limits.max_tokens:
            raise InvalidValue(
                f"max_tokens: 1 to {plural(self._limits.max_tokens, 'character')} a request", param="max_tokens"
            )

        run_request = RunRequest(
            body.max_tokens,
            body.sampling_settings,
            body.stop_strings,
            body.seed,
            tuple(body.logit_bias.items()),
            body.unknown_chars,
            body.min_tokens,
            body.include_stop_str_in_output,
            tuple(body.stop_token_ids),
            tuple(body.allowed_token_ids) if body.allowed_token_ids is not None else None,
            body.form,
        )
        with ExitStack() as held:
            held.enter_context(self._admission.admit(is_stream=body.stream))
            with blaming(body.form_param):
                stream = self._sessions.runs.generate(
                    _key(path), run_request, body.position, client_monitor(), as_whole=not body.stream
                )
            held.callback(stream.close)
            note_generation(stream.model_name, stream.handles)
            if not body.stream:
                return run_answer(stream, client_monitor())
            return EventStream(run_events(stream, client_monitor()), held, named=True)

    @Route(
        "GET",
        "/v1/sessions/<id>/generate",
        "Resume a stream",
        {"200": {"content": {"text/event-stream": {}}}},
        starts_work=True,
        streams=True,
    )
    def resume(self, path: schemas.SessionPath, query: schemas.ResumeQuery, header: schemas.ResumeHeader) -> Response:
        """Stream the last run from a position on: first the characters that were generated already, then new ones.

        A run that was interrupted is continued with its original settings. If another connection still streams the run,
        that connection gets an error and this one takes over, unless `take_over` is false.
        """
        with ExitStack() as held:
            held.enter_context(self._admission.admit(is_stream=True))
            after = header.last_event_id if header.last_event_id is not None else query.after
            stream = self._sessions.runs.resume(_key(path), after, client_monitor(), take_over=query.take_over)
            held.callback(stream.close)
            note_generation(stream.model_name, stream.handles)
            return EventStream(run_events(stream, client_monitor()), held, named=True)

    @Route(
        "POST",
        "/v1/sessions/<id>/rewind",
        "Go back to an earlier position",
        {"200": schemas.SessionAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def rewind(self, path: schemas.SessionPath, body: schemas.RewindBody) -> Response:
        """Delete the text after a retained position. The session is then as it was at that position."""
        with self._admission.admit():
            return _json(session_answer(self._sessions.rewind(_key(path), body.position).summary))

    @Route(
        "POST",
        "/v1/sessions/<id>/fork",
        "Copy a session",
        {"200": schemas.SessionAnswer, "201": schemas.SessionAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def fork(self, path: schemas.SessionPath, body: schemas.ForkBody) -> Response:
        """Create a session with the same text. Unless another seed is given, its continuations are the same, too."""
        with self._admission.admit():
            session, is_new = self._sessions.fork(_key(path), body.id, body.position, body.seed)
        return _json(session_answer(session.summary), 201 if is_new else 200)

    @Route("GET", "/v1/sessions/<id>/state", "Export a session's state", {"200": schemas.StateAnswer}, starts_work=True)
    def state(self, path: schemas.SessionPath, query: schemas.StateQuery) -> Response:
        """Return a portable state, from which a new session can be created on any server with the same state key.

        It is signed text with the hidden state, the seed and the position. It doesn't contain the session's text.
        """
        sealed, header = self._sessions.export(_key(path), query.ttl_s)
        facts = header.model_dump(exclude={"identity"})
        return _json(schemas.StateAnswer(state=sealed, **facts))


def _check_length(text: str, limits: SessionLimits) -> None:
    if len(text) > limits.max_text_chars:
        raise InvalidValue(f"text: at most {plural(limits.max_text_chars, 'character')}, not {len(text)}", param="text")


def _key(path: schemas.SessionPath) -> SessionKey:
    """Return the key of the caller's session of this id."""
    return SessionKey(current_owner(), path.id)


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status=status, mimetype="application/json")

"""Turns errors into HTTP responses: the status of each category of errors, and the JSON body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints
from urllib.parse import quote

import structlog
from flask import Flask, Response, current_app, jsonify, request, url_for
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing.exceptions import WebsocketMismatch

from service import errors
from service.errors import GruServeError, PositionConflict, SessionBusy
from service.web.gate.body_json import written_path

log = structlog.get_logger(__name__)

# The status of each category. That of the root is the fallback, also for OperatorError, which no request causes.
STATUS_OF_CATEGORY: dict[type[GruServeError], int] = {
    errors.InvalidRequest: 400,
    errors.InvalidApiKey: 401,  # the exception in AccessDenied: a valid key would help
    errors.AccessDenied: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Gone: 410,
    errors.LimitReached: 429,
    errors.ClientGone: 499,  # for logs and metrics
    errors.Unavailable: 503,
    errors.OutcomeUnknown: 504,
    GruServeError: 500,
}
# Codes of errors that only this layer finds, in HTTP, in bodies and against schemas. No exception has these codes.
STATUS_OF_EDGE_CODE = {
    "invalid_json": 400, "unknown_field": 400, "missing_field": 400, "wrong_type": 400, "unsupported_value": 400,
    "bad_request": 400, "host_not_allowed": 403, "origin_not_allowed": 403,
    "not_found": 404, "method_not_allowed": 405, "incomplete_body": 408, "body_too_large": 413,
    "unsupported_media_type": 415, "rate_limited": 429,
}  # fmt: skip


def status_of(kind: type[GruServeError]) -> int:
    """Return the status of an error class: that of the nearest class above it in `STATUS_OF_CATEGORY`."""
    return next(STATUS_OF_CATEGORY[parent] for parent in kind.__mro__ if parent in STATUS_OF_CATEGORY)


# Every code that a response can carry, with its status. A category has no code of its own.
STATUS = STATUS_OF_EDGE_CODE | {
    kind.code: status_of(kind)
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GruServeError) and "code" in vars(kind)
    if not issubclass(kind, errors.OperatorError)
}
_CODE_OF_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
}
# Not logged for each request: starting and stopping are normal, and the session store's outage is logged once.
_EXPECTED = ("not_ready", "draining", "session_store_unavailable")
# A session's stream that ends with one of these may be resumed, at this server a little later or at another one.
_RESUMABLE = (
    errors.LimitReached, errors.NotReady, errors.Draining, errors.EngineFailed, errors.StoreUnavailable,
    errors.OutcomeUnknown,
)  # fmt: skip
_RETRY_AFTER_S = "1"
HALF_OF_A_PAIR = r"has a half of a surrogate pair, such as \ud800, which is no character: send both halves or none"
_MAX_OTHERS = 5  # further wrong fields that an error names
# Errors of one field whose paths are compared. A body may have thousands, and each path takes a third of a millisecond.
_MAX_FAULTS = 32
_MAX_WORD_CHARS = 200  # of a wrong name that known ones are compared with: a megabyte took half a second
_SIMILAR = 0.75  # between 0 and 1: how much of two names has to be equal so that one is proposed for the other
_CODE_OF_PYDANTIC = {
    "missing": "missing_field", "extra_forbidden": "unknown_field", "unsupported_value": "unsupported_value",
}  # fmt: skip


def error_body(message: str, code: str, param: str | None = None, status: int | None = None) -> dict[str, Any]:
    """Return the body of an error. `type` follows from the status, by default that of the code."""
    status = status if status is not None else STATUS.get(code, 500)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: GruServeError) -> dict[str, Any]:
    """Return the response body for an exception of this project."""
    if error.code in ("invalid_artifact", "store_error"):
        # These messages name files of the server, so only the log has them.
        public = "the model can't be used, because its files are damaged or unreadable: see the server's log"
        return error_body(public, error.code, status=status_of(type(error)))
    message = error.message
    if isinstance(error, errors.ModelNotFound) and error.param is not None:
        # A 404 of a session's route is about the session, or else about the model that a field names.
        message = f"{error.param}: {message}"
    body = error_body(message, error.code, error.param, status_of(type(error)))
    if isinstance(error, PositionConflict):
        body["error"]["position"] = error.position
    return body


def stream_body_of(error: GruServeError) -> dict[str, Any]:
    """Return the body for an exception that ends a session's stream. `retry` is true if the stream may be resumed."""
    body = body_of(error)
    if isinstance(error, _RESUMABLE):
        body["error"]["retry"] = True
    return body


def error_response(message: str, code: str, param: str | None = None, status: int | None = None) -> Response:
    """Return the response for an error, with `status` or by default the status of the code."""
    status = status if status is not None else STATUS.get(code, 500)
    return _response(error_body(message, code, param, status), status)


def _response(body: dict[str, Any], status: int) -> Response:
    response = jsonify(body)
    response.status_code = status
    if status in (429, 503) or body["error"]["code"] == SessionBusy.code:
        response.headers["Retry-After"] = _RETRY_AFTER_S
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def validation_error_response(error: ValidationError) -> Response:
    """Return the response to a body, path or query that its schema refuses.

    It describes the errors of the first wrong field, names it by its path, such as `stream_options.include_usage` or
    `prompt[3]`, and says how many more fields have errors.
    """
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    schema, sent = _schema_and_sent(error.title)
    # A field that accepts several types has an error for each of them. If one has the type of the value, the message
    # describes that error, or the one that is deepest in the value; otherwise it lists all, and so what is allowed.
    same = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    same = ([fault for fault in same if not fault["type"].endswith("_type")] or same)[:_MAX_FAULTS]
    paths = [_path(fault, schema, sent) for fault in same]
    path = max(paths, key=len)
    same = [fault for fault, its in zip(same, paths, strict=True) if its == path]
    first, param = same[0], written_path(path)
    message = " or ".join(dict.fromkeys(_sentence(fault["type"], fault["msg"]) for fault in same))
    message = message.replace(" or must be ", " or ")
    if first["type"] == "extra_forbidden":
        message += _nearest_field(path, schema)
    names = list(dict.fromkeys(str(fault["loc"][0])[:80] for fault in faults if fault["loc"][:1] != first["loc"][:1]))
    if names:
        more = f" and {len(names) - _MAX_OTHERS} more" if len(names) > _MAX_OTHERS else ""
        message += f" (fields that also have errors: {', '.join(names[:_MAX_OTHERS])}{more})"
    code = _CODE_OF_PYDANTIC.get(first["type"])
    if code is None:
        code = "wrong_type" if first["type"].endswith("_type") else "out_of_range"
    return error_response(f"{param}: {message}" if param else message, code, param or None)


def register_error_handlers(app: Flask) -> None:
    """Turn every exception that a view raises into a response with the body of `error_body`."""

    @app.errorhandler(GruServeError)
    def _known(error: GruServeError) -> Response:
        status = status_of(type(error))
        if status >= 500 and error.code not in _EXPECTED:
            log.error("request failed", code=error.code, error=error.message)
        return _response(body_of(error), status)

    @app.errorhandler(HTTPException)
    def _http(error: HTTPException) -> Any:
        if error.response is not None or error.code is None or error.code < 400:
            return error.get_response()
        code = _CODE_OF_STATUS.get(error.code, "bad_request" if error.code < 500 else "internal_error")
        message, allowed = (
            error.description or error.name,
            ", ".join(sorted(getattr(error, "valid_methods", None) or ())),
        )
        if code == "not_found":
            message = _no_route(app)
        elif isinstance(error, WebsocketMismatch):
            message = 'there are no WebSockets: POST with "stream": true gets server-sent events'
        elif code == "method_not_allowed" and allowed:
            message = f"this route doesn't have that method; it has: {allowed}"
        response = error_response(message, code, status=error.code)
        if allowed:
            response.headers["Allow"] = allowed
        return response

    @app.errorhandler(Exception)
    def _unforeseen(error: Exception) -> Response:
        log.error("unforeseen error", exc_info=error)
        return error_response(
            "internal error: the server's log has the details under this request's id", "internal_error"
        )


def _no_route(app: Flask) -> str:
    """Return what is wrong with the path of a request: its spelling, or a word of it."""
    plain = re.sub("/+", "/", request.path).rstrip("/")
    adapter = app.create_url_adapter(request)
    if adapter is not None and len(plain) <= _MAX_WORD_CHARS and plain.isprintable():
        try:
            adapter.match(plain, method=request.method)
            is_known = True
        except MethodNotAllowed:
            is_known = True
        except HTTPException:
            is_known = False
        if is_known:
            return f"there is no such route: write its path as {quote(plain)}, without needless slashes and escapes"
    paths = [rule.rule for rule in app.url_map.iter_rules()]
    return f"there is no such route{_did_you_mean(request.path, paths)}; GET {url_for('docs.description')} lists all"


def _sentence(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "this field is unknown or not supported"
    if kind == "missing":
        return "this field is required"
    if kind == "string_unicode":
        return HALF_OF_A_PAIR
    message = (
        (message[:1].lower() + message[1:]).replace("input should be", "must be").partition(", unable to parse")[0]
    )
    message = re.sub(r"a valid dictionary(?: or instance of \w+)?", "an object", message)
    return message.replace(" should have ", " must have ").replace(" after validation", "")


def _schema_and_sent(name: str) -> tuple[type[BaseModel] | None, Any]:
    """Return the schema of this name of the current route, which may be that of its body, query or path, and its value.

    Only a body is read as JSON: a request without one may declare it nevertheless.
    """
    view: Any = current_app.view_functions.get(request.endpoint or "")
    kinds = get_type_hints(view) if view is not None else {}
    for part in ("body", "query", "path"):
        if part in kinds and kinds[part].__name__ == name:
            return kinds[part], request.get_json() if part == "body" else request.args
    return None, request.args


def _path(fault: ErrorDetails, schema: type[BaseModel] | None, sent: Any) -> tuple[str | int, ...]:
    """Return names and indices that lead to the place of an error in what was sent, as far as a schema names them.

    pydantic's own path also has the alternatives that a field has, and the keys of an object whose keys are free.
    """
    path: list[str | int] = []
    schemas = [schema] if schema is not None else []
    for place, part in enumerate(fault["loc"]):
        is_last = place == len(fault["loc"]) - 1
        if isinstance(part, int):
            if not isinstance(sent, list) or part >= len(sent):
                break
            sent = sent[part]
        else:
            fields = _fields(schemas)
            is_sent = isinstance(sent, dict) and part in sent
            if not (part in fields or (is_last and fault["type"] == "extra_forbidden")) or not (is_sent or is_last):
                continue  # an alternative, or a free key
            sent = sent.get(part) if isinstance(sent, dict) else None
            schemas = fields.get(part, [])
        path.append(part)
    return tuple(path) or fault["loc"][:1]


def _fields(schemas: Iterable[type[BaseModel]]) -> dict[str, list[type[BaseModel]]]:
    """Return the fields of schemas, under the names that clients send, with the schemas of their values."""
    return {
        field.alias or name: list(_models_in(field.annotation))
        for schema in schemas
        for name, field in schema.model_fields.items()
    }


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _nearest_field(path: Sequence[str | int], schema: type[BaseModel] | None) -> str:
    """Return a question that proposes the known name nearest to the unknown one at the end of a path, or nothing."""
    schemas = [schema] if schema is not None else []
    for part in path[:-1]:
        schemas = schemas if isinstance(part, int) else _fields(schemas).get(part, [])
    name, known = str(path[-1]), _fields(schemas)
    others: dict[str, str] = {}
    for kind in schemas:
        others |= getattr(kind, "other_names", {})
    other = others.get(name)
    return f"; did you mean {other}?" if other in known else _did_you_mean(name, known)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    if len(word) > _MAX_WORD_CHARS:
        return ""
    close = get_close_matches(word, list(known), 1, _SIMILAR)
    return f"; did you mean {close[0]}?" if close else ""

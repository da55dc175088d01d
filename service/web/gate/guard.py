"""Steps before and after every route.

Before it, a request gets an id, is refused if the process drains, and has its body read. After it, the answer gets its
headers and its line in the log.
"""

from __future__ import annotations

import codecs
import re
import secrets
import time
from contextlib import ExitStack

import structlog
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from service.shares import SharedBudget, current_client
from service.web.gate.body_json import BodyJson, RefusedJson
from service.web.gate.drain import Drain
from service.web.gate.error_responses import error_response
from service.web.gate.route import current_route
from service.web.gate.trace_context import trace_id_of

log = structlog.get_logger(__name__)

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # clients can make up others
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_GZIP = b"\x1f\x8b"
SMALL_BODY_BYTES = 65_536  # bodies up to this length are not counted, so that large ones never shut them out
_CSP = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"  # pages.py sets others


def register_guard(app: Flask, drain: Drain) -> None:
    """Give each request an id, refuse new work while draining, and give each answer its headers and one log line."""

    @app.before_request
    def _identify() -> None:
        g.started = time.perf_counter()
        sent_id = request.headers.get("X-Request-Id", "")
        g.request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=g.request_id)
        if trace_id := trace_id_of(request.headers.get("traceparent", "")):
            structlog.contextvars.bind_contextvars(trace_id=trace_id)

    @app.before_request
    def _refuse_new_work() -> Response | None:
        if not drain.has_begun or not current_route().starts_work:
            return None
        return error_response(
            "the server is draining before it exits: retry in a second, or on another server", "draining"
        )

    @app.after_request
    def _finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("request_id", "")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers.setdefault("Content-Security-Policy", _CSP)
        is_passed_check = response.status_code == 200 and current_route().is_check
        (log.debug if is_passed_check else log.info)(
            "request",
            method=request.method if request.method in HTTP_METHODS else "*",
            path=_logged_path(app),
            status=response.status_code,
            duration_ms=round((time.perf_counter() - g.get("started", time.perf_counter())) * 1000, 2),
        )
        return response


def register_body_check(app: Flask, max_body_bytes: int, large_bodies: SharedBudget) -> None:
    """Take and parse the body of each request before the route validates it.

    A query with two parameters of one name is refused, as a body with two fields of one name is.

    `large_bodies` limits what each client may have in bodies of more than `SMALL_BODY_BYTES`, until its answers end:
    read and parsed, each takes ten times its length. The poller limits what has arrived for all clients together.

    Register it after everything that refuses requests without reading their bodies.
    """
    # One byte more than allowed, so that a body of unknown length (chunked) can be seen to be too long.
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes + 1
    app.json = BodyJson(app)
    app.json.sort_keys = False

    @app.before_request
    def _check_query() -> Response | None:
        for name, values in request.args.lists():
            if len(values) > 1:  # of which Flask would silently take the first
                name = name[:80]
                return error_response(
                    f"{name}: the query has it {len(values)} times: give it once", "bad_request", name
                )
        return None

    @app.before_request
    def _check_body() -> Response | None:
        if not current_route().takes_body:
            return None
        return _refuse_unread(max_body_bytes) or _refuse_length(max_body_bytes, large_bodies) or _refuse_content()

    @app.after_request
    def _count_until_answered(response: Response) -> Response:
        if large_body := g.pop("large_body", None):
            response.call_on_close(large_body.close)
        return response

    @app.teardown_request
    def _forget_body(_: BaseException | None) -> None:
        if large_body := g.pop("large_body", None):  # there is no answer
            large_body.close()


def _refuse_unread(max_body_bytes: int) -> Response | None:
    """Return the refusal of a body by what the head says of it, or None."""
    if (request.content_encoding or "identity").lower() != "identity":
        response = error_response("the body is compressed: send it uncompressed", "unsupported_media_type")
        response.headers["Accept-Encoding"] = "identity"  # RFC 7694
        return response
    if (request.content_length or 0) > max_body_bytes:
        return _too_large(max_body_bytes)
    if request.mimetype != "application/json":
        is_empty = not request.content_length and "Transfer-Encoding" not in request.headers
        what = (
            "the request has no body: send a JSON object, such as {}," if is_empty else "the body has to be JSON, sent"
        )
        return error_response(f"{what} with Content-Type: application/json", "unsupported_media_type")
    return None


def _refuse_length(max_body_bytes: int, large_bodies: SharedBudget) -> Response | None:
    """Take the body, and count it if it is large. Return the refusal of one that is incomplete or too long, or None."""
    try:
        num_bytes = len(request.get_data())
    except Exception as error:  # noqa: BLE001
        # A malformed chunk, or a client that stalls or disconnects. Each WSGI server raises exceptions of its own.
        log.info("body not read", error=type(error).__name__)  # the message may quote the body
        return error_response(
            "the body was incomplete or did not arrive in time: send the request again", "incomplete_body"
        )
    if num_bytes > max_body_bytes:
        return _too_large(max_body_bytes)
    if num_bytes > SMALL_BODY_BYTES:
        client = current_client()
        if not large_bodies.take(client, num_bytes):
            return error_response(
                "the server has as many large bodies as it can, or as it can for you: try again in a second",
                "overloaded",
            )
        g.large_body = ExitStack()  # closing it again does nothing
        g.large_body.callback(large_bodies.give_back, client, num_bytes)
    return None


def _too_large(max_body_bytes: int) -> Response:
    return error_response(
        f"the body is larger than {max_body_bytes} bytes: send less text at a time, or let the operator raise "
        "GRU_SERVE_MAX_BODY_BYTES",
        "body_too_large",
    )


def _refuse_content() -> Response | None:
    """Parse the body. Return the refusal of one that is no JSON object, or None."""
    try:
        # Parsed once: Flask caches the result, and the validation after this takes it from there.
        body = request.get_json()
    except RefusedJson as error:
        return error_response(str(error), "invalid_json" if error.path is None else "out_of_range", error.path)
    except HTTPException as error:
        return error_response(_fault_of(request.get_data(), error), "invalid_json")
    if not isinstance(body, dict):
        return error_response("the body has to be a JSON object", "invalid_json")
    return None


def _fault_of(body: bytes, error: HTTPException) -> str:
    """Return what is wrong with a body that could not be parsed, and what to do."""
    if not body:
        if request.content_length is None and "Transfer-Encoding" not in request.headers:
            return "the body is empty: send a JSON object, with its Content-Length or with Transfer-Encoding: chunked"
        return "the body is empty: send a JSON object"
    if body.startswith(_GZIP):
        return "the body is not JSON in UTF-8: it is compressed: send it uncompressed"
    if b"\0" in body[:4] or body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the body is not JSON in UTF-8: it is UTF-16 or UTF-32: send UTF-8"
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        byte = f"byte {wrong.start} (0x{body[wrong.start]:02x})"
        return f"the body is not JSON in UTF-8: it is not UTF-8: {byte} begins no character: encode the body in UTF-8"
    cause = error.__cause__ if isinstance(error.__cause__, HTTPException) else error
    fault = (cause.description or "").removeprefix("Failed to decode JSON object: ")
    return f"the body is not JSON in UTF-8: {fault}"


def _logged_path(app: Flask) -> str:
    """Return the path without anything that the client chose: a session's id alone may be enough to use the session."""
    if request.url_rule is not None:
        return request.url_rule.rule
    # No route, or not with this method: the words of known routes are logged, and all others become "*".
    words = {word for rule in app.url_map.iter_rules() for word in rule.rule.split("/")}
    return "/".join(word if word in words else "*" for word in request.path[:200].split("/"))

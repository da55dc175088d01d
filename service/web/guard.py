"""What every request passes before its view: an id, and limits on what it may send. And what every answer carries."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress

import structlog
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from service.web.drain import Drain
from service.web.error_responses import error_response

log = structlog.get_logger(__name__)

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # others are made up by the caller
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DISCARD_BYTES = 32 * 1024 * 1024
_CSP = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"  # pages have one of their own


def register_guard(app: Flask, drain: Drain) -> None:
    """Give each request an id, and refuse it if the server is about to end; finish answers with headers and one log
    line.
    """

    @app.before_request
    def _identify() -> None:
        g.started = time.perf_counter()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=g.request_id)

    @app.before_request
    def _refuse_new_work() -> Response | None:
        if not drain.has_begun or _costs_nothing() or request.routing_exception is not None:
            return None
        return error_response("the server is draining: send it again, to another one or in a second", "draining")

    @app.after_request
    def _finish(response: Response) -> Response:
        if response.status_code >= 400 and not g.get("body_was_read"):
            _discard_body()
        response.headers["X-Request-Id"] = g.get("request_id", "")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers.setdefault("Content-Security-Policy", _CSP)
        is_check = request.path in ("/healthz", "/readyz") and response.status_code == 200  # many a second
        (log.debug if is_check else log.info)(
            "request",
            method=request.method if request.method in HTTP_METHODS else "*",
            path=_logged_path(app),
            status=response.status_code,
            duration_ms=round((time.perf_counter() - g.get("started", time.perf_counter())) * 1000, 2),
        )
        return response


def register_body_check(app: Flask, max_body_bytes: int) -> None:
    """Read bodies before they are validated; to be registered after what refuses a request without reading it."""
    # One more byte than allowed, by which a body of unknown length (chunked) shows that it is too long.
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes + 1

    @app.before_request
    def _check_body() -> Response | None:
        if request.method not in ("POST", "PUT", "PATCH") or request.routing_exception is not None:
            return None
        if request.content_encoding not in (None, "", "identity"):
            return error_response("send the body uncompressed", "unsupported_media_type")
        if (request.content_length or 0) > max_body_bytes:
            return error_response(f"the body is larger than {max_body_bytes} bytes", "body_too_large")
        if request.mimetype != "application/json":
            return error_response("send JSON, with Content-Type: application/json", "unsupported_media_type")
        g.body_was_read = True  # or tried to
        try:
            if len(request.get_data()) > max_body_bytes:
                _discard_body()
                return error_response(f"the body is larger than {max_body_bytes} bytes", "body_too_large")
        except Exception as error:  # noqa: BLE001
            # A malformed chunk, a client that stalls or has gone: each server's parser raises exceptions of its own.
            log.info("body not read", error=type(error).__name__)  # its message may quote the body
            return error_response("the body did not arrive whole and in time", "incomplete_body")
        try:
            # Parsed here once; the validation behind takes what Flask keeps of it.
            body = request.get_json()
        except RecursionError:
            return error_response("the body is not usable JSON: it is nested too deeply", "invalid_json")
        except HTTPException as error:
            return error_response(f"the body is not JSON: {error.__cause__ or error.description}", "invalid_json")
        if not isinstance(body, dict):
            return error_response("the body has to be a JSON object", "invalid_json")
        return None


def _logged_path(app: Flask) -> str:
    """Without what the caller put into it: who knows a session's id may use it."""
    if request.url_rule is not None:
        return request.url_rule.rule
    # No route, or not with this method: the words of our routes may be told, all others are starred out.
    words = {word for rule in app.url_map.iter_rules() for word in rule.rule.split("/")}
    return "/".join(word if word in words else "*" for word in request.path[:200].split("/"))


def _costs_nothing() -> bool:
    """Whether the request neither changes nor computes anything: health, metrics, what is there to read."""
    rule = request.url_rule.rule if request.url_rule is not None else ""
    return request.method in ("GET", "HEAD", "OPTIONS") and not rule.endswith(("/generate", "/state"))


def _discard_body() -> None:
    """Read and drop what is left of the body, up to a limit: a client that is still sending when the connection is
    closed sees a reset instead of its refusal.
    """
    stream, left = request.environ["wsgi.input"], _DISCARD_BYTES
    with suppress(Exception):  # the client stalls, has gone or sends nonsense: it is refused all the same
        while left > 0 and (chunk := stream.read(min(65_536, left))):
            left -= len(chunk)

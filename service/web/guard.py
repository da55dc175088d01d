"""What every request passes before its view: an id, and limits on what it may send. And what every answer carries."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from flask import Flask, Response, g, request
from werkzeug.exceptions import ClientDisconnected

from service.web.errors import error_response

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DISCARD_BYTES = 32 * 1024 * 1024
_CSP = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
_CSP += "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def register_guard(app: Flask, max_body_bytes: int, body_timeout_s: int) -> None:
    """Check requests before they are validated; finish answers with headers and one log line."""
    # One more byte than allowed, by which a body of unknown length (chunked) shows that it is too long.
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes + 1

    @app.before_request
    def _identify() -> None:
        g.started = time.perf_counter()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=g.request_id)

    @app.before_request
    def _check_body() -> Response | None:
        if request.method not in ("POST", "PUT", "PATCH"):
            return None
        # A client that stops in mid-body must not hold a thread for ever. gunicorn undoes this before the next request.
        if (connection := request.environ.get("gunicorn.socket")) is not None:
            connection.settimeout(body_timeout_s)
        too_large = f"the body is larger than {max_body_bytes} bytes"
        if (request.content_length or 0) > max_body_bytes:
            _discard_body()
            return error_response(too_large, "body_too_large")
        if request.content_encoding:
            return error_response("send the body uncompressed", "unsupported_media_type")
        if request.mimetype != "application/json":
            return error_response("send JSON, with Content-Type: application/json", "unsupported_media_type")
        try:
            data = request.get_data()
        except ClientDisconnected:
            return error_response(f"the body did not arrive within {body_timeout_s} s", "body_timeout")
        if len(data) > max_body_bytes:
            _discard_body()
            return error_response(too_large, "body_too_large")
        try:
            body = app.json.loads(data)
        except RecursionError:
            return error_response("the body is not usable JSON: it is nested too deeply", "invalid_json")
        except ValueError as error:
            return error_response(f"the body is not JSON: {error}", "invalid_json")
        if not isinstance(body, dict):
            return error_response("the body has to be a JSON object", "invalid_json")
        return None

    @app.after_request
    def _finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("request_id", "")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Content-Security-Policy"] = _CSP
        log.info(
            "request",
            method=request.method,
            path=request.path[:200],
            status=response.status_code,
            duration_ms=round((time.perf_counter() - g.get("started", time.perf_counter())) * 1000, 2),
        )
        return response


def _discard_body() -> None:
    """Read a too large body and throw it away, up to a limit: a client that is still sending when the connection is
    closed sees a reset instead of the answer.
    """
    stream, left = request.environ["wsgi.input"], _DISCARD_BYTES
    while left > 0 and (chunk := stream.read(min(65_536, left))):
        left -= len(chunk)

"""Answers to browsers that reconnect to a stream while it can't be resumed.

A browser's EventSource gives a stream up for good at any status but 200. If a stream with this status ends, it connects
again after the pause that the stream has named. So such a refusal becomes a stream without events.
"""

from __future__ import annotations

from flask import Flask, Response, request

from service.web.gate.route import current_route

RECONNECT_MS = 1000  # how long an EventSource waits before it connects again; each stream says so
_PASSING = (429, 503, 504)  # statuses after which the same request may succeed


def accepts_events() -> bool:
    """Return whether the current request says that it is for server-sent events, as a browser's EventSource does."""
    return "text/event-stream" in request.headers.get("Accept", "").lower()


def register_reconnects(app: Flask) -> None:
    """Replace refusals that may pass, for an EventSource that reconnects: it has read an event and names its id.

    Register it before the log and the metrics: what is registered first sees an answer last, so they get the refusal.
    """

    @app.after_request
    def _let_browsers_wait(response: Response) -> Response:
        route = current_route()
        is_reconnect = route.streams and route.method == "GET" and "Last-Event-ID" in request.headers
        may_pass = response.status_code in _PASSING or "Retry-After" in response.headers
        if is_reconnect and may_pass and accepts_events():
            error = (response.get_json(silent=True) or {}).get("error", {})
            response.set_data(f"retry: {RECONNECT_MS}\n: {error.get('code')}, reconnect\n\n")
            response.status_code, response.mimetype = 200, "text/event-stream"
            response.headers["Cache-Control"] = "no-cache, no-transform"
            response.headers.pop("Retry-After", None)
        return response

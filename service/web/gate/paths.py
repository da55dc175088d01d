"""Each route has one path, and no other leads to it: so a balancer that refuses the path refuses the route."""

from __future__ import annotations

from flask import Flask, request
from werkzeug.exceptions import NotFound


def register_paths(app: Flask) -> None:
    """Answer 404 to paths with two slashes in a row. Register it first, because later steps ask for the route."""
    app.url_map.merge_slashes = False  # otherwise werkzeug redirects, to http:// and in HTML

    @app.before_request
    def _refuse_leading_slashes() -> None:
        if request.environ["PATH_INFO"].startswith("//"):  # werkzeug drops all slashes but one
            request.url_rule, request.routing_exception = None, NotFound()

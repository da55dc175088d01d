"""Each route has one path, and no other leads to it: so a balancer that refuses the path refuses the route."""

from __future__ import annotations

import re

from flask import Flask, request
from werkzeug.exceptions import NotFound

_NEEDLESS_ESCAPE = re.compile(
    r"%(?:2[DdEeFf]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff])"
)  # of letters, digits and - . / _


def register_paths(app: Flask) -> None:
    """Answer 404 to paths with two slashes in a row, and to those with an escape of a letter, a digit or one of `-./_`.

    Register it first, because later steps ask for the route.
    """
    app.url_map.merge_slashes = False  # otherwise werkzeug redirects, to http:// and in HTML

    @app.before_request
    def _refuse_other_spellings() -> None:
        written = request.environ.get("RAW_URI", "").partition("?")[0]
        # werkzeug drops all leading slashes but one
        if request.environ["PATH_INFO"].startswith("//") or _NEEDLESS_ESCAPE.search(written):
            request.url_rule, request.routing_exception = None, NotFound()

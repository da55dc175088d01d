"""GET /: the page on which a character becomes a new state."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

from service.web.access import open_to_all

_PAGE = Path(__file__).parent / "static" / "page"
# Nothing from another host, nothing inline, and no text that scripts could turn into markup.
_CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
_CSP += "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
_CSP += "require-trusted-types-for 'script'; trusted-types 'none'"


def page_blueprint() -> Blueprint:
    """The page and its parts. They are open to all: the page asks for a key where one is needed."""
    blueprint = Blueprint("page", __name__)

    @blueprint.get("/")
    @open_to_all
    def page() -> Response:
        return _sent("page.html")

    @blueprint.get("/page/<path:asset>")
    @open_to_all
    def part(asset: str) -> Response:
        return _sent(asset)

    return blueprint


def _sent(name: str) -> Response:
    response = send_from_directory(_PAGE, name, max_age=0)  # asked for again each time, and sent if it has changed
    response.headers["Content-Security-Policy"] = _CSP
    return response

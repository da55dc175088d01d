"""The pages for browsers: the page at /, on which a text grows, and the API documentation at /docs and /openapi.json.

No page loads anything from another host or contains an inline script.
"""

from __future__ import annotations

from pathlib import Path

import flask_openapi_swagger
from flask import Response, current_app, jsonify, request, send_from_directory

from service.web.api.resource import Resource
from service.web.gate.route import Route

_STATIC = Path(__file__).parents[1] / "static"
_PLAYGROUND = _STATIC / "page"
_SWAGGER = Path(flask_openapi_swagger.__file__).parent / "templates" / "swagger"
_SAME_HOST = "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# Trusted types keep scripts from turning text into markup.
_PLAYGROUND_CSP = (
    f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; {_SAME_HOST}; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
# Swagger UI sets inline styles.
_DOCS_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " + _SAME_HOST
)


class PageRoutes(Resource):
    """The page at /. Loading it needs no API key: the page asks its user for one when a request is refused."""

    name = "page"

    @Route("GET", "/", open=True)
    def page(self) -> Response:
        """Return the page."""
        return _playground_file("page.html")

    @Route("GET", "/page/<path:asset>", open=True)
    def part(self, asset: str) -> Response:
        """Return a file of the page."""
        return _playground_file(asset)


class DocsRoutes(Resource):
    """The OpenAPI description, and Swagger UI to read it with. That asks its user for a key if the server has keys."""

    name = "docs"

    @Route("GET", "/openapi.json")
    def description(self) -> Response:
        """Return the description of all documented routes."""
        return jsonify(current_app.api_doc)  # type: ignore[attr-defined]

    @Route("GET", "/docs", open=True)
    def page(self) -> Response:
        """Return Swagger UI."""
        response = _file(_STATIC, "docs.html")
        response.headers["Content-Security-Policy"] = _DOCS_CSP
        return response

    @Route("GET", "/docs/<path:asset>", open=True)
    def assets(self, asset: str) -> Response:
        """Return a file of Swagger UI."""
        return _file(_STATIC if asset == "docs.js" else _SWAGGER, asset)


def _playground_file(name: str) -> Response:
    # max_age=0: browsers ask again each time, and get 304 unless the file has changed.
    response = _file(_PLAYGROUND, name, max_age=0)
    response.headers["Content-Security-Policy"] = _PLAYGROUND_CSP
    return response


def _file(folder: Path, name: str, max_age: int | None = None) -> Response:
    """Return a file, or 304 if the client has it. It is sent whole: no browser needs a part of a small file."""
    response = send_from_directory(folder, name, max_age=max_age, conditional=False)
    response.make_conditional(request.environ)
    return response

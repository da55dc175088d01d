"""GET /openapi.json and /docs: the API's description, and Swagger UI from our own host."""

from __future__ import annotations

from pathlib import Path

import flask_openapi_swagger
from flask import Blueprint, Response, current_app, jsonify, send_from_directory

_STATIC = Path(__file__).parent / "static"
# Swagger UI sets styles where it needs them.
_CSP = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
_CSP += "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_SWAGGER = Path(flask_openapi_swagger.__file__).parent / "templates" / "swagger"


def docs_blueprint() -> Blueprint:
    """The description and its page. Every asset comes from this server, none of the page's scripts is inline."""
    blueprint = Blueprint("docs", __name__)

    @blueprint.get("/openapi.json")
    def description() -> Response:
        return jsonify(current_app.api_doc)  # type: ignore[attr-defined]

    @blueprint.get("/docs")
    def page() -> Response:
        response = send_from_directory(_STATIC, "docs.html")
        response.headers["Content-Security-Policy"] = _CSP
        return response

    @blueprint.get("/docs/<path:asset>")
    def assets(asset: str) -> Response:
        return send_from_directory(_STATIC if asset == "docs.js" else _SWAGGER, asset)

    return blueprint

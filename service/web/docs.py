"""GET /openapi.json and /docs: the API's description, and Swagger UI from our own host."""

from __future__ import annotations

from pathlib import Path

import flask_openapi_swagger
from flask import Blueprint, Response, current_app, jsonify, redirect, send_from_directory
from werkzeug.wrappers import Response as BaseResponse

_STATIC = Path(__file__).parent / "static"
_SWAGGER = Path(flask_openapi_swagger.__file__).parent / "templates" / "swagger"


def docs_blueprint() -> Blueprint:
    """The description and its page. Every asset comes from this server, none of the page's scripts is inline."""
    blueprint = Blueprint("docs", __name__)

    @blueprint.get("/openapi.json")
    def description() -> Response:
        return jsonify(current_app.api_doc)  # type: ignore[attr-defined]

    @blueprint.get("/docs")
    def page() -> Response:
        return send_from_directory(_STATIC, "docs.html")

    @blueprint.get("/docs/<path:asset>")
    def assets(asset: str) -> Response:
        return send_from_directory(_STATIC if asset == "docs.js" else _SWAGGER, asset)

    @blueprint.get("/")
    def root() -> BaseResponse:
        return redirect("/docs")

    return blueprint

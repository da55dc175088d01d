"""POST /admin/reload."""

from __future__ import annotations

from flask import Response
from pydantic import BaseModel, Field

from service.errors import Forbidden
from service.registry.version_resolver import Resolution, VersionResolver
from service.web.api.resource import Resource
from service.web.api.schemas import ERRORS, Body, ErrorAnswer
from service.web.gate.access import current_owner, is_local
from service.web.gate.route import Route


class ReloadBody(Body):
    """An empty object: `{}`."""


class ServedName(BaseModel):
    """A model name, and the version that requests for it get."""

    name: str = Field(description="the name, as clients send it in `model`")
    model: str = Field(description="name@version that is served under this name")
    failed: str | None = Field(
        description="name@version that should be served but can't be loaded; null if there is none, or if the store "
        "can't say which"
    )
    code: str | None = Field(description="code of the error that keeps a newer version from being served, or null")


class ReloadAnswer(BaseModel):
    """Every model name that was requested since the server started."""

    data: list[ServedName]


class AdminRoutes(Resource):
    """The routes for operators of the server."""

    name = "admin"
    errors = ERRORS | {"403": ErrorAnswer}

    def __init__(self, resolver: VersionResolver) -> None:
        self._resolver = resolver

    @Route(
        "POST",
        "/admin/reload",
        "Serve new model versions",
        {"200": ReloadAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def reload(self, body: ReloadBody) -> Response:  # noqa: ARG002 - the schema refuses every field
        """Look up each model name in the store again, and load the version that it refers to now.

        If a version can't be loaded, the previous one stays in service. Needs an API key. On a server without API keys
        the request has to be sent from the server's own machine.
        """
        if not current_owner() and not is_local():
            raise Forbidden("this server has no API keys, so it accepts this request only from its own machine")
        answer = ReloadAnswer(data=[_served_name(resolution) for resolution in self._resolver.refresh()])
        return Response(answer.model_dump_json(), mimetype="application/json")


def _served_name(resolution: Resolution) -> ServedName:
    return ServedName(name=resolution.name, model=resolution.model, failed=resolution.failed, code=resolution.code)

"""POST /admin/reload."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag
from pydantic import BaseModel, Field

from service.errors import Forbidden
from service.registry.version_resolver import Resolution, VersionResolver
from service.web.api.schemas import ERRORS, Body, ErrorAnswer
from service.web.gate.access import current_owner


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


def admin_blueprint(resolver: VersionResolver) -> APIBlueprint:
    """The routes for operators of the server."""
    responses = ERRORS | {"403": ErrorAnswer}
    blueprint = APIBlueprint("admin", __name__, abp_tags=[Tag(name="admin")], abp_responses=responses)

    @blueprint.post("/admin/reload", summary="Serve new model versions", responses={"200": ReloadAnswer})
    def reload(body: ReloadBody) -> Response:  # noqa: ARG001 - the schema refuses every field
        """Look up each model name in the store again, and load the version that it refers to now.

        If a version can't be loaded, the previous one stays in service. Only on a server with API keys.
        """
        # The address of the client proves nothing: through a proxy on this machine every request comes from it.
        if not current_owner():
            raise Forbidden(
                "this server has no API keys, so it can't tell its operator from others: set GRU_SERVE_API_KEYS, or "
                "wait until it looks for new versions by itself (GRU_SERVE_MODEL_POLL_S)"
            )
        answer = ReloadAnswer(data=[_served_name(resolution) for resolution in resolver.refresh()])
        return Response(answer.model_dump_json(), mimetype="application/json")

    return blueprint


def _served_name(resolution: Resolution) -> ServedName:
    return ServedName(name=resolution.name, model=resolution.model, failed=resolution.failed, code=resolution.code)

"""POST /admin/reload."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag
from pydantic import BaseModel

from service.errors import Forbidden
from service.registry.version_resolver import Resolution, VersionResolver
from service.web.access import current_owner, is_local
from service.web.schemas import ERRORS, Body, ErrorAnswer


class ReloadBody(Body):
    """Nothing is to be said: `{}`."""


class ServedName(BaseModel):
    """What a name means. failed, code: the version that it should mean, and why it doesn't; null: all is well."""

    name: str
    model: str
    failed: str | None
    code: str | None


class ReloadAnswer(BaseModel):
    """Every name that was asked for since the start."""

    data: list[ServedName]


def admin_blueprint(served: VersionResolver) -> APIBlueprint:
    """What who runs the server may do."""
    responses = ERRORS | {"403": ErrorAnswer}
    blueprint = APIBlueprint("admin", __name__, abp_tags=[Tag(name="admin")], abp_responses=responses)

    @blueprint.post("/admin/reload", summary="Serve new model versions", responses={"200": ReloadAnswer})
    def reload(body: ReloadBody) -> Response:  # noqa: ARG001 - the schema that refuses everything else
        """Load the version that each name means now. One that can't be loaded leaves the old one serving.

        Needs a key; where there are none, it has to come from this machine.
        """
        if not current_owner() and not is_local():
            raise Forbidden("without API keys this is open to the server's own machine only")
        answer = ReloadAnswer(data=[_shown(resolution) for resolution in served.refresh()])
        return Response(answer.model_dump_json(), mimetype="application/json")

    return blueprint


def _shown(resolution: Resolution) -> ServedName:
    return ServedName(name=resolution.name, model=resolution.model, failed=resolution.failed, code=resolution.code)

"""GET /healthz and /readyz."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import GruServeError, NotReady
from service.loaded import LoadedModels
from service.web.schemas import ErrorAnswer, HealthAnswer, ReadyAnswer


def health_blueprint(models: LoadedModels, default_model: str, kernel: str) -> APIBlueprint:
    """The two questions a supervisor asks: is the process alive, and may it get requests? kernel: what computes."""
    blueprint = APIBlueprint("health", __name__, abp_tags=[Tag(name="health")])

    @blueprint.get("/healthz", summary="The process answers", responses={"200": HealthAnswer})
    def healthz() -> Response:
        """Answer, always."""
        return Response(HealthAnswer(status="ok").model_dump_json(), mimetype="application/json")

    @blueprint.get("/readyz", summary="Requests can be served", responses={"200": ReadyAnswer, "503": ErrorAnswer})
    def readyz() -> Response:
        """Answer 200 if the default model is there and its engine steps, else 503."""
        try:
            models.get(default_model).engine.check()
        except GruServeError as error:
            raise NotReady(f"the default model can't be used: {error.code}") from error
        return Response(ReadyAnswer(status="ready", kernel=kernel).model_dump_json(), mimetype="application/json")

    return blueprint

"""GET /healthz and /readyz."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import GruServeError, NotReady
from service.registry.loaded_models import LoadedModels
from service.sessions.session_store import SessionStore
from service.web.access import open_to_all
from service.web.drain import Drain
from service.web.schemas import ErrorAnswer, HealthAnswer, ReadyAnswer, ReadyQuery


def health_blueprint(
    models: LoadedModels, default_model: str, store: SessionStore, drain: Drain, kernel: str
) -> APIBlueprint:
    """The two questions a supervisor asks: is the process alive, and may it get requests? kernel: what computes."""
    blueprint = APIBlueprint("health", __name__, abp_tags=[Tag(name="health")])

    @blueprint.get("/healthz", summary="The process answers", responses={"200": HealthAnswer})
    @open_to_all
    def healthz() -> Response:
        """Answer, always."""
        return Response(HealthAnswer(status="ok").model_dump_json(), mimetype="application/json")

    @blueprint.get("/readyz", summary="Requests can be served", responses={"200": ReadyAnswer, "503": ErrorAnswer})
    @open_to_all
    def readyz(query: ReadyQuery) -> Response:
        """Answer 200 if the default model is there, its engine steps, sessions can be had and it stays; or 503.

        With `part=completions` sessions don't count: completions go on without their store.
        """
        if drain.has_begun:
            raise NotReady("the server is draining: it finishes what it has and ends")
        try:
            models.get(default_model).engine.check()
        except GruServeError as error:
            raise NotReady(f"the default model can't be used: {error.code}") from error
        if query.part == "all":
            store.check()
        return Response(ReadyAnswer(status="ready", kernel=kernel).model_dump_json(), mimetype="application/json")

    return blueprint

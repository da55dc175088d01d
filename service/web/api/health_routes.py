"""GET /healthz and /readyz."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import GruServeError, NotReady
from service.registry.loaded_models import LoadedModels
from service.sessions.session_store import SessionStore
from service.web.api.schemas import ErrorAnswer, HealthAnswer, ReadyAnswer, ReadyQuery
from service.web.gate.access import open_to_all
from service.web.gate.drain import Drain
from service.web.gate.error_responses import error_response


def health_blueprint(
    models: LoadedModels, default_model: str, store: SessionStore, drain: Drain, kernel: str
) -> APIBlueprint:
    """The routes for supervisors and balancers. `kernel` names what computes the steps."""
    blueprint = APIBlueprint("health", __name__, abp_tags=[Tag(name="health")])

    def check(part: str) -> None:
        """Raise NotReady or StoreUnavailable if requests can't be served."""
        if drain.has_begun:
            raise NotReady("the server is draining: it finishes open requests and exits")
        try:
            models.get(default_model).engine.check()
        except GruServeError as error:
            raise NotReady(f"the default model can't be used: {error.code}") from error
        if part == "all":
            store.check()

    @blueprint.get("/healthz", summary="Check that the process answers", responses={"200": HealthAnswer})
    @open_to_all
    def healthz() -> Response:
        """Answer 200 as long as the process runs."""
        return Response(HealthAnswer(status="ok").model_dump_json(), mimetype="application/json")

    @blueprint.get(
        "/readyz",
        summary="Check that requests can be served",
        responses={"200": ReadyAnswer, "404": ErrorAnswer, "503": ErrorAnswer},
    )
    @open_to_all
    def readyz(query: ReadyQuery) -> Response:
        """Answer 200 if the default model is loaded, its engine works, the session store is reachable and the server is
        not draining. Otherwise answer 503.

        With `part=completions` the session store is not checked, because completions don't need it. With `unready=404`
        the answer is 404 instead of 503.
        """
        try:
            check(query.part)
        except GruServeError as error:
            if query.unready == "404":
                return error_response(error.message, error.code, status=404)
            raise
        return Response(ReadyAnswer(status="ready", kernel=kernel).model_dump_json(), mimetype="application/json")

    return blueprint

"""/healthz, /health, /version, /readyz, /metrics and /admin: for operators, supervisors and balancers."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response

from service import __version__
from service.errors import Forbidden, GruServeError, NotReady
from service.registry.loaded_models import LoadedModels
from service.registry.version_resolver import Resolution, VersionResolver
from service.sessions.session_store import SessionStore
from service.web.api.operation.schemas import (
    HealthAnswer,
    ReadyAnswer,
    ReadyQuery,
    ReloadAnswer,
    ReloadBody,
    ServedName,
    VersionAnswer,
)
from service.web.api.resource import Resource
from service.web.api.schemas import ErrorAnswer
from service.web.gate.access import current_owner
from service.web.gate.drain import Drain
from service.web.gate.error_responses import error_response
from service.web.gate.route import Route


class HealthRoutes(Resource):
    """The routes for supervisors and balancers."""

    name = "health"

    def __init__(
        self, models: LoadedModels, default_model: str, store: SessionStore, drain: Drain, kernel: str
    ) -> None:
        """`kernel` names what computes the steps."""
        self._models, self._default_model, self._store = models, default_model, store
        self._drain, self._kernel = drain, kernel

    @Route("GET", "/healthz", "Check that the process answers", {"200": HealthAnswer}, open=True, is_check=True)
    def healthz(self) -> Response:
        """Answer 200 as long as the process runs."""
        return Response(HealthAnswer(status="ok").model_dump_json(), mimetype="application/json")

    @Route("GET", "/health", "Check that the process answers", {"200": HealthAnswer}, open=True, is_check=True)
    def health(self) -> Response:
        """Answer as /healthz, for clients that know servers by this path."""
        return self.healthz()

    @Route("GET", "/version", "Show the version of the server", {"200": VersionAnswer})
    def version(self) -> Response:
        """Return the version of gru-serve."""
        return Response(VersionAnswer(version=__version__).model_dump_json(), mimetype="application/json")

    @Route(
        "GET",
        "/readyz",
        "Check that requests can be served",
        {"200": ReadyAnswer, "404": ErrorAnswer},
        open=True,
        is_check=True,
    )
    def readyz(self, query: ReadyQuery) -> Response:
        """Answer 200 if the default model is loaded, its engine works, the session store is reachable and the server is
        not draining. Otherwise answer 503.

        With `part=completions` the session store is not checked, because completions don't need it. With `unready=404`
        the answer is 404 instead of 503.
        """
        try:
            self._check(query.part)
        except GruServeError as error:
            if query.unready == "404":
                return error_response(error.message, error.code, status=404)
            raise
        return Response(ReadyAnswer(status="ready", kernel=self._kernel).model_dump_json(), mimetype="application/json")

    def _check(self, part: str) -> None:
        """Raise NotReady or StoreUnavailable if requests can't be served."""
        if self._drain.has_begun:
            raise NotReady("the server is draining: it finishes open requests and exits")
        try:
            self._models.get(self._default_model).engine.check()
        except GruServeError as error:
            raise NotReady(f"the default model can't be used: {error.code}") from error
        if part == "all":
            self._store.check()


class MetricRoutes(Resource):
    """The metrics, for Prometheus."""

    name = "metrics"

    def __init__(self, exposition: Callable[[], Response]) -> None:
        """`exposition` returns the metrics in Prometheus' text format."""
        self._exposition = exposition

    @Route("GET", "/metrics")
    def show(self) -> Response:
        """Return all metrics."""
        return self._exposition()


class AdminRoutes(Resource):
    """The routes for operators of the server."""

    name = "admin"

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

        If a version can't be loaded, the previous one stays in service. Only on a server with API keys.
        """
        # The address of the client proves nothing: through a proxy on this machine every request comes from it.
        if not current_owner():
            raise Forbidden(
                "this server has no API keys, so it can't tell its operator from others: set GRU_SERVE_API_KEYS, or "
                "wait until it looks for new versions by itself (GRU_SERVE_MODEL_POLL_S)"
            )
        answer = ReloadAnswer(data=[_served_name(resolution) for resolution in self._resolver.refresh()])
        return Response(answer.model_dump_json(), mimetype="application/json")


def _served_name(resolution: Resolution) -> ServedName:
    return ServedName(name=resolution.name, model=resolution.model, failed=resolution.failed, code=resolution.code)

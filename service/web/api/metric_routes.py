"""GET /metrics."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response

from service.web.api.resource import Resource
from service.web.gate.route import Route


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

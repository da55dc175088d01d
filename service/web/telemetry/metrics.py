"""Counts and times answers and streams. `collector` reads the metrics of the other parts."""

from __future__ import annotations

import time

from flask import Flask, Request, Response, g, request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.web.api.events import Events, TextEvent
from service.web.api.sse import EventStream
from service.web.gate.guard import HTTP_METHODS
from service.web.gate.route import current_route

PREFIX = "gru_serve:"
_FIRST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_GAP_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STORE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

# Without this, each counter and histogram gets another series with the time at which it was created.
disable_created_metrics()  # type: ignore[no-untyped-call]


class StoreMetrics:
    """Implements `StoreObserver`: times the calls to a session store, and counts those that fail."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            f"{PREFIX}session_store_seconds", "Duration of calls to the session store.", ["operation"],
            buckets=_STORE_S, registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            f"{PREFIX}session_store_errors",
            "Calls to the session store that got no answer.",
            ["operation"],
            registry=registry,
        )

    def observe(self, operation: str, duration_s: float) -> None:
        """See StoreObserver."""
        self._seconds.labels(operation).observe(duration_s)

    def count_failure(self, operation: str) -> None:
        """See StoreObserver."""
        self._errors.labels(operation).inc()


class Metrics:
    """The metrics of one application. Collectors of other parts can be added to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.store = StoreMetrics(self.registry)
        self._requests = Counter(
            f"{PREFIX}http_requests", "Answers to HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            f"{PREFIX}e2e_request_latency_seconds", "Time from a request to the end of its answer. Errors don't count.",
            ["route"], buckets=_REQUEST_S, registry=self.registry,
        )  # fmt: skip
        # The children of these metrics by their labels. prometheus_client takes longer to find a child than to count.
        self._answers: dict[tuple[str, str, int], Counter] = {}
        self._durations: dict[str, Histogram] = {}
        self._first = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "Time from a request for a stream to its first characters.",
            buckets=_FIRST_S, registry=self.registry,
        )  # fmt: skip
        self._gaps = Histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Time between two events of a stream; each event carries all characters since the previous one.",
            buckets=_GAP_S, registry=self.registry,
        )  # fmt: skip

    def exposition(self) -> Response:
        """Return all metrics in Prometheus' text format."""
        return Response(generate_latest(self.registry), content_type=CONTENT_TYPE_LATEST)

    def count(self, response: Response) -> Response:
        """Count an answer. If it is a stream, its events are timed while they are sent."""
        # The request itself, because each access through Flask's proxy costs 1 us.
        current: Request = request._get_current_object()  # type: ignore[attr-defined]
        # The pattern of the route and not the path: clients must not be able to create series.
        route = current.url_rule.rule if current.url_rule is not None else "none"
        method = current.method if current.method in HTTP_METHODS else "other"
        status, began = response.status_code, g.get("started") or time.perf_counter()
        counter = self._answers.get((method, route, status))
        if counter is None:
            counter = self._answers[method, route, status] = self._requests.labels(method, route, status)
        counter.inc()
        if isinstance(response, EventStream):
            # A resumed stream begins with text that was generated earlier, so it has no time to first token.
            response.events = self._timed(response.events, began, is_new=current_route().counts_as_start)
            response.call_on_close(lambda: self._duration(route).observe(time.perf_counter() - began))
        elif status < 400:
            self._duration(route).observe(time.perf_counter() - began)
        return response

    def _duration(self, route: str) -> Histogram:
        duration = self._durations.get(route)
        if duration is None:
            duration = self._durations[route] = self._latency.labels(route)
        return duration

    def _timed(self, events: Events, began: float, *, is_new: bool) -> Events:
        last: float | None = None
        for event in events:
            if isinstance(event, TextEvent):
                now = time.perf_counter()
                if last is not None:
                    self._gaps.observe(now - last)
                elif is_new:
                    self._first.observe(now - began)
                last = now
            yield event


def register_metrics(app: Flask, metrics: Metrics) -> None:
    """Count every answer of the application."""
    app.extensions["gru_serve_metrics"] = metrics
    app.after_request(metrics.count)

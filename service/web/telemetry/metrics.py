"""Counts and times answers and streams. `collector` reads the metrics of the other parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import get_args

from flask import Flask, Request, Response, g, request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from service.sessions.session_store import Operation
from service.web.api.events import Events, TextEvent
from service.web.api.sse import EventStream
from service.web.gate.generation import current_generation
from service.web.gate.guard import HTTP_METHODS
from service.web.gate.route import current_route, route_of

PREFIX = "gru_serve:"  # of the names in the code; `Prefixed` exposes them with the configured prefixes
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
        # A series that appears with its first error has no increase that `rate` could see: it begins at 0.
        for operation in get_args(Operation):
            self._errors.labels(operation)
            self._seconds.labels(operation)

    def observe(self, operation: str, duration_s: float) -> None:
        """See StoreObserver."""
        self._seconds.labels(operation).observe(duration_s)

    def count_failure(self, operation: str) -> None:
        """See StoreObserver."""
        self._errors.labels(operation).inc()


class Metrics:
    """The metrics of one application. Collectors of other parts can be added to `registry`."""

    def __init__(self, prefixes: Sequence[str] = (PREFIX,)) -> None:
        """`prefixes`: Every metric of the service is exposed once with each of them, in place of PREFIX."""
        self.registry = CollectorRegistry()
        self._exposed = Prefixed(self.registry, prefixes)
        self.loaded_models: Callable[[], Sequence[str]] = tuple  # names; create_app sets it
        self._stream_routes: list[str] = []
        ProcessCollector(registry=self.registry)
        self.store = StoreMetrics(self.registry)
        self._requests = Counter(
            f"{PREFIX}http_requests", "Answers to HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            f"{PREFIX}e2e_request_latency_seconds", "Time from a request to the end of its answer. Errors don't count.",
            ["route", "model_name"], buckets=_REQUEST_S, registry=self.registry,
        )  # fmt: skip
        # The children of these metrics by their labels. prometheus_client takes longer to find a child than to count.
        self._answers: dict[tuple[str, str, int], Counter] = {}
        self._durations: dict[tuple[str, str], Histogram] = {}
        self._first = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "Time from a request for a stream to its first characters.",
            ["model_name"], buckets=_FIRST_S, registry=self.registry,
        )  # fmt: skip
        self._gaps = Histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Time between two events of a stream; each event carries all characters since the previous one.",
            ["model_name"], buckets=_GAP_S, registry=self.registry,
        )  # fmt: skip

    def exposition(self) -> Response:
        """Return all metrics in Prometheus' text format."""
        for model_name in self.loaded_models():  # each series is seen at 0 before its first event
            self._first.labels(model_name)
            self._gaps.labels(model_name)
            for route in self._stream_routes:
                self._duration(route, model_name)
        return Response(generate_latest(self._exposed), content_type=CONTENT_TYPE_LATEST)

    def expect_routes(self, app: Flask) -> None:
        """Let the series of every route begin at 0: those of its successes, of refusals for load, and of failures."""
        for rule in app.url_map.iter_rules():
            route = route_of(app.view_functions.get(rule.endpoint))
            if route is None:
                continue
            if route.streams and rule.rule not in self._stream_routes:
                self._stream_routes.append(rule.rule)
            statuses = {int(status) for status in route.responses or {} if int(status) < 400} or {200}
            statuses |= {500, 503} | ({429} if route.starts_work else set())
            for status in statuses:
                self._answer_counter(route.method, rule.rule, status)

    def count(self, response: Response) -> Response:
        """Count an answer. If it is a stream, its events are timed while they are sent."""
        # The request itself, because each access through Flask's proxy costs 1 us.
        current: Request = request._get_current_object()  # type: ignore[attr-defined]
        # The pattern of the route and not the path: clients must not be able to create series.
        route = current.url_rule.rule if current.url_rule is not None else "none"
        method = current.method if current.method in HTTP_METHODS else "other"
        status, began = response.status_code, g.get("started") or time.perf_counter()
        self._answer_counter(method, route, status).inc()
        generation = current_generation()
        model_name = generation.model_name if generation is not None else ""
        if isinstance(response, EventStream):
            # A resumed stream begins with text that was generated earlier, so it has no time to first token.
            response.events = self._timed(response.events, began, model_name, is_new=current_route().counts_as_start)
            response.call_on_close(lambda: self._duration(route, model_name).observe(time.perf_counter() - began))
        elif status < 400:
            self._duration(route, model_name).observe(time.perf_counter() - began)
        return response

    def _answer_counter(self, method: str, route: str, status: int) -> Counter:
        counter = self._answers.get((method, route, status))
        if counter is None:
            counter = self._answers[method, route, status] = self._requests.labels(method, route, status)
        return counter

    def _duration(self, route: str, model_name: str) -> Histogram:
        duration = self._durations.get((route, model_name))
        if duration is None:
            duration = self._durations[route, model_name] = self._latency.labels(route, model_name)
        return duration

    def _timed(self, events: Events, began: float, model_name: str, *, is_new: bool) -> Events:
        first, gaps, last = self._first.labels(model_name), self._gaps.labels(model_name), None
        for event in events:
            if isinstance(event, TextEvent):
                now = time.perf_counter()
                if last is not None:
                    gaps.observe(now - last)
                elif is_new:
                    first.observe(now - began)
                last = now
            yield event


class Prefixed(Collector):
    """The metrics of a registry with other prefixes than PREFIX: each once with each prefix."""

    def __init__(self, registry: CollectorRegistry, prefixes: Sequence[str]) -> None:
        self._registry, self._prefixes = registry, prefixes

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. Those of the process have standard names and stay as they are."""
        for family in self._registry.collect():
            if not family.name.startswith(PREFIX):
                yield family
                continue
            for prefix in self._prefixes:
                renamed = copy(family)
                renamed.name = prefix + family.name.removeprefix(PREFIX)
                renamed.samples = [
                    sample._replace(name=prefix + sample.name.removeprefix(PREFIX)) for sample in family.samples
                ]
                yield renamed


def register_metrics(app: Flask, metrics: Metrics) -> None:
    """Count every answer of the application."""
    app.extensions["gru_serve_metrics"] = metrics
    app.after_request(metrics.count)

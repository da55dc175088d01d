"""GET /metrics: what happened at the web's edge is counted here, the rest is read where it is when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flask import Blueprint, Flask, Request, Response, g, request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.web.guard import HTTP_METHODS

PREFIX = "gru_serve:"
_FIRST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_GAP_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STORE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
# Events that bring no characters: pings, ends, errors.
_WITHOUT_TEXT = (b":", b"data: [DONE]", b"event: error")
_SESSION_DONE, _SESSION_MOVES, _HEAD_BYTES = b"\nevent: done\n", b"\nevent: reconnect\n", 64

# Else each counter and histogram has a series more, with the time of its incarnation.
disable_created_metrics()  # type: ignore[no-untyped-call]


class StoreMetrics:
    """Implements `StoreObserver`: how long a session store takes, and how often it can't be had."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            f"{PREFIX}session_store_seconds", "Exchanges with the session store.", ["operation"],
            buckets=_STORE_S, registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            f"{PREFIX}session_store_errors", "Exchanges that failed.", ["operation"], registry=registry
        )

    def observe(self, operation: str, duration_s: float) -> None:
        """See StoreObserver."""
        self._seconds.labels(operation).observe(duration_s)

    def count_failure(self, operation: str) -> None:
        """See StoreObserver."""
        self._errors.labels(operation).inc()


class Metrics:
    """The metrics of one application. registry: collectors of other parts may be registered there."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.store = StoreMetrics(self.registry)
        self._requests = Counter(
            f"{PREFIX}http_requests", "Answers.", ["method", "route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            f"{PREFIX}e2e_request_latency_seconds", "From a request to the end of its answer, if that is no error.",
            ["route"], buckets=_REQUEST_S, registry=self.registry,
        )  # fmt: skip
        # Their children, because to find one by its labels takes longer than to count.
        self._answers: dict[tuple[str, str, int], Counter] = {}
        self._durations: dict[str, Histogram] = {}
        self._first = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "From a request for a stream to its first characters.",
            buckets=_FIRST_S, registry=self.registry,
        )  # fmt: skip
        self._gaps = Histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Between two events of a stream; each brings all characters since the last.",
            buckets=_GAP_S, registry=self.registry,
        )  # fmt: skip

    def count(self, response: Response) -> Response:
        """Count an answer; a stream is timed on its way."""
        asked: Request = request._get_current_object()  # type: ignore[attr-defined]  # each look through it costs 1 us
        # Patterns of routes and not paths: a caller is not to make up labels.
        route = asked.url_rule.rule if asked.url_rule is not None else "none"
        method = asked.method if asked.method in HTTP_METHODS else "other"
        status, began = response.status_code, g.get("started") or time.perf_counter()
        counter = self._answers.get((method, route, status))
        if counter is None:
            counter = self._answers[method, route, status] = self._requests.labels(method, route, status)
        counter.inc()
        if response.mimetype == "text/event-stream":
            # What is taken up again comes from the past: only a new text has a first character.
            chunks: Iterable[bytes] = response.response  # type: ignore[assignment]
            response.response = self._timed(chunks, began, is_new=method == "POST")
            response.call_on_close(lambda: self._duration(route).observe(time.perf_counter() - began))
        elif status < 400:
            self._duration(route).observe(time.perf_counter() - began)
        return response

    def _duration(self, route: str) -> Histogram:
        duration = self._durations.get(route)
        if duration is None:
            duration = self._durations[route] = self._latency.labels(route)
        return duration

    def _timed(self, chunks: Iterable[bytes], began: float, *, is_new: bool) -> Iterator[bytes]:
        last: float | None = None
        for chunk in chunks:
            head = chunk[:_HEAD_BYTES]
            if not head.startswith(_WITHOUT_TEXT) and _SESSION_DONE not in head and _SESSION_MOVES not in head:
                now = time.perf_counter()
                if last is not None:
                    self._gaps.observe(now - last)
                elif is_new:
                    self._first.observe(now - began)
                last = now
            yield chunk


def register_metrics(app: Flask, metrics: Metrics) -> None:
    """Count every answer of the application, and show the counts."""
    blueprint = Blueprint("metrics", __name__)

    @blueprint.get("/metrics")
    def show() -> Response:
        return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_LATEST)

    app.extensions["gru_serve_metrics"] = metrics
    app.after_request(metrics.count)
    app.register_blueprint(blueprint)

"""Traces: spans of requests, exported with OTLP. OpenTelemetry's own variables configure it; without them it is off.

The engine only notes when a text reaches a stage. The request's thread makes the spans when its answer is complete.
No span holds a text, a key or the id of a session.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import structlog
from flask import Flask, Response, g, request

from service import __version__
from service.engine.handle import Handle
from service.web.api.events import ErrorEvent, Events
from service.web.api.sse import EventStream
from service.web.gate.generation import Generation, current_generation
from service.web.gate.guard import HTTP_METHODS
from service.web.gate.route import current_route

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = structlog.get_logger(__name__)

_SHUT_DOWN_S = 2.0


def otlp_provider() -> TracerProvider | None:
    """Return a provider that exports with OTLP over HTTP; None if the libraries are missing.

    OpenTelemetry's variables say where to, how many requests are sampled, and how the service is called.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: OpenTelemetry is configured and not installed: pip install gru-serve[otel]")
        return None
    resource = Resource({"service.name": "gru-serve", "service.version": __version__})
    provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def shut_down(provider: TracerProvider) -> None:
    """Export the spans that remain, within `_SHUT_DOWN_S`. The rest is lost, for the process has to exit in time.

    The exporter waits for ten seconds for a collector that is silent, and for as long as it likes for one that drips.
    """
    thread = threading.Thread(target=provider.shutdown, name="last traces", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there are too many threads
        return
    thread.join(_SHUT_DOWN_S)
    if thread.is_alive():
        log.warning("the last traces were not exported, because the collector does not answer")


def register_tracing(app: Flask, provider: TracerProvider) -> None:
    """Make a span for every request but those of checks, with spans of the stages of what it generates.

    Register it after the guard, which gives a request its id.
    """
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer, propagator = provider.get_tracer("gru-serve", __version__), TraceContextTextMapPropagator()

    @app.before_request
    def _begin() -> None:
        if current_route().is_check:
            return
        sent = {name: request.headers.get(name, "") for name in ("traceparent", "tracestate")}
        method = request.method if request.method in HTTP_METHODS else "_OTHER"
        route = request.url_rule.rule if request.url_rule is not None else None
        g.span = tracer.start_span(
            f"{method} {route}" if route is not None else method,
            propagator.extract({name: value for name, value in sent.items() if value}),
            SpanKind.SERVER,
            {"http.request.method": method} | ({"http.route": route} if route is not None else {}),
            start_time=time.time_ns() - round((time.perf_counter() - g.started) * 1e9),
        )
        structlog.contextvars.bind_contextvars(trace_id=f"{g.span.get_span_context().trace_id:032x}")

    @app.after_request
    def _end_with_answer(response: Response) -> Response:
        span: Span | None = g.pop("span", None)
        if span is not None:
            span.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= 500:
                _fail(span, str(response.status_code))
            is_stream = isinstance(response, EventStream)
            if isinstance(response, EventStream):
                response.events = _watched(response.events, span)
            generation = current_generation()
            response.call_on_close(lambda: _end(tracer, span, generation, is_stream))
        return response

    @app.teardown_request
    def _end_without_answer(_: BaseException | None) -> None:
        span: Span | None = g.pop("span", None)
        if span is not None:
            span.end()


def _watched(events: Events, span: Span) -> Events:
    """Pass the events on, and note an error among them."""
    try:
        for event in events:
            if isinstance(event, ErrorEvent):
                body: Any = event.body
                _fail(span, body["error"]["code"])
            yield event
    finally:
        events.close()


def _fail(span: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _end(tracer: Any, span: Span, generation: Generation | None, is_stream: bool) -> None:
    """End the span of a request, and make those of its stages from the times that the engine has noted."""
    if span.is_recording() and generation is not None and generation.handles:
        _add_stages(tracer, span, generation, is_stream)
    span.end()


def _add_stages(tracer: Any, span: Span, generation: Generation, is_stream: bool) -> None:
    from opentelemetry.trace import set_span_in_context

    offset_ns, handles = time.time_ns() - time.perf_counter_ns(), generation.handles

    def at(seconds: float) -> int:
        """Convert from the engine's clock to nanoseconds since 1970."""
        return round(seconds * 1e9) + offset_ns

    times = [handle.times for handle in handles]
    submitted = min(each.submitted for each in times)
    started = _first(each.started for each in times)
    first = _first(each.first for each in times)
    now = time.perf_counter()
    name = f"text_completion {generation.model_name}"
    attributes = _attributes(generation, is_stream)
    if first is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = first - submitted
    inference = tracer.start_span(name, set_span_in_context(span), attributes=attributes, start_time=at(submitted))
    # Each stage ends where the next one begins. Of several texts, the first counts that reaches a stage.
    reached = [("queue", submitted), ("prompt", started), ("generation", first), ("", now)]
    stages = [(stage, begin) for stage, begin in reached if begin is not None]
    for (stage, begin), (_, end) in pairwise(stages):
        child = tracer.start_span(stage, set_span_in_context(inference), start_time=at(begin))
        child.end(at(end))
    if first is not None:
        inference.add_event("first character", timestamp=at(first))
    inference.end(at(now))


def _first(times: Iterable[float | None]) -> float | None:
    return min((each for each in times if each is not None), default=None)


def _attributes(generation: Generation, is_stream: bool) -> dict[str, Any]:
    """Return the attributes of the conventions for generative AI. The seed and stop strings are not among them."""
    handles, request_of = generation.handles, generation.handles[0].request
    sampling, num_cached = request_of.sampling, _num_cached(handles)
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "gru_serve",
        "gen_ai.request.model": generation.model_name,
        "gen_ai.response.model": generation.model_name,
        "gen_ai.request.max_tokens": request_of.max_chars,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
        "gen_ai.request.choice.count": len(handles),
        "gen_ai.request.stream": is_stream,
        "gen_ai.usage.input_tokens": num_cached + sum(len(handle.request.prompt) for handle in handles),
        "gen_ai.usage.cache_read.input_tokens": num_cached,
        "gen_ai.usage.output_tokens": sum(map(_num_generated, handles)),
    }
    if all(handle.end is not None for handle in handles):
        attributes["gen_ai.response.finish_reasons"] = [handle.end.reason for handle in handles if handle.end]
    return attributes


def _num_cached(handles: Sequence[Handle]) -> int:
    """Return how many characters of the prompts a cache had; a session's own text before a run is no prompt."""
    return sum(
        handle.request.position
        for handle in handles
        if handle.request.history_prompt is not None
        and len(handle.request.history_prompt) == handle.request.position + len(handle.request.prompt)
    )


def _num_generated(handle: Handle) -> int:
    if handle.end is None:
        return 0
    return max(0, handle.end.position - handle.request.position - len(handle.request.prompt))

"""`create_app` puts HTTP around the service: gates before the routes, the routes, and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import structlog
from flask_openapi import Info, OpenAPI

from service import __version__
from service.api_keys import ApiKeys, read_keys
from service.assembly import Service, default_chat_template
from service.engine.automaton.stops import MAX_STOP_CHARS
from service.settings import SPARE_THREADS, Settings, otlp_is_configured, read_settings
from service.shares import SharedBudget
from service.web.api.candidates.routes import CandidateRoutes, SessionCandidateRoutes
from service.web.api.chat.routes import ChatRoutes
from service.web.api.completions.routes import CompletionLimits, CompletionRoutes
from service.web.api.embeddings.routes import EmbeddingRoutes
from service.web.api.inspect.routes import InspectRoutes
from service.web.api.models.routes import ModelRoutes
from service.web.api.models.schemas import Limits
from service.web.api.openapi import Bounds, DescribedApi
from service.web.api.operation.routes import AdminRoutes, HealthRoutes, MetricRoutes
from service.web.api.pages import DocsRoutes, PageRoutes
from service.web.api.resource import Resource
from service.web.api.schemas import ErrorAnswer
from service.web.api.sessions.routes import SessionLimits, SessionRoutes
from service.web.api.tokens.routes import TokenRoutes
from service.web.gate.access import register_access
from service.web.gate.admission import AdmissionLimit
from service.web.gate.drain import INTERRUPT_S, Drain
from service.web.gate.error_responses import register_error_handlers, validation_error_response
from service.web.gate.guard import register_body_check, register_guard
from service.web.gate.origins import HostPolicy, is_loopback, register_origins
from service.web.gate.paths import register_paths
from service.web.gate.proxies import register_proxies
from service.web.gate.rate_limit import register_rate_limit
from service.web.gate.reconnects import register_reconnects
from service.web.telemetry.collector import ServiceCollector
from service.web.telemetry.logs import configure_logs
from service.web.telemetry.metrics import Metrics, register_metrics
from service.web.telemetry.tracing import otlp_provider, register_tracing, shut_down

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> OpenAPI:
    """Build the WSGI application and load its default model.

    `settings` None reads them from the environment. Raises InvalidSettings, ModelNotFound or InvalidArtifact if the
    service can't be started with them. The code that builds the application has to close `app.extensions["gru_serve"]`.
    """
    settings = settings or read_settings()
    configure_logs(settings.log_level, settings.log_format)
    keys = read_keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    metrics, drain = Metrics(settings.metrics_prefix_list), Drain(settings.drain_s, settings.drain_notice_s)
    admission = _admission_limit(settings)
    with ExitStack() as closing:
        service = closing.enter_context(Service.open(settings, metrics.store))
        app = _openapi_app()
        tracing = otlp_provider() if otlp_is_configured() else None
        if tracing is not None:
            closing.callback(shut_down, tracing)
        closing.callback(_register_gates(app, settings, keys, drain, metrics, tracing))
        for resource in _resources(settings, service, admission, drain, metrics):
            resource.register(app)
        app.bounds = _bounds(settings)
        metrics.registry.register(ServiceCollector(service.models, service.store, admission, service.kernel.name))
        metrics.loaded_models = lambda: [model.version.ref for model in service.models.all()]
        metrics.expect_routes(app)
        drain.on_interrupt(lambda: service.sessions.runs.interrupt_all(INTERRUPT_S / 2))
        drain.on_interrupt(service.models.close)  # last: saving the runs needs the engines; completions get an error
        app.extensions["gru_serve"] = closing.pop_all()
    app.extensions["gru_serve_drain"] = drain  # for the gunicorn worker
    app.extensions["gru_serve_keys"] = keys  # for the gunicorn worker, which doesn't wait for a stranger's body
    _log_start(settings, service, keys)
    return app


def _openapi_app() -> DescribedApi:
    app = DescribedApi(
        __name__,
        info=Info(title="gru-serve", version=__version__, description="Generates text with a GRU character model."),
        validation_error_status=400,
        validation_error_model=ErrorAnswer,
        validation_error_callback=validation_error_response,
        doc_ui=False,
        security_schemes={
            "key": {"type": "http", "scheme": "bearer", "description": "Required if API keys are configured."}
        },
        openapi_extensions={"security": [{"key": []}, {}]},
        static_folder=None,
    )
    app.openapi_version = "3.1.1"
    return app


def _register_gates(
    app: OpenAPI,
    settings: Settings,
    keys: ApiKeys | None,
    drain: Drain,
    metrics: Metrics,
    tracing: TracerProvider | None,
) -> Callable[[], None]:
    """Add what every request passes. The order matters: the body is read last, after everything that may refuse.

    Return a function that closes connections.
    """
    register_reconnects(app)
    register_paths(app)
    register_guard(app, drain)
    if tracing is not None:
        register_tracing(app, tracing)
    register_metrics(app, metrics)
    register_proxies(app, settings.parsed_proxies)
    register_origins(app, HostPolicy(settings.host, settings.allowed_host_list), settings.allowed_origin_list)
    register_access(app, keys)
    redis_url = settings.session_store.get_secret_value()
    close_counts = register_rate_limit(app, settings.rate_limit, redis_url, settings.max_tokens)
    register_body_check(app, settings.max_body_bytes, SharedBudget(settings.large_bodies_bytes))
    register_error_handlers(app)
    return close_counts


def _resources(
    settings: Settings, service: Service, admission: AdmissionLimit, drain: Drain, metrics: Metrics
) -> list[Resource]:
    """Return all routes, in the order of the API description."""
    models, store, default = service.models, service.store, service.default_model
    template = default_chat_template(settings)
    texts = settings.max_batch + settings.max_queue
    completion_limits = CompletionLimits(settings.max_tokens, settings.max_prompt_chars, texts)
    max_run = _max_run(settings)
    session_limits = SessionLimits(max_run, settings.max_prompt_chars)
    limits = Limits(
        max_tokens=settings.max_tokens, session_max_tokens=max_run, max_prompt_chars=settings.max_prompt_chars
    )
    score_budget = SharedBudget(settings.max_scores)
    return [
        CompletionRoutes(models, default, completion_limits, admission, score_budget, service.states),
        ChatRoutes(models, default, template, completion_limits, admission, score_budget),
        EmbeddingRoutes(models, default, completion_limits, admission, score_budget),
        SessionRoutes(service.sessions, default, session_limits, admission, score_budget),
        CandidateRoutes(models, default, settings.max_prompt_chars, admission, score_budget),
        SessionCandidateRoutes(service.sessions, settings.max_prompt_chars, admission, score_budget),
        InspectRoutes(service.inspector, default, admission, score_budget),
        ModelRoutes(models, limits),
        TokenRoutes(models, default, template, settings.max_prompt_chars, settings.max_tokens, admission),
        HealthRoutes(models, default, store, drain, service.kernel.name),
        AdminRoutes(models.resolver),
        MetricRoutes(metrics.exposition),
        DocsRoutes(),
        PageRoutes(),
    ]


def _max_run(settings: Settings) -> int:
    """Return the largest `max_tokens` of a session's run.

    Everything that a run generates is retained until the run ends, including the stop string that ends it.
    """
    return min(settings.max_tokens, settings.session_text_chars - MAX_STOP_CHARS)


def _bounds(settings: Settings) -> Bounds:
    """Return the bounds of fields that the settings decide, for the API description."""
    text = {"maxLength": settings.max_prompt_chars}
    return {
        "CompletionBody": {"max_tokens": {"maximum": settings.max_tokens}, "prompt": text},
        "CreateBody": {"text": text},
        "FeedBody": {"text": text},
        "ScoreBody": {"prompt": text, "candidates": text},
        "SessionScoreBody": {"prompt": text, "candidates": text},
        "SuggestBody": {"prompt": text},
        "GenerateBody": {"max_tokens": {"maximum": _max_run(settings)}},
        "TokenizeBody": {"prompt": text},
        "DetokenizeBody": {"tokens": {"maxItems": settings.max_prompt_chars}},
    }


def _admission_limit(settings: Settings) -> AdmissionLimit:
    max_texts = settings.max_batch + settings.max_queue
    num_reserved = settings.num_http_threads - SPARE_THREADS - max_texts
    return AdmissionLimit(max_texts, max_per_client=settings.max_streams, num_reserved=num_reserved)


def _log_start(settings: Settings, service: Service, keys: ApiKeys | None) -> None:
    model = service.models.get(service.default_model)
    if not settings.state_key_list:
        log.warning(
            "no GRU_SERVE_STATE_KEYS: portable states are signed with a random key and expire with this process"
        )
    log.info(
        "model loaded",
        model=model.version.ref,
        digest=model.digest[:16],
        num_chars=len(model.charset),
        precision=model.precision,
        kernel=service.kernel.name,
        engine_threads=settings.num_engine_threads,
        store=str(service.models.store.root.absolute()),
    )
    if settings.uses_shipped_models:
        log.info(
            "these are the shipped models, because no model store is named and there is none here",
            missing=str(settings.model_store.absolute()),
        )
    if keys is None and not is_loopback(settings.host):
        log.warning("no API keys: anyone who can reach this address can use the service", host=settings.host)

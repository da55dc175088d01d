"""`create_app` builds the parts of the service and connects them. No other module does."""

from __future__ import annotations

import ipaddress
import secrets
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import structlog
from flask_openapi import Info, OpenAPI

from service import __version__
from service.api_keys import read_keys
from service.engine.kernels import choose_kernel
from service.engine.memory_budget import MemoryBudget
from service.errors import InvalidSettings
from service.generation.inspector import Inspector
from service.generation.score_budget import ScoreBudget
from service.generation.session_service import SessionService
from service.periodic import PeriodicThread
from service.registry.loaded_models import EngineSettings, LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.session_store import StoreObserver
from service.sessions.text import Retention
from service.settings import SPARE_THREADS, Settings, read_settings
from service.store.model_store import ModelStore
from service.web.api.admin_routes import admin_blueprint
from service.web.api.completion_routes import CompletionLimits, completions_blueprint
from service.web.api.health_routes import health_blueprint
from service.web.api.inspect_routes import inspect_blueprint
from service.web.api.model_routes import models_blueprint
from service.web.api.pages import docs_blueprint, page_blueprint
from service.web.api.schemas import MAX_STOP_CHARS, ErrorAnswer
from service.web.api.session_routes import SessionLimits, sessions_blueprint
from service.web.gate.access import register_access
from service.web.gate.admission import AdmissionLimit
from service.web.gate.drain import INTERRUPT_S, Drain
from service.web.gate.error_responses import register_error_handlers, validation_error_response
from service.web.gate.guard import register_body_check, register_guard
from service.web.gate.rate_limit import register_rate_limit
from service.web.telemetry.collector import ServiceCollector
from service.web.telemetry.logs import configure_logs
from service.web.telemetry.metrics import Metrics, register_metrics

if TYPE_CHECKING:
    from service.sessions.redis_store import RedisStore


def create_app(settings: Settings | None = None) -> OpenAPI:
    """Build the WSGI application and load its default model.

    `settings` None reads them from the environment. Raises InvalidSettings, ModelNotFound or InvalidArtifact if the
    service can't be started with them.
    """
    settings = settings or read_settings()
    configure_logs(settings.log_level, settings.log_format)
    log = structlog.get_logger(__name__)
    kernel = choose_kernel(settings.kernel, settings.num_engine_threads)
    engine_settings = EngineSettings(
        kernel=kernel,
        precision=settings.integer_precision,
        max_running=settings.max_batch,
        max_waiting=settings.max_queue,
        stall_s=settings.stall_s,
        memory=MemoryBudget(settings.max_text_bytes),
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )
    models = LoadedModels(ModelStore(settings.model_store), settings.max_models, engine_settings)
    model = models.get(settings.model)

    app = OpenAPI(
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
    app.json.sort_keys = False  # type: ignore[attr-defined]
    keys = read_keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    drain = Drain(settings.drain_s, settings.drain_notice_s)
    metrics = Metrics()
    register_guard(app, drain)
    register_metrics(app, metrics)
    register_access(app, keys)
    register_rate_limit(app, settings.rate_limit, settings.session_store.get_secret_value())
    register_body_check(app, settings.max_body_bytes, MemoryBudget(settings.max_large_bodies_bytes))
    register_error_handlers(app)
    limits = CompletionLimits(
        max_tokens=settings.max_tokens,
        max_prompt_chars=settings.max_prompt_chars,
        max_texts=settings.max_batch + settings.max_queue,
    )
    admission = AdmissionLimit(settings.num_http_threads - SPARE_THREADS, settings.max_streams)
    score_budget = ScoreBudget(settings.max_scores)
    app.register_api(completions_blueprint(models, settings.model, limits, admission, score_budget))
    closing = ExitStack()  # closes the application's parts; the code that builds the application has to call it
    retention = Retention(settings.session_checkpoint_chars, settings.session_text_chars)
    store = _session_store(settings, retention, metrics.store, closing)
    closing.callback(models.close)
    sealer = StateSealer(_state_keys(settings))
    sessions = SessionService(models, store, sealer, settings.session_ttl_s, retention)
    closing.callback(sessions.runs.close)
    # Everything that a run generates is retained until the run ends, including the stop string that ends it.
    max_run = min(settings.max_tokens, settings.session_text_chars - MAX_STOP_CHARS)
    session_limits = SessionLimits(max_run, settings.max_prompt_chars)
    app.register_api(sessions_blueprint(sessions, settings.model, session_limits, admission, score_budget))
    app.register_api(
        inspect_blueprint(Inspector(models, sessions.get, sealer), settings.model, admission, score_budget)
    )
    app.register_api(models_blueprint(models))
    app.register_api(health_blueprint(models, settings.model, store, drain, kernel.name))
    app.register_api(admin_blueprint(models.resolver))
    app.register_blueprint(docs_blueprint())
    app.register_blueprint(page_blueprint())
    metrics.registry.register(ServiceCollector(models, store, admission, kernel.name))
    if settings.model_poll_s:
        closing.callback(PeriodicThread("model-polling", settings.model_poll_s, models.resolver.poll).close)
    app.extensions["gru_serve"] = closing
    drain.on_interrupt(lambda: sessions.runs.interrupt_all(INTERRUPT_S / 2))
    drain.on_interrupt(models.close)  # last, because saving the runs needs the engines; completions get an error
    app.extensions["gru_serve_drain"] = drain  # for the gunicorn worker
    log.info(
        "model loaded",
        model=model.version.ref,
        digest=model.digest[:16],
        num_chars=len(model.charset),
        precision=model.precision,
        kernel=kernel.name,
        engine_threads=settings.num_engine_threads,
    )
    if keys is None and not _is_loopback(settings.host):
        log.warning("no API keys: anyone who can reach this address can use the service", host=settings.host)
    return app


def _session_store(
    settings: Settings, retention: Retention, observer: StoreObserver, closing: ExitStack
) -> MemoryStore | RedisStore:
    url = settings.session_store.get_secret_value()
    if url.startswith("memory:"):
        memory = MemoryStore(settings.max_sessions, settings.max_session_bytes)
        closing.callback(PeriodicThread("sweeper", 1.0, memory.sweep).close)
        return memory
    # Imported here, so that a server with sessions in memory starts without the redis library.
    from service.sessions.redis_server import RedisServer
    from service.sessions.redis_store import RedisStore

    try:
        store = RedisStore(RedisServer(url, observer=observer), retention.segment_chars, settings.max_session_bytes)
    except ValueError as error:
        raise InvalidSettings(f"GRU_SERVE_SESSION_STORE {error}", param="session_store") from None
    closing.callback(store.close)
    return store


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _state_keys(settings: Settings) -> list[str]:
    keys = settings.state_key_list
    if not keys:
        structlog.get_logger(__name__).warning(
            "no GRU_SERVE_STATE_KEYS: portable states are signed with a random key and expire with this process"
        )
        keys = [secrets.token_hex(32)]
    return keys

"""`create_app`: the only place where the parts of the service are built and joined."""

from __future__ import annotations

import structlog
import torch
from flask_openapi import Info, OpenAPI

from service import __version__
from service.config import SPARE_THREADS, Settings, read_settings
from service.engine.torch_stepper import TorchStepper
from service.loaded import EngineSettings, LoadedModels
from service.store import ModelStore
from service.web.completions import CompletionLimits, completions_blueprint
from service.web.docs import docs_blueprint
from service.web.errors import register_error_handlers, validation_error_response
from service.web.guard import register_guard
from service.web.health import health_blueprint
from service.web.logs import configure_logs
from service.web.models import models_blueprint
from service.web.schemas import ErrorAnswer


def create_app(settings: Settings | None = None) -> OpenAPI:
    """The WSGI application, with its default model loaded. Without settings they are read from the environment.

    Raises InvalidSettings, ModelNotFound or InvalidArtifact if it can't serve.
    """
    settings = settings or read_settings()
    configure_logs(settings.log_level, settings.log_format)
    log = structlog.get_logger(__name__)
    torch.set_num_threads(settings.num_engine_threads)
    engine_settings = EngineSettings(
        make_stepper=TorchStepper,
        precision=settings.integer_precision,
        max_running=settings.max_batch,
        max_waiting=settings.max_queue,
        stall_s=settings.stall_s,
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
        static_folder=None,
    )
    app.openapi_version = "3.1.1"
    app.json.sort_keys = False  # type: ignore[attr-defined]
    register_guard(app, settings.max_body_bytes)
    register_error_handlers(app)
    limits = CompletionLimits(
        max_tokens=settings.max_tokens,
        max_prompt_chars=settings.max_prompt_chars,
        max_texts=settings.max_batch + settings.max_queue,
        max_open=settings.num_http_threads - SPARE_THREADS,
    )
    app.register_api(completions_blueprint(models, settings.model, limits))
    app.register_api(models_blueprint(models.store))
    app.register_api(health_blueprint(models, settings.model))
    app.register_blueprint(docs_blueprint())
    app.extensions["gru_serve"] = models  # for those who build the application and have to end its threads
    log.info(
        "model loaded",
        model=model.version.ref,
        digest=model.digest[:16],
        num_chars=len(model.charset),
        precision=model.precision,
        engine_threads=settings.num_engine_threads,
    )
    return app

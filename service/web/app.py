"""`create_app`: the only place where the parts of the service are built and joined."""

from __future__ import annotations

from typing import Any

import structlog
import torch
from flask_openapi import Info, OpenAPI

from service import __version__
from service.config import SPARE_THREADS, Settings, read_settings
from service.generation import Generator
from service.loaded import LoadedModels
from service.store import ModelStore
from service.web.completions import completions_blueprint
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
    # A text is stepped on one core; the parallelism is in the texts side by side.
    torch.set_num_threads(1)

    models = LoadedModels(ModelStore(settings.model_store), settings.max_models)
    model = models.get(settings.model)
    max_waiting = settings.http_threads - settings.engine_threads - SPARE_THREADS
    generator = Generator(settings.engine_threads, max_waiting)

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
    limits: dict[str, Any] = {"max_tokens": settings.max_tokens, "max_prompt_chars": settings.max_prompt_chars}
    app.register_api(completions_blueprint(models, generator, settings.model, **limits))
    app.register_api(models_blueprint(models.store))
    app.register_api(health_blueprint(models, settings.model))
    app.register_blueprint(docs_blueprint())
    log.info("model loaded", model=model.version.ref, digest=model.digest[:16], num_chars=len(model.charset))
    return app

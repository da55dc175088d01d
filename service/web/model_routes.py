"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import structlog
from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import GruServeError, ModelNotFound
from service.registry.loaded_models import LoadedModels
from service.store.model_store import Description
from service.web.schemas import ERRORS, ModelAnswer, ModelMeta, ModelPath, ModelsAnswer

log = structlog.get_logger(__name__)


def models_blueprint(models: LoadedModels) -> APIBlueprint:
    """The resource, over the store of these models."""
    store = models.store
    blueprint = APIBlueprint("models", __name__, abp_tags=[Tag(name="models")], abp_responses=ERRORS)

    @blueprint.get("/v1/models", summary="Every model version", responses={"200": ModelsAnswer})
    def index() -> Response:
        """List every whole version in the store; damaged ones are left out, and named in the log."""
        data = []
        for version in [version for name in store.names() for version in store.versions(name)]:
            try:
                data.append(_answer(store.describe(version)))
            except ModelNotFound:
                continue  # deleted meanwhile
            except GruServeError as error:
                log.warning("model not listed", model=version.ref, error=error.message)
        return _json(ModelsAnswer(data=data))

    @blueprint.get("/v1/models/<id>", summary="One model version", responses={"200": ModelAnswer})
    def show(path: ModelPath) -> Response:
        """Describe the version that a name, name@version or name@alias means here and now."""
        return _json(_answer(store.describe(models.resolve(path.id))))

    return blueprint


def _answer(described: Description) -> ModelAnswer:
    config, training = described.config, described.training
    return ModelAnswer(
        id=described.version.ref,
        created=training.published_at or 0,
        meta=ModelMeta(
            charset=config.charset,
            embedding_dim=config.embedding_dim,
            num_units=config.num_units,
            num_layers=config.num_layers,
            num_parameters=config.num_parameters,
            digest=described.digest,
            aliases=described.aliases,
            validation_loss=training.losses.validation_nats_per_char,
        ),
    )


def _json(answer: ModelAnswer | ModelsAnswer) -> Response:
    return Response(answer.model_dump_json(), mimetype="application/json")

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import structlog
from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import GruServeError, ModelNotFound
from service.registry.loaded_models import LoadedModels
from service.store.model_store import Description
from service.web.api.schemas import ERRORS, ModelAnswer, ModelMeta, ModelPath, ModelsAnswer

log = structlog.get_logger(__name__)


def models_blueprint(models: LoadedModels) -> APIBlueprint:
    """The routes of models, which describe the versions in the model store."""
    store = models.store
    blueprint = APIBlueprint("models", __name__, abp_tags=[Tag(name="models")], abp_responses=ERRORS)

    @blueprint.get("/v1/models", summary="List model versions", responses={"200": ModelsAnswer})
    def index() -> Response:
        """List every version in the model store. Damaged versions are left out, and the server logs them."""
        data = []
        for version in [version for name in store.names() for version in store.versions(name)]:
            try:
                data.append(_answer(store.describe(version)))
            except ModelNotFound:
                continue  # deleted since it was listed
            except GruServeError as error:
                log.warning("model not listed", model=version.ref, error=error.message)
        return _json(ModelsAnswer(data=data))

    @blueprint.get("/v1/models/<id>", summary="Show a model version", responses={"200": ModelAnswer})
    def show(path: ModelPath) -> Response:
        """Describe the version that `name`, `name@version` or `name@alias` refers to on this server now."""
        return _json(_answer(store.describe(models.resolve(path.id))))

    return blueprint


def _answer(description: Description) -> ModelAnswer:
    config, training = description.config, description.training
    return ModelAnswer(
        id=description.version.ref,
        created=training.published_at or 0,
        meta=ModelMeta(
            charset=config.charset,
            embedding_dim=config.embedding_dim,
            num_units=config.num_units,
            num_layers=config.num_layers,
            num_parameters=config.num_parameters,
            digest=description.digest,
            aliases=description.aliases,
            validation_loss=training.losses.validation_nats_per_char,
        ),
    )


def _json(answer: ModelAnswer | ModelsAnswer) -> Response:
    return Response(answer.model_dump_json(), mimetype="application/json")

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import structlog
from flask import Response

from service.errors import GruServeError, ModelNotFound
from service.registry.loaded_models import LoadedModels
from service.store.model_store import Description
from service.web.api.models.schemas import Limits, ModelAnswer, ModelMeta, ModelPath, ModelsAnswer
from service.web.api.resource import Resource
from service.web.api.schemas import ERRORS
from service.web.gate.route import Route

log = structlog.get_logger(__name__)


class ModelRoutes(Resource):
    """The routes of models, which describe the versions in the model store."""

    name = "models"
    errors = ERRORS

    def __init__(self, models: LoadedModels, limits: Limits) -> None:
        self._models, self._store, self._limits = models, models.store, limits
        self._not_listed: dict[str, str] = {}  # version, or name that can't be read -> why; as of the last list

    @Route("GET", "/v1/models", "List model versions", {"200": ModelsAnswer})
    def index(self) -> Response:
        """List every version in the model store. Damaged versions are left out, and the log names each of them once."""
        store, data = self._store, []
        not_listed = store.unreadable()
        for version in [version for name in store.names() for version in store.versions(name)]:
            try:
                data.append(_answer(store.describe(version)))
            except ModelNotFound:
                continue  # deleted since it was listed
            except GruServeError as failure:
                not_listed[version.ref] = failure.message
        for model, error in not_listed.items() - self._not_listed.items():
            log.warning("model not listed", model=model, error=error)
        self._not_listed = not_listed
        return _json(ModelsAnswer(data=data, limits=self._limits))

    @Route("GET", "/v1/models/<id>", "Show a model version", {"200": ModelAnswer})
    def show(self, path: ModelPath) -> Response:
        """Describe the version that `name`, `name@version` or `name@alias` refers to on this server now."""
        return _json(_answer(self._store.describe(self._models.resolve(path.id))))


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

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import structlog
from flask import Response

from service.errors import GruServeError, ModelNotFound
from service.registry.loaded_models import LoadedModels
from service.store.model_store import LATEST, Description
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

    @Route("GET", "/v1/models", "List models", {"200": ModelsAnswer})
    def index(self) -> Response:
        """List every name that a request can give as `model`, with the version in the model store that it stands for.

        Damaged versions are left out, and the log names each of them once.
        """
        with self._models.reads.place():
            data, not_listed = self._read()
        for model, error in not_listed.items() - self._not_listed.items():
            log.warning("model not listed", model=model, error=error)
        self._not_listed = not_listed
        return _json(ModelsAnswer(data=data, limits=self._limits))

    def _read(self) -> tuple[list[ModelAnswer], dict[str, str]]:
        """Return the list, and what is left out: a version, or a name that can't be read, with the reason."""
        data: list[ModelAnswer] = []
        not_listed = self._store.unreadable()
        for name in self._store.names():
            described: dict[str, Description] = {}
            for version in self._store.versions(name):
                try:
                    described[version.ref] = self._store.describe(version)
                except ModelNotFound:
                    continue  # deleted since it was listed
                except GruServeError as failure:
                    not_listed[version.ref] = failure.message
            data += self._answers(name, described)
        return data, not_listed

    def _answers(self, name: str, described: Mapping[str, Description]) -> Iterator[ModelAnswer]:
        """Yield what the list has for a name: the name, its versions, and its aliases.

        `name@latest` is left out, because it is the name.
        """
        aliases = {alias for one in described.values() for alias in one.aliases if alias != LATEST}
        for ref in [name, *described, *(f"{name}@{alias}" for alias in sorted(aliases))]:
            with suppress(ModelNotFound):  # deleted since it was listed
                served = self._models.resolve(ref).ref
                if served in described:
                    yield _answer(ref, described[served])

    @Route("GET", "/v1/models/<id>", "Show a model", {"200": ModelAnswer})
    def show(self, path: ModelPath) -> Response:
        """Describe the version that `name`, `name@version` or `name@alias` refers to on this server now."""
        return _json(_answer(path.id, self._models.describe(path.id, param="id")))


def _answer(ref: str, description: Description) -> ModelAnswer:
    config, training = description.config, description.training
    return ModelAnswer(
        id=ref,
        created=training.published_at or 0,
        meta=ModelMeta(
            version=description.version.ref,
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

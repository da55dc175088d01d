"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import InvalidArtifact, StoreError
from service.model.artifact import read_training
from service.store import ModelStore, ModelVersion
from service.web.schemas import ERRORS, ModelAnswer, ModelMeta, ModelPath, ModelsAnswer


def models_blueprint(store: ModelStore) -> APIBlueprint:
    """The resource, over this store."""
    blueprint = APIBlueprint("models", __name__, abp_tags=[Tag(name="models")], abp_responses=ERRORS)

    @blueprint.get("/v1/models", summary="Every model version", responses={"200": ModelsAnswer})
    def index() -> Response:
        """List every whole version in the store; damaged ones are left out."""
        data = []
        for name in store.names():
            for version in store.versions(name):
                try:
                    data.append(_describe(store, version))
                except (InvalidArtifact, StoreError):
                    continue  # `gru-serve models verify` says what is wrong with it
        return _json(ModelsAnswer(data=data))

    @blueprint.get("/v1/models/<id>", summary="One model version", responses={"200": ModelAnswer})
    def show(path: ModelPath) -> Response:
        """Describe the version that a name, name@version or name@alias means now."""
        return _json(_describe(store, store.resolve(path.id)))

    return blueprint


def _describe(store: ModelStore, version: ModelVersion) -> ModelAnswer:
    config, training, digest = read_training(version.path)
    losses = training.get("losses")
    loss = losses.get("validation_nats_per_char") if isinstance(losses, dict) else None
    aliases = sorted(alias for alias, number in store.aliases(version.name).items() if number == version.number)
    if store.versions(version.name)[-1:] == [version]:
        aliases.insert(0, "latest")
    published = training.get("published_at")
    return ModelAnswer(
        id=version.ref,
        created=published if isinstance(published, int) else int(version.path.stat().st_mtime),
        meta=ModelMeta(
            charset=config.charset,
            embedding_dim=config.embedding_dim,
            num_units=config.num_units,
            num_layers=config.num_layers,
            num_parameters=config.num_parameters,
            digest=digest,
            aliases=aliases,
            validation_loss=loss if isinstance(loss, float) else None,
        ),
    )


def _json(answer: ModelAnswer | ModelsAnswer) -> Response:
    return Response(answer.model_dump_json(), mimetype="application/json")

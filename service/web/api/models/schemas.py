"""The paths of /v1/models, and the bodies of the answers.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ModelMeta(BaseModel):
    """Properties of a model version."""

    version: str = Field(description="name@version that this name stands for on this server now")
    charset: str = Field(description="all characters that the model knows, in the order of their ids")
    embedding_dim: int = Field(description="size of the vector that represents a character")
    num_units: int = Field(description="units of each layer")
    num_layers: int
    num_parameters: int
    digest: str = Field(description="SHA-256 of config and weights")
    aliases: list[str] = Field(description="aliases of this version; it can be requested as name@alias")
    validation_loss: float | None = Field(description="nats per character on held-out text; null if unknown")


class ModelAnswer(BaseModel):
    """A name of a model and the version that it stands for, in OpenAI's shape."""

    id: str = Field(
        description="the name, as a request gives it in `model`: name, name@version or name@alias",
        examples=["shakespeare", "shakespeare@1"],
    )
    object: Literal["model"] = "model"
    created: int = Field(description="time of publication, in seconds since 1970; 0 if unknown")
    owned_by: str = "gru-serve"
    meta: ModelMeta


class Limits(BaseModel):
    """What one request may ask of this server, whichever its model."""

    max_tokens: int = Field(description="largest `max_tokens` of a completion")
    session_max_tokens: int = Field(description="largest `max_tokens` of a session's run")
    max_prompt_chars: int = Field(description="characters of the text that one request may bring")


class ModelsAnswer(BaseModel):
    """All names of models, and the limits of requests for them."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]
    limits: Limits


class ModelPath(BaseModel):
    """Path parameters of /v1/models/{id}."""

    id: str = Field(max_length=200, description="name, name@version or name@alias")

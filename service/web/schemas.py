"""The bodies of requests and answers: validation, `/openapi.json` and `/docs` all come from here."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

_SEED_LIMIT = 2**63
_HARD_MAX_TOKENS = 10_000_000  # the schema's bound; the configured GRU_SERVE_MAX_TOKENS is checked beside it

StopString = Annotated[str, Field(min_length=1, max_length=256)]


def only(value: object) -> WrapValidator:
    """A validator that takes this value of a type and says of every other that it isn't supported."""

    def check(given: object, parse: ValidatorFunctionWrapHandler) -> object:
        if parse(given) != value:
            shown = json.dumps(value)
            raise PydanticCustomError("unsupported_value", "only {shown} is supported", {"shown": shown})
        return value

    return WrapValidator(check)


class Body(BaseModel):
    """A request body: no unknown fields, no conversions between types, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CompletionBody(Body):
    """Body of POST /v1/completions. A token is a character."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 200, "seed": 7}}
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        # OpenAI's clients may send null for what has a default.
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}
        return body

    prompt: str = Field(description="the text to continue")
    model: str | None = Field(
        None, max_length=200, description="name, name@version or name@alias; none: the server's default model"
    )
    max_tokens: int = Field(16, ge=1, le=_HARD_MAX_TOKENS, description="characters to generate at most")
    temperature: float = Field(1.0, ge=0, le=100, description="divides the logits; 0 takes the likeliest character")
    top_k: int = Field(0, ge=0, le=65_536, description="draw from the k likeliest characters; 0: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest characters that reach this probability")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="a string or up to 4 that end the text; they are not part of the answer"
    )
    seed: int | None = Field(
        None, ge=-_SEED_LIMIT, lt=_SEED_LIMIT, description="same seed, same request, same text; none: another each time"
    )
    unknown_chars: Literal["error", "fold", "drop"] = Field(
        "error", description="what happens to characters of the prompt that the model doesn't know"
    )
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI's clients; has no effect")
    # What OpenAI's API has and this server has not yet: only the value that asks for nothing.
    n: Annotated[int, only(1)] = 1
    best_of: Annotated[int, only(1)] = 1
    stream: Annotated[bool, only(False)] = False
    stream_options: Annotated[dict[str, Any] | None, only(None)] = None
    echo: Annotated[bool, only(False)] = False
    logprobs: Annotated[int | None, only(None)] = None
    suffix: Annotated[str | None, only(None)] = None
    presence_penalty: Annotated[float, only(0)] = 0.0
    frequency_penalty: Annotated[float, only(0)] = 0.0
    logit_bias: Annotated[dict[str, float], only({})] = {}


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Characters read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=lambda: PromptTokensDetails())


class PromptTokensDetails(BaseModel):
    """How the prompt was read."""

    cached_tokens: int = Field(0, description="characters whose state was remembered and not stepped again")


class CompletionAnswer(BaseModel):
    """Answer of POST /v1/completions, in OpenAI's shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="name@version that answered")
    system_fingerprint: str = Field(description="equal fingerprints and equal seeds give equal texts")
    choices: list[Choice]
    usage: Usage


class ModelMeta(BaseModel):
    """What a model is."""

    charset: str = Field(description="every character it knows, in the order of their ids")
    embedding_dim: int
    num_units: int
    num_layers: int
    num_parameters: int
    digest: str = Field(description="SHA-256 over config and weights")
    aliases: list[str] = Field(description="names that mean this version: name@alias")
    validation_loss: float | None = Field(description="nats a character on held-out text, if known")


class ModelAnswer(BaseModel):
    """A model version, in OpenAI's shape."""

    id: str = Field(examples=["shakespeare@1"])
    object: Literal["model"] = "model"
    created: int = Field(description="when it was published, seconds since 1970; 0: not known")
    owned_by: str = "gru-serve"
    meta: ModelMeta


class ModelsAnswer(BaseModel):
    """Every version in the store."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class ModelPath(BaseModel):
    """Path of /v1/models/{id}."""

    id: str = Field(max_length=200, description="name, name@version or name@alias")


class HealthAnswer(BaseModel):
    """State of the process."""

    status: Literal["ok", "ready"]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the field that caused it")
    code: str = Field(description="stable name of the error")


class ErrorAnswer(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorObject


ERRORS: dict[str | int | HTTPStatus, Any] = {
    "400": ErrorAnswer, "404": ErrorAnswer, "408": ErrorAnswer, "413": ErrorAnswer, "415": ErrorAnswer,
    "429": ErrorAnswer, "503": ErrorAnswer,
}  # fmt: skip

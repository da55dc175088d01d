"""The bodies of requests and answers: validation, `/openapi.json` and `/docs` all come from here."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from service.engine import sampling_settings as sampling
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.engine.stepper import FinishReason
from service.errors import InvalidValue
from service.model.charset import Charset, UnknownChars

MAX_CHOICES = 128  # prompts x continuations that one request may ask for
_SEED_LIMIT = 2**63
_HARD_MAX_TOKENS = 10_000_000  # the schema's bound; the configured GRU_SERVE_MAX_TOKENS is checked beside it
MAX_STOP_CHARS = 256

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
SingleChar = Annotated[str, Field(min_length=1, max_length=8)]


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

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        # OpenAI's clients may send null for what has a default.
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}
        return body


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="one more event before [DONE], with the usage and no choice")
    include_obfuscation: Annotated[bool, only(False)] = False


class SamplingBody(Body):
    """How far to continue a text, and how. A token is a character."""

    max_tokens: int = Field(
        16, ge=0, le=_HARD_MAX_TOKENS, description="characters to generate at most; 0, with echo, reads only"
    )
    temperature: sampling.Temperature = PLAIN.temperature
    top_k: sampling.TopK = PLAIN.top_k
    top_p: sampling.TopP = PLAIN.top_p
    min_p: sampling.MinP = PLAIN.min_p
    repetition_penalty: sampling.RepetitionPenalty = PLAIN.repetition_penalty
    presence_penalty: sampling.PresencePenalty = PLAIN.presence_penalty
    frequency_penalty: sampling.FrequencyPenalty = PLAIN.frequency_penalty
    logit_bias: Annotated[dict[SingleChar, sampling.Bias], Field(max_length=1024)] = Field(
        {}, description="character -> number added to its logit, -100 to 100"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="a string or up to 4 that end the text; they are not part of the answer"
    )
    seed: int | None = Field(
        None, ge=-_SEED_LIMIT, lt=_SEED_LIMIT, description="same seed, same request, same text; none: another each time"
    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever form the caller gave it in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling_settings(self, charset_of: Callable[[], Charset]) -> SamplingSettings:
        """Return the settings for a model whose charset `charset_of` looks up; it is called only if there are biases.

        Raises UnknownCharacters for a bias of a character that the model doesn't know, InvalidValue for a bias of
        something that is not one character.
        """
        biases: list[tuple[int, float]] = []
        try:
            charset = charset_of() if self.logit_bias else None
            if charset is not None:
                biases = sorted((_single_id(charset, char), bias) for char, bias in self.logit_bias.items())
        except InvalidValue as error:
            error.param = "logit_bias"
            raise
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return SamplingSettings(**numbers, logit_bias=tuple((char, bias) for char, bias in biases if bias != 0))


def _single_id(charset: Charset, char: str) -> int:
    ids = charset.encode(char)
    if len(ids) != 1:
        raise InvalidValue(f"logit_bias: {char!r} is not one character", param="logit_bias")
    return int(ids[0])


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions. A token is a character."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 200, "seed": 7}}
    )

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] = Field(
        description="the text to continue, or several"
    )
    model: str | None = Field(
        None, max_length=200, description="name, name@version or name@alias; none: the server's default model"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="continuations of each prompt")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="make so many, answer the n likeliest a character; none: n"
    )
    echo: bool = Field(False, description="the answer's text begins with the prompt")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="log-probability of each character, and of so many likeliest ones"
    )
    stream: bool = Field(False, description="answer with server-sent events, as characters are generated")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    unknown_chars: UnknownChars = Field(
        "error", description="what happens to characters of the prompt that the model doesn't know"
    )
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI's clients; has no effect")
    suffix: Annotated[str | None, only(None)] = None  # of OpenAI's API; this model only writes onwards


class Logprobs(BaseModel):
    """Log-probabilities of a choice's characters: nats, under the model's own distribution, before any setting."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null: nothing predicts the first character of a text")
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="the likeliest characters, and the chosen one"
    )
    text_offset: list[int]


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = Field(description="null: more is to come, in a stream")


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
    usage: Usage | None = Field(description="null: in a stream, before its last event")


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


class ReadyQuery(BaseModel):
    """Of /readyz."""

    model_config = ConfigDict(extra="forbid")

    part: Literal["all", "completions"] = Field("all", description="what has to be ready")


class HealthAnswer(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class ReadyAnswer(BaseModel):
    """Requests can be served."""

    status: Literal["ready"]
    kernel: str = Field(
        description="what computes: a variant of the step in C++, named for its instructions, or torch; no part of "
        "`system_fingerprint`, because all give the same bits",
        examples=["avx512vnni"],
    )


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the field that caused it")
    code: str = Field(description="stable name of the error")
    position: int | None = Field(None, description="of a position_conflict: how long the text is; else not there")


class ErrorAnswer(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorObject


ERRORS: dict[str | int | HTTPStatus, Any] = {
    "400": ErrorAnswer, "401": ErrorAnswer, "404": ErrorAnswer, "408": ErrorAnswer, "413": ErrorAnswer,
    "415": ErrorAnswer, "429": ErrorAnswer, "503": ErrorAnswer,
}  # fmt: skip

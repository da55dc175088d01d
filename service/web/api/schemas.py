"""The bodies of requests and answers. Validation, `/openapi.json` and `/docs` are generated from these classes.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from service.engine import sampling_settings as sampling
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.engine.stepper import FinishReason
from service.model.charset import UnknownChars

MAX_CHOICES = 128  # prompts x continuations in one request
_SEED_LIMIT = 2**63
_HARD_MAX_TOKENS = 10_000_000  # a fixed bound for the schema; the routes check GRU_SERVE_MAX_TOKENS
MAX_STOP_CHARS = 256

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
SingleChar = Annotated[str, Field(min_length=1, max_length=8)]


def only(value: object) -> WrapValidator:
    """Return a validator that accepts only this value, and refuses others of its type with `unsupported_value`."""

    def check(sent: object, parse: ValidatorFunctionWrapHandler) -> object:
        if parse(sent) != value:
            shown = json.dumps(value)
            raise PydanticCustomError("unsupported_value", "only {shown} is supported", {"shown": shown})
        return value

    return WrapValidator(check)


class Body(BaseModel):
    """A request body. It allows no unknown fields, no conversion between types and no infinite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, body: Any) -> Any:
        # OpenAI's clients may send null for a field that has a default.
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}
        return body


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = Field(
        False, description="send one more event before `[DONE]`, with the usage and without choices"
    )
    include_obfuscation: Annotated[bool, only(False)] = Field(
        False, description="accepted for compatibility with OpenAI's clients; only false is supported"
    )


class SamplingBody(Body):
    """How far to continue a text, and how. A token is a character."""

    max_tokens: int = Field(
        16,
        ge=0,
        le=_HARD_MAX_TOKENS,
        description="largest number of characters to generate; 0 only reads the prompt, and needs echo",
    )
    temperature: sampling.Temperature = PLAIN.temperature
    top_k: sampling.TopK = PLAIN.top_k
    top_p: sampling.TopP = PLAIN.top_p
    min_p: sampling.MinP = PLAIN.min_p
    repetition_penalty: sampling.RepetitionPenalty = PLAIN.repetition_penalty
    presence_penalty: sampling.PresencePenalty = PLAIN.presence_penalty
    frequency_penalty: sampling.FrequencyPenalty = PLAIN.frequency_penalty
    logit_bias: Annotated[dict[SingleChar, sampling.Bias], Field(max_length=sampling.MAX_BIASES)] = Field(
        {}, description="character -> number, -100 to 100, that is added to its logit"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="a string, or a list of up to 4, that ends the text and is not part of it"
    )
    seed: int | None = Field(
        None,
        ge=-_SEED_LIMIT,
        lt=_SEED_LIMIT,
        description="the same request and seed give the same text; default: a random seed, or the session's own",
    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever form the caller gave it in."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling_settings(self) -> SamplingSettings:
        """All sampling settings but `logit_bias`, whose characters only get ids with the model that generates."""
        return SamplingSettings(**{name: getattr(self, name) for name in NUMBERS})


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions. A token is a character."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 200, "seed": 7}}
    )

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] = Field(
        description="the text to continue, or a list of texts"
    )
    model: str | None = Field(
        None, max_length=200, description="name, name@version or name@alias; default: the server's default model"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="number of continuations of each prompt")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="number of continuations to generate for each prompt, of which the `n` with the highest mean "
        "log-probability per character are returned. Default: `n`",
    )
    echo: bool = Field(False, description="begin the text of each choice with the prompt")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="return the log-probability of each character, and of this many most likely characters at each "
        "position",
    )
    stream: bool = Field(False, description="send the text as server-sent events while it is generated")
    stream_options: StreamOptions | None = Field(None, description="only allowed with `stream`")
    unknown_chars: UnknownChars = Field(
        "error",
        description="what to do with characters of the prompt that the model doesn't know: refuse the request "
        "(`error`), replace them by similar ones (`fold`) or leave them out (`drop`)",
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only prompts with the same salt, of the same API key, share cached hidden states",
    )
    user: str | None = Field(
        None, max_length=256, description="accepted for compatibility with OpenAI's clients, and ignored"
    )
    suffix: Annotated[str | None, only(None)] = Field(
        None, description="not supported: the models can't take text after the gap into account"
    )


class Logprobs(BaseModel):
    """Log-probabilities of a text's characters, in nats.

    They are those of the model itself, before temperature, penalties and other sampling settings.
    """

    tokens: list[str] = Field(description="the characters")
    token_logprobs: list[float | None] = Field(
        description="log-probability of each character; null for the first character of a text, which nothing predicts"
    )
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="for each position, the log-probabilities of the most likely characters and of the chosen one; "
        "null if `logprobs` is 0"
    )
    text_offset: list[int] = Field(description="position of each character in the text")


class Choice(BaseModel):
    """One continuation."""

    index: int = Field(description="number of the choice; the choices of one prompt follow each other")
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = Field(
        description="why the text ended: `stop` after a stop string, `length` at `max_tokens`; null in events of a "
        "stream that are followed by more text"
    )


class Usage(BaseModel):
    """Number of characters that were read and generated."""

    prompt_tokens: int = Field(description="characters of the prompts; 0 in a session")
    completion_tokens: int = Field(
        description="characters generated; in a completion also those that are not returned, such as a stop string"
    )
    total_tokens: int = Field(description="the sum of both")
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=lambda: PromptTokensDetails())


class PromptTokensDetails(BaseModel):
    """Details about reading the prompts."""

    cached_tokens: int = Field(
        0, description="characters of the prompts that were not computed again, because their hidden state was cached"
    )


class CompletionAnswer(BaseModel):
    """Answer of POST /v1/completions, in OpenAI's shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="name@version of the model that generated the text")
    system_fingerprint: str = Field(
        description="identifies model and arithmetic: with the same fingerprint, the same request and seed give the "
        "same text"
    )
    choices: list[Choice]
    usage: Usage | None = Field(
        description="null in a stream, except in the event before `[DONE]` that `include_usage` requests"
    )


class ModelMeta(BaseModel):
    """Properties of a model version."""

    charset: str = Field(description="all characters that the model knows, in the order of their ids")
    embedding_dim: int = Field(description="size of the vector that represents a character")
    num_units: int = Field(description="units of each layer")
    num_layers: int
    num_parameters: int
    digest: str = Field(description="SHA-256 of config and weights")
    aliases: list[str] = Field(description="aliases of this version; it can be requested as name@alias")
    validation_loss: float | None = Field(description="nats per character on held-out text; null if unknown")


class ModelAnswer(BaseModel):
    """A model version, in OpenAI's shape."""

    id: str = Field(examples=["shakespeare@1"])
    object: Literal["model"] = "model"
    created: int = Field(description="time of publication, in seconds since 1970; 0 if unknown")
    owned_by: str = "gru-serve"
    meta: ModelMeta


class ModelsAnswer(BaseModel):
    """All versions in the model store."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class ModelPath(BaseModel):
    """Path parameters of /v1/models/{id}."""

    id: str = Field(max_length=200, description="name, name@version or name@alias")


class ReadyQuery(BaseModel):
    """Query parameters of /readyz."""

    model_config = ConfigDict(extra="forbid")

    part: Literal["all", "completions"] = Field(
        "all", description="what to check: everything, or only what completions need"
    )
    unready: Literal["503", "404"] = Field(
        "503", description="status while requests can't be served; HAProxy lets running answers finish after a 404"
    )


class HealthAnswer(BaseModel):
    """The process runs."""

    status: Literal["ok"]


class ReadyAnswer(BaseModel):
    """Requests can be served."""

    status: Literal["ready"]
    kernel: str = Field(
        description="what computes the steps: a variant of the C++ kernel, named after its instruction set, or torch. "
        "It is not part of `system_fingerprint`, because all variants give the same bits",
        examples=["avx512vnni"],
    )


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str = Field(description="what is wrong, in words; the wording may change")
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the field, parameter or header that caused the error; null if it was none")
    code: str = Field(description="name of the error; names don't change")
    position: int | None = Field(
        None, description="length of the session's text; only present if `code` is `position_conflict`"
    )


class ErrorAnswer(BaseModel):
    """Body of every error answer."""

    error: ErrorObject


ERRORS: dict[str | int | HTTPStatus, Any] = {
    "400": ErrorAnswer, "401": ErrorAnswer, "404": ErrorAnswer, "408": ErrorAnswer, "413": ErrorAnswer,
    "415": ErrorAnswer, "429": ErrorAnswer, "503": ErrorAnswer,
}  # fmt: skip

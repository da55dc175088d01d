"""What the schemas of several resources share. Validation, `/openapi.json` and `/docs` are generated from the schemas.

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
from service.engine.stop import MAX_STOP_CHARS
from service.model.charset import UnknownChars

_SEED_LIMIT = 2**63
_HARD_MAX_TOKENS = 2**53  # a fixed bound for the schema; the routes check GRU_SERVE_MAX_TOKENS
UNKNOWN_CHARS = (
    "what to do with characters that the model doesn't know: refuse the request (`error`), replace them by similar "
    "ones (`fold`) or leave them out (`drop`)"
)
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
SingleChar = Annotated[str, Field(min_length=1, max_length=8)]


def only(value: object) -> WrapValidator:
    """Return a validator that accepts only this value, and refuses others of its type with `unsupported_value`."""

    def check(sent: object, parse: ValidatorFunctionWrapHandler) -> object:
        if parse(sent) != value:
            shown = json.dumps(value)
            raise PydanticCustomError("unsupported_value", "only {shown} is supported: leave it out", {"shown": shown})
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
    logit_bias: Annotated[dict[SingleChar, sampling.Bias], Field(max_length=1024)] = Field(
        {}, description="character -> number, -100 to 100, that is added to its logit"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="a string, or a list of up to 4, that ends the text and is not part of it"
    )
    unknown_chars: UnknownChars = Field(
        "error",
        description=f"{UNKNOWN_CHARS}, in all texts of the request. `drop` leaves out a `stop` string that has one",
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

"""What the schemas of several resources share. Validation, `/openapi.json` and `/docs` are generated from the schemas.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.engine import sampling_settings as sampling
from service.engine.automaton.stops import MAX_STOP_CHARS, MAX_STOPS
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.errors import InvalidValue
from service.model.charset import MAX_CHARSET, UnknownChars

_SEED_LIMIT = 2**63
_HARD_MAX_TOKENS = 2**53  # a fixed bound for the schema; the routes check GRU_SERVE_MAX_TOKENS
_MAX_STOP_STRINGS, _MAX_STOP_IDS = 4, MAX_STOPS - 4
UNKNOWN_CHARS = (
    "what to do with characters that the model doesn't know: refuse the request (`error`), replace them by similar "
    "ones (`fold`), leave them out (`drop`), or replace those that can be and leave out the others (`fold_drop`)"
)
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
SingleChar = Annotated[str, Field(min_length=1, max_length=8)]
# An id of a character: its index in the model's charset, whose length the routes check.
CharId = Annotated[int, Field(ge=0, lt=MAX_CHARSET)]
# Name of a model; empty as clients send it that have no choice: not given.
ModelRef = Annotated[str | None, Field(max_length=200), AfterValidator(lambda ref: ref or None)]
# How many alternatives to score; clients that take it for a switch send false for none.
_NumLogprobs = Annotated[int, Field(ge=0, le=20)]
NumLogprobs = Annotated[
    _NumLogprobs | None,
    BeforeValidator(
        lambda sent: None if sent is False else sent, json_schema_input_type=_NumLogprobs | Literal[False] | None
    ),
]

# A state that is signed; any of a model that the service can load is shorter.
PortableState = Annotated[str | None, Field(max_length=1_000_000)]


class Body(BaseModel):
    """A request body. It allows no unknown fields, no conversion between types and no infinite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    other_names: ClassVar[Mapping[str, str]] = {}  # what clients call a field elsewhere -> its name here, for an error

    def num_chars(self, _max_tokens: int, /) -> int:
        """Return how many characters the request reads and generates, for the rate limit.

        _max_tokens: what each of its texts may generate. 0 is returned for a request for more, which is refused.
        """
        return 0

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
    top_k: int = Field(
        PLAIN.top_k, ge=-1, le=65_536, description="draw from the k likeliest characters only; 0 or -1: from all"
    )
    top_p: float = Field(
        PLAIN.top_p,
        ge=0,
        le=1,
        description="draw only from the likeliest characters that together reach this probability; 0 always takes the "
        "likeliest one",
    )
    min_p: sampling.MinP = PLAIN.min_p
    repetition_penalty: sampling.RepetitionPenalty = PLAIN.repetition_penalty
    presence_penalty: sampling.PresencePenalty = PLAIN.presence_penalty
    frequency_penalty: sampling.FrequencyPenalty = PLAIN.frequency_penalty
    logit_bias: Annotated[dict[SingleChar, sampling.Bias], Field(max_length=1024)] = Field(
        {},
        description="character, or id of one in two digits or more, -> number, -100 to 100, that is added to its logit",
    )
    allowed_token_ids: (
        Annotated[list[CharId], Field(min_length=1, max_length=sampling.MAX_ALLOWED, fail_fast=True)] | None
    ) = Field(None, description="ids of the only characters that can be drawn")
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description="a string, or a list of up to 4, that ends the text and is not part of it"
    )
    stop_token_ids: Annotated[list[CharId], Field(max_length=_MAX_STOP_IDS, fail_fast=True)] = Field(
        [], description="ids of characters that end the text, as stop strings of one character do"
    )
    include_stop_str_in_output: bool = Field(
        False, description="the stop string or character that ends the text is part of it"
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=_HARD_MAX_TOKENS,
        description="none of this many first characters ends the text: a stop string that is complete by then is "
        "part of the text like any other. At most `max_tokens`",
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

    @model_validator(mode="after")
    def _check_min_tokens(self) -> SamplingBody:
        if self.min_tokens > self.max_tokens:
            raise InvalidValue(
                f"min_tokens: must be at most max_tokens, which is {self.max_tokens}", param="min_tokens"
            )
        return self

    @property
    def sampling_settings(self) -> SamplingSettings:
        """All sampling settings but `logit_bias` and allowed ids, which need the charset of the model."""
        settings = SamplingSettings(**{name: getattr(self, name) for name in NUMBERS} | {"top_k": max(0, self.top_k)})
        # The likeliest characters that reach a probability of 0 are the likeliest one alone.
        return settings if settings.top_p else replace(settings, temperature=0.0, top_p=1.0)


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
    allowed_logprobs: list[float | None] | None = Field(
        None,
        description="log-probability of each character among those that the form allowed; null for characters of the "
        "prompt. Only present if the request has a form",
    )


class Usage(BaseModel):
    """Number of characters that were read and generated."""

    prompt_tokens: int = Field(description="characters of the prompts; 0 in a session")
    completion_tokens: int = Field(
        description="characters generated; in a completion also those that are not returned, such as a stop string"
    )
    total_tokens: int = Field(description="the sum of both")
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=lambda: PromptTokensDetails())

    @classmethod
    def of(cls, num_prompt: int, num_generated: int, num_cached: int = 0) -> Usage:
        """Return the usage of a request. num_cached: characters of the prompt that were not stepped again."""
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


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
    retry: bool | None = Field(
        None, description="true if a session's stream that ended with this error may be resumed; otherwise not present"
    )


class ErrorAnswer(BaseModel):
    """Body of every error answer."""

    error: ErrorObject


# What a route that names a model or a session may answer beyond what every route may: see `openapi.error_responses`.
ERRORS: dict[str | int | HTTPStatus, Any] = {"404": ErrorAnswer}

"""The body of POST /v1/completions, and of its answer.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from service.engine.stepper import FinishReason
from service.web.api.schemas import Body, Logprobs, SamplingBody, Usage, only

MAX_CHOICES = 128  # prompts x continuations in one request


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = Field(
        False, description="send one more event before `[DONE]`, with the usage and without choices"
    )
    include_obfuscation: Annotated[bool, only(False)] = Field(
        False, description="accepted for compatibility with OpenAI's clients; only false is supported"
    )


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

    @field_validator("prompt", mode="before")
    @classmethod
    def _refuse_ids(cls, value: object) -> object:
        parts = value if isinstance(value, list) else []
        if any(isinstance(part, (int, list)) for part in parts[:MAX_CHOICES]):
            raise PydanticCustomError(
                "prompt_type",
                "must be a text or a list of texts, not ids of tokens: a token is a character here, so send the text",
            )
        return value


class Choice(BaseModel):
    """One continuation."""

    index: int = Field(description="number of the choice; the choices of one prompt follow each other")
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = Field(
        description="why the text ended: `stop` after a stop string, `length` at `max_tokens`; null in events of a "
        "stream that are followed by more text"
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

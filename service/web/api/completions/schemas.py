"""The body of POST /v1/completions, and of its answer.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.engine.stepper import FinishReason
from service.generation.n_best import MAX_N
from service.web.api.forms import GenerationBody
from service.web.api.known_fields import ClientFields, Only
from service.web.api.schemas import (
    Body,
    CharId,
    Logprobs,
    ModelRef,
    NumLogprobs,
    PortableState,
    Usage,
)

MAX_CHOICES = 128  # prompts x continuations in one request


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = Field(
        False, description="send one more event before `[DONE]`, with the usage and without choices"
    )
    continuous_usage_stats: bool = Field(False, description="every event has the usage up to it")
    include_obfuscation: Annotated[bool | None, Only("the lengths of events tell nothing that was a secret", False)] = (
        None
    )


def kind_of_prompt(prompt: object) -> str | None:
    """Return which of the alternatives of `Prompt`, or of other texts, a value is meant to be, by its first element."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "texts of ids" if isinstance(first, list) else "ids" if type(first) is int else "texts"


_Ids = Annotated[list[CharId], Field(fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag("texts")]
    | Annotated[list[CharId], Field(min_length=1, fail_fast=True), Tag("ids")]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag("texts of ids")],
    Discriminator(
        kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, the ids of its characters, or a list of texts or of ids",
    ),
]


class CompletionBody(ClientFields, GenerationBody):
    """Body of POST /v1/completions. A token is a character."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "prompt": "ROMEO:", "max_tokens": 200, "seed": 7}}
    )

    prompt: Prompt = Field(
        description="the text to continue, as a string or as the ids of its characters, or a list of such texts"
    )
    model: ModelRef = Field(None, description="name, name@version or name@alias; default: the server's default model")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="number of continuations of each prompt")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="number of continuations to generate for each prompt, of which the `n` with the highest mean "
        "log-probability per character are returned. Default: `n`",
    )
    beam: int | None = Field(
        None,
        ge=1,
        le=MAX_N,
        description="return this many continuations of each prompt, the likeliest of all up to a stop string or "
        "`max_tokens`, instead of drawing them. Not with `stream`, `seed` and sampling settings, and with `max_tokens` "
        "up to 1,024",
    )
    echo: bool = Field(False, description="begin the text of each choice with the prompt")
    logprobs: NumLogprobs = Field(
        None,
        description="return the log-probability of each character, and of this many most likely characters at each "
        "position",
    )
    prompt_logprobs: NumLogprobs = Field(
        None,
        description="return with each choice the log-probability of each character of the prompt, and of this many "
        "most likely characters at its place; not with `stream`",
    )
    return_token_ids: bool = Field(
        False,
        description="return with each choice the ids of the prompt and of the generated text; in a stream those of the "
        "prompt with its first event",
    )
    stream: bool = Field(False, description="send the text as server-sent events while it is generated")
    stream_options: StreamOptions | None = Field(None, description="only allowed with `stream`")
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only prompts with the same salt, of the same API key, share cached hidden states",
    )
    state: PortableState = Field(
        None,
        description="a portable state, as `return_state` or a session's `/state` returns it: each prompt continues its "
        "text. Its model and seed are used unless others are given; the model has to be the one that computed it",
    )
    return_state: bool = Field(
        False, description="return with each choice the portable state after its text; in a stream with its last event"
    )
    suffix: Annotated[str | None, Only("the models continue a text, and can't take into account what follows", "")] = (
        None
    )

    def num_chars(self, max_tokens: int, /) -> int:
        """See Body."""
        num_choices = self.beam or (self.best_of if self.best_of is not None else self.n)
        if self.max_tokens > max_tokens:
            return 0
        return sum(len(prompt) + self.max_tokens * num_choices for prompt in self.prompts)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as a text or as ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return [*cast("list[str | list[int]]", prompt)]


class PromptLogprob(BaseModel):
    """How likely a character was at a place of the prompt."""

    logprob: float = Field(description="its log-probability, in nats")
    rank: int | None = Field(
        description="its place among the likeliest characters, from 1; null if it is not one of the `prompt_logprobs` "
        "likeliest"
    )
    decoded_token: str = Field(description="the character")


class Choice(BaseModel):
    """One continuation."""

    index: int = Field(description="number of the choice; the choices of one prompt follow each other")
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = Field(
        description="why the text ended: `stop` at a stop string or where its form is complete, `length` at "
        "`max_tokens`; null in events of a stream that are followed by more text"
    )
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        None,
        description="for each character of the prompt, by their ids: that character and the most likely ones; null for "
        "the first one. Only present if requested",
    )
    prompt_token_ids: list[int] | None = Field(
        None, description="ids of the prompt; in a stream with its first event. Only present if requested"
    )
    token_ids: list[int] | None = Field(
        None, description="ids of the generated characters of `text`. Only present if requested"
    )
    logprob: float | None = Field(
        None, description="log-probability of the text with its stop string, in nats. Only present with `beam`"
    )
    exact: bool | None = Field(
        None,
        description="whether no other text is likelier than those of this prompt; if false, the search took too long, "
        "and they are the likeliest that it found. Only present with `beam`",
    )
    state: str | None = Field(
        None,
        description="portable state after `text`; in a stream with the last event of the choice. Only present if "
        "requested",
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
        description="null in a stream, except in the event before `[DONE]` that `include_usage` requests, and in all "
        "events with `continuous_usage_stats`"
    )

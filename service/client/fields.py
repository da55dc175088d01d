"""The optional fields of each call, as in the API, for type checkers and editors. docs/api.md says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

# A text, as a string or as the ids of its characters, or several of them.
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
UnknownChars = Literal["error", "fold", "drop", "fold_drop"]


class _Turn(TypedDict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, str]]  # the text, or its parts


class Message(_Turn, total=False):
    """One turn of a chat."""

    name: str  # the speaker's name; without it, the model's template names the role


class StructuredOutputs(TypedDict, total=False):
    """The form of a text, in vLLM's names: exactly one of these."""

    choice: list[str]
    regex: str
    json: dict[str, Any] | str  # a JSON schema
    json_object: bool


class _JsonSchema(TypedDict):
    schema: dict[str, Any]


class JsonSchemaFormat(_JsonSchema, total=False):
    """A JSON schema, in OpenAI's names."""

    name: str
    description: str
    strict: bool


class _Format(TypedDict):
    type: Literal["text", "json_object", "json_schema"]


class ResponseFormat(_Format, total=False):
    """The form of a text, in OpenAI's names."""

    json_schema: JsonSchemaFormat  # only with the type `json_schema`


class FormFields(TypedDict, total=False):
    """What a text has to be, as a whole: one of these fields."""

    structured_outputs: StructuredOutputs
    response_format: ResponseFormat


class SamplingFields(FormFields, total=False):
    """How characters are drawn, and when a text ends."""

    stop: str | list[str] | None
    seed: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    unknown_chars: UnknownChars
    min_tokens: int
    include_stop_str_in_output: bool
    stop_token_ids: list[int]
    allowed_token_ids: list[int]


class ModelFields(SamplingFields, total=False):
    """Also which model continues the text, and how often."""

    model: str
    n: int
    cache_salt: str
    user: str


class CompletionFields(ModelFields, total=False):
    """Also what only a completion has."""

    best_of: int
    beam: int
    echo: bool
    logprobs: int
    prompt_logprobs: int
    return_token_ids: bool
    state: str
    return_state: bool


class ChatFields(ModelFields, total=False):
    """Also what only a chat has."""

    logprobs: bool
    top_logprobs: int
    add_generation_prompt: bool
    continue_final_message: bool


class ScoreFields(TypedDict, total=False):
    """How a text is scored."""

    model: str
    unknown_chars: UnknownChars
    cache_salt: str
    state: str


class CandidateFields(TypedDict, total=False):
    """How candidates in a session are scored."""

    prompt: str
    normalize: Literal["none", "length", "candidates"]
    unknown_chars: UnknownChars


class PromptCandidateFields(CandidateFields, total=False):
    """Also which model scores them."""

    model: str
    cache_salt: str


class SuggestFields(FormFields, total=False):
    """Which texts are suggested."""

    prompt: str
    until: str | None
    max_chars: int
    unknown_chars: UnknownChars


class SessionFields(TypedDict, total=False):
    """What a new session is created with."""

    model: str
    seed: int | None
    ttl_s: float
    unknown_chars: UnknownChars


class FeedFields(TypedDict, total=False):
    """How a session is fed."""

    logprobs: int | None
    num_next: int
    unknown_chars: UnknownChars
    rebase: str


InspectFields = TypedDict(  # `from` is a keyword of Python
    "InspectFields",
    {
        "model": str,
        "unknown_chars": UnknownChars,
        "state": str,
        "from": int | None,
        "to": int | None,
        "gates": bool,
        "embedding": bool,
        "logprobs": int,
        "portable": bool,
    },
    total=False,
)

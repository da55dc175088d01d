"""The body of POST /v1/chat/completions, and of its answer.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.engine.stepper import FinishReason
from service.model.charset import UnknownChars
from service.model.chat_template import MAX_NAME_CHARS
from service.web.api.completions.schemas import MAX_CHOICES, StreamOptions
from service.web.api.forms import GenerationBody
from service.web.api.known_fields import OTHER_NAMES, Anyway, ClientFields, Name, Only
from service.web.api.schemas import UNKNOWN_CHARS, Body, ModelRef, Usage

DEFAULT_MAX_TOKENS = 1024
DEFAULT_UNKNOWN_CHARS: UnknownChars = "fold_drop"
MAX_MESSAGES = 1024
_HARD_MAX_TOKENS = 2**53
NO_TOOLS = "the models call no tools"
OWN_TEMPLATE = "the template belongs to the version: see `gru-serve models chat`"
NO_VARIABLES = "a template has no variables"
_NO_THOUGHTS = "the models don't think before they write"


def _is_text(sent: object) -> object:
    if isinstance(sent, str) and sent != "text":
        raise PydanticCustomError(
            "unsupported_value", 'only "text" is accepted: the models read characters, and no images, sounds or files'
        )
    return sent


def _is_no_tool(sent: object) -> object:
    if sent in ("tool", "function"):
        raise PydanticCustomError(
            "unsupported_value", "the models call no tools: send what a tool has returned as a message of the user"
        )
    return sent


class TextPart(Body):
    """A part of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_is_text)]
    text: str


class Message(Body):
    """One message of a chat. What else an answer's message has may be sent back with it."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_is_no_tool)] = Field(
        description="`developer` is the same as `system`"
    )
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="the text, or parts of it, which are joined"
    )
    name: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_NAME_CHARS,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="name of the speaker, instead of that of the chat template",
    )
    refusal: Annotated[Any, Only("the models refuse nothing: send the text as `content`")] = None
    annotations: Annotated[Any, Only("the models read text only", [])] = None
    audio: Annotated[Any, Only("the models read text only")] = None
    tool_calls: Annotated[Any, Only(NO_TOOLS, [])] = None
    tool_call_id: Annotated[Any, Only(NO_TOOLS)] = None
    function_call: Annotated[Any, Only(NO_TOOLS)] = None
    reasoning: Annotated[Any, Only(_NO_THOUGHTS, "")] = None
    reasoning_content: Annotated[Any, Only(_NO_THOUGHTS, "")] = None

    @property
    def text(self) -> str:
        """The content, with its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatFields(ClientFields):
    """Fields that clients send to chats, besides those that they send to all routes that generate text."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES | {"prompt": "messages", "input": "messages"}

    tools: Annotated[Any, Only(NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Only(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[bool | None, Anyway(NO_TOOLS)] = None
    functions: Annotated[Any, Only(NO_TOOLS, [])] = None
    function_call: Annotated[Any, Only(NO_TOOLS, "none", "auto")] = None
    modalities: Annotated[Any, Only("the models write text only", ["text"])] = None
    audio: Annotated[Any, Only("the models write text only")] = None
    web_search_options: Annotated[Any, Only("the models search nothing: send what they should read")] = None
    documents: Annotated[Any, Only("send what the model should read as a message", [])] = None
    prediction: Annotated[Any, Anyway("a predicted answer changes nothing but the time elsewhere")] = None
    reasoning_effort: Annotated[Name | None, Anyway(_NO_THOUGHTS)] = None
    include_reasoning: Annotated[bool | None, Anyway(_NO_THOUGHTS)] = None
    verbosity: Annotated[Name | None, Only("use `max_tokens`", "medium")] = None
    chat_template: Annotated[Any, Only(OWN_TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, Only(NO_VARIABLES, {})] = None
    prompt_logprobs: Annotated[Any, Only("use POST /v1/completions", False)] = None
    return_token_ids: Annotated[bool | None, Only("use POST /v1/completions", False)] = None
    echo: Annotated[bool | None, Only("use POST /v1/completions", False)] = None
    best_of: Annotated[int | None, Only("use `n`, or POST /v1/completions", 1)] = None


class ChatBody(ChatFields, GenerationBody):
    """Body of POST /v1/chat/completions. A token is a character."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "shakespeare", "messages": [{"role": "user", "content": "Who goes there?"}], "seed": 7}
        }
    )

    messages: Messages
    model: ModelRef = Field(None, description="name, name@version or name@alias; default: the server's default model")
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS,
        ge=1,
        le=_HARD_MAX_TOKENS,
        description="largest number of characters to generate; most answers end before, where the template says so",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_HARD_MAX_TOKENS, description="OpenAI's newer name of `max_tokens`"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="number of answers")
    logprobs: bool = Field(False, description="return the log-probability of each character")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="with `logprobs`, also return this many most likely characters at each position"
    )
    unknown_chars: UnknownChars = Field(
        DEFAULT_UNKNOWN_CHARS,
        description=f"{UNKNOWN_CHARS}, in all texts of the request. `drop` leaves out a `stop` string that has one",
    )
    stream: bool = Field(False, description="send the answer as server-sent events while it is generated")
    stream_options: StreamOptions | None = Field(None, description="only allowed with `stream`")
    add_generation_prompt: bool = Field(
        True, description="begin a new answer; if false, the model continues after the last message as it likes"
    )
    continue_final_message: bool = Field(
        False, description="continue the last message, which is the assistant's, instead of beginning a new answer"
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only chats with the same salt, of the same API key, share cached hidden states",
    )

    def num_chars(self, max_tokens: int, /) -> int:
        """See Body."""
        max_chars = self.max_chars(max_tokens)
        if max_chars > max_tokens:
            return 0
        return sum(len(message.text) for message in self.messages) + max_chars * self.n

    def max_chars(self, max_tokens: int) -> int:
        """Return how many characters an answer may have. Only a default is lowered to `max_tokens`."""
        wanted: int = getattr(self, self.length_field)
        return wanted if self.length_field in self.model_fields_set else min(wanted, max_tokens)

    @property
    def length_field(self) -> str:
        """Which of its two names the limit of the answer's length has."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @model_validator(mode="after")
    def _check_min_tokens(self) -> Self:
        return self  # the route does, which knows which limit applies


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TokenLogprob(BaseModel):
    """A likely character."""

    token: str
    logprob: float
    bytes: list[int] = Field(description="the character in UTF-8")


class ChosenLogprob(TokenLogprob):
    """A character of the answer."""

    top_logprobs: list[TokenLogprob] = Field(description="the most likely characters at its place")
    allowed_logprob: float | None = Field(
        None,
        description="its log-probability among the characters that the form allowed. Only present if the request has a "
        "form",
    )


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's characters, in nats, before any sampling setting."""

    content: list[ChosenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason = Field(description="why it ended: `stop` at its end, `length` at `max_tokens`")


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions, in OpenAI's shape.

    A stream has events with `object` `chat.completion.chunk`, in whose choices `delta` has the next part of the
    message.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="seconds since 1970")
    model: str = Field(description="name@version of the model that answered")
    system_fingerprint: str = Field(
        description="identifies model, arithmetic and chat template: with the same fingerprint, the same request and "
        "seed give the same text"
    )
    choices: list[ChatChoice]
    usage: Usage

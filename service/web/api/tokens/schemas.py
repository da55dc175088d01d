"""The bodies, queries and paths of the routes about tokens, and the bodies of the answers.

The names are those of vLLM. Class docstrings and field descriptions are part of `/openapi.json`: they are written for
users of the API.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidValue
from service.model.charset import MAX_CHARSET, UnknownChars
from service.web.api.chat.schemas import NO_TOOLS, NO_VARIABLES, OWN_TEMPLATE, Messages
from service.web.api.known_fields import Only
from service.web.api.schemas import UNKNOWN_CHARS, Body, ModelRef

_MODEL = "name, name@version or name@alias; default: the server's default model"


class TokenizeBody(Body):
    """Body of POST /tokenize. A token is a character; its id is its place in the model's charset."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "ROMEO:", "add_special_tokens": False}})

    prompt: str | None = Field(None, description="the text to encode; or send `messages`")
    messages: Messages | None = Field(None, description="the chat to encode, as the version's chat template writes it")
    model: ModelRef = Field(None, description=_MODEL)
    add_special_tokens: bool = Field(
        True, description="accepted for vLLM's clients; has no effect, because a charset has no special tokens"
    )
    return_token_strs: bool = Field(False, description="also return the characters")
    unknown_chars: UnknownChars | None = Field(
        None, description=f"{UNKNOWN_CHARS}. Default: `error`, or for a chat `fold_drop`, as chats are read"
    )
    add_generation_prompt: bool | None = Field(
        None, description="only with `messages`: the text ends with the beginning of a new answer. Default: true"
    )
    continue_final_message: bool = Field(
        False, description="only with `messages`: the text ends within the last message, which is the assistant's"
    )
    chat_template: Annotated[Any, Only(OWN_TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, Only(NO_VARIABLES, {})] = None
    mm_processor_kwargs: Annotated[Any, Only("the models read text only", {})] = None
    tools: Annotated[Any, Only(NO_TOOLS, [])] = None

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise InvalidValue("prompt: send the text to encode, or a chat as `messages`", param="prompt")
        if self.prompt is None:
            return self
        if self.messages is not None:
            raise InvalidValue("messages: not with prompt: send one of them", param="messages")
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(self, name):
                raise InvalidValue(f"{name}: only with messages: a prompt is encoded as it is", param=name)
        return self

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.prompt or "") + sum(len(message.text) for message in self.messages or ())


class TokenizeAnswer(BaseModel):
    """A text as the ids of its characters."""

    count: int = Field(description="number of tokens")
    max_model_len: int = Field(description="the number of characters that one completion can read and write at most")
    tokens: list[int]
    token_strs: list[str] | None = Field(
        description="the characters, in the form in which the model reads them; null unless requested"
    )


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [30, 27, 25, 17, 27, 10]}})

    tokens: Annotated[list[int], Field(fail_fast=True)] = Field(description="ids of characters")
    model: ModelRef = Field(None, description=_MODEL)

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.tokens)


class DetokenizeAnswer(BaseModel):
    """The text of some ids."""

    prompt: str


class TokenizerQuery(BaseModel):
    """Query parameters of /tokenizer_info."""

    model_config = ConfigDict(extra="forbid")

    model: ModelRef = Field(None, description=_MODEL)


class TokenizerPath(BaseModel):
    """Path parameters of the files of a model's tokenizer."""

    id: str = Field(max_length=200, description="name, name@version or name@alias")


class TokenizerInfo(BaseModel):
    """The model's tokenizer, as `tokenizer_config.json` describes one."""

    tokenizer_class: str = Field(description="the class of Hugging Face's `transformers` that reads `tokenizer.json`")
    bos_token: str | None = Field(
        description="the newline, which clients put before a text that has no beginning; null if the model has none"
    )
    eos_token: str | None = Field(
        description="the newline, too, for clients that need an end; null if the model has none. No text ends by itself"
    )
    pad_token: str | None = Field(description="the newline; null if the model has none")
    unk_token: None = Field(description="always null: a charset has no character for those that it lacks")
    add_bos_token: bool
    add_eos_token: bool
    clean_up_tokenization_spaces: bool
    model_max_length: int = Field(description="the number of characters that one completion can read and write at most")
    vocab_size: int = Field(le=MAX_CHARSET, description="number of characters that the model knows")


class TokenizerFile(BaseModel):
    """The content of `tokenizer.json`, which Hugging Face's `tokenizers` loads."""

    model_config = ConfigDict(extra="allow")

    version: str
    model: dict[str, Any]

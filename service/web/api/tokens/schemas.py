"""The bodies, queries and paths of the routes about tokens, and the bodies of the answers.

The names are those of vLLM. Class docstrings and field descriptions are part of `/openapi.json`: they are written for
users of the API.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from service.model.charset import MAX_CHARSET, UnknownChars
from service.web.api.schemas import UNKNOWN_CHARS, Body, ModelRef

_MODEL = "name, name@version or name@alias; default: the server's default model"


class TokenizeBody(Body):
    """Body of POST /tokenize. A token is a character; its id is its place in the model's charset."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "ROMEO:", "add_special_tokens": False}})

    prompt: str = Field(description="the text to encode")
    model: ModelRef = Field(None, description=_MODEL)
    add_special_tokens: bool = Field(
        True, description="accepted for vLLM's clients; has no effect, because a charset has no special tokens"
    )
    return_token_strs: bool = Field(False, description="also return the characters")
    unknown_chars: UnknownChars = Field("error", description=UNKNOWN_CHARS)


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

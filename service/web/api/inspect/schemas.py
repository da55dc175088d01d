"""The body of POST /v1/inspect, and of its answer.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.model.charset import UnknownChars
from service.web.api.schemas import UNKNOWN_CHARS, Body, Logprobs, ModelRef, NumLogprobs, PortableState
from service.web.api.sessions.schemas import NextCharacter, Position, SessionId


class InspectBody(Body):
    """Body of POST /v1/inspect."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "text": "ROMEO:", "gates": True, "logprobs": 5}}
    )

    model: ModelRef = Field(
        None,
        description="name, name@version or name@alias; default: the model of `state`, or else the server's default "
        "model. Not allowed with `session`",
    )
    text: str | None = Field(None, description="text to read: at most 2,048 characters")
    unknown_chars: UnknownChars = Field("error", description=f"{UNKNOWN_CHARS}. Only with `text`")
    session: SessionId | None = Field(
        None, description="id of a session to read instead of a text. The session is not changed"
    )
    state: PortableState = Field(None, description="portable state after which the text is read")
    start: Position | None = Field(
        None,
        alias="from",
        description="position of the first character to return the state of; default: the first of the text, or the "
        "2,048th from the end of a session",
    )
    end: Position | None = Field(
        None, alias="to", description="position after the last character; default: the end of the text"
    )
    gates: bool = Field(False, description="also return the gates and candidates of every step")
    embedding: bool = Field(False, description="also return the embedding of every character")
    logprobs: NumLogprobs = Field(
        None,
        description="return the log-probability of each character, and of this many most likely characters at each "
        "position",
    )
    portable: bool = Field(False, description="also return a portable state after the last character")


class NumbersAnswer(BaseModel):
    """An array of numbers, in the dtype, byte order and order of axes that the answer states."""

    shape: list[int]
    data: str = Field(description="the numbers in base64")


class GatesAnswer(BaseModel):
    """Gates of each step. New state = (1 - update) * candidate + update * previous state."""

    reset: NumbersAnswer = Field(description="0 to 1: how much of the previous state goes into the candidate")
    update: NumbersAnswer = Field(description="0 to 1: how much of the previous state remains")
    candidate: NumbersAnswer = Field(description="-1 to 1: what replaces the rest of the previous state")


class InspectAnswer(BaseModel):
    """The states of a network with L layers of H units, E-dimensional embeddings, while it reads n characters."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    object: Literal["inspection"] = "inspection"
    model: str = Field(description="name@version")
    start: int = Field(alias="from", description="position of the first character")
    end: int = Field(alias="to", description="position after the last character")
    text: str = Field(description="the n characters as the model read them, after Unicode normalisation")
    dtype: Literal["float16"] = "float16"
    byte_order: Literal["little"] = "little"
    order: str = Field("character, layer (the first reads the embedding), unit; the last one varies fastest")
    before: NumbersAnswer = Field(description="(L, H): the state before the first character")
    states: NumbersAnswer = Field(description="(n, L, H): the state after each character")
    gates: GatesAnswer | None = Field(description="(n, L, H) each, if requested")
    embedding: NumbersAnswer | None = Field(description="(n, E): the embedding of each character, if requested")
    logprobs: Logprobs | None = Field(
        description="log-probability of each character after the state before it, if requested; `text_offset` is its "
        "position"
    )
    next: list[NextCharacter] | None = Field(
        description="possible next characters after the last one, the most likely first, if `logprobs` is set"
    )
    state: str | None = Field(description="portable state after the last character, if requested")

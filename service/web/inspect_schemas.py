"""The bodies of POST /v1/inspect and its answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.web.schemas import Body, Logprobs
from service.web.session_schemas import MAX_STATE_CHARS, NextCharacter, Position, SessionId


class InspectBody(Body):
    """Body of POST /v1/inspect."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "text": "ROMEO:", "gates": True, "logprobs": 5}},
        regex_engine="python-re",
    )

    model: str | None = Field(
        None,
        max_length=200,
        description="name, name@version or name@alias; none: that of the state, or the default. Not with a session, "
        "which has one of its own",
    )
    text: str | None = Field(None, description="the text to read: at most 2,048 characters")
    session: SessionId | None = Field(None, description="instead of a text: a session, which is not changed")
    state: str | None = Field(
        None, max_length=MAX_STATE_CHARS, description="a portable state, behind which the text is read"
    )
    start: Position | None = Field(
        None, alias="from", description="the first character whose state is wanted; none: the first of all, of a "
        "session the 2,048th before the end"
    )  # fmt: skip
    end: Position | None = Field(None, alias="to", description="behind the last one; none: the end of the text")
    gates: bool = Field(False, description="the gates of every step too, and the candidates")
    embedding: bool = Field(False, description="the row of the embedding of every character too")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="log-probability of each character, and of so many likeliest ones"
    )
    portable: bool = Field(False, description="the state behind the last character as a portable one too")


class NumbersAnswer(BaseModel):
    """Numbers in the dtype and order that the answer names."""

    shape: list[int]
    data: str = Field(description="base64")


class GatesAnswer(BaseModel):
    """Of every character: new state = (1 - update) * candidate + update * state before."""

    reset: NumbersAnswer = Field(description="between 0 and 1: how much of the state before the candidate sees")
    update: NumbersAnswer = Field(description="between 0 and 1: how much of the state before stays")
    candidate: NumbersAnswer = Field(description="between -1 and 1: what takes the place of the rest")


class InspectAnswer(BaseModel):
    """What the network held while it read n characters; with L layers of H units."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    object: Literal["inspection"] = "inspection"
    model: str = Field(description="name@version")
    start: int = Field(alias="from", description="position of the first character")
    end: int = Field(alias="to", description="position behind the last one")
    text: str = Field(description="these n characters, as the model read them")
    dtype: Literal["float16"] = "float16"
    byte_order: Literal["little"] = "little"
    order: str = Field("character, layer (the first reads the embedding), unit; the last one varies fastest")
    before: NumbersAnswer = Field(description="(L, H): the state before the first character")
    states: NumbersAnswer = Field(description="(n, L, H): the state after each character")
    gates: GatesAnswer | None = Field(description="(n, L, H) each")
    embedding: NumbersAnswer | None = Field(description="(n, E): the row of each character")
    logprobs: Logprobs | None = Field(description="of each character, from the state before it; text_offset: position")
    next: list[NextCharacter] | None = Field(description="what may follow the last character, the likeliest first")
    state: str | None = Field(description="a portable state, behind the last character")

"""The bodies of requests and answers about sessions. A token is a character; a position counts characters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.engine.stepper import FinishReason
from service.model.charset import UnknownChars
from service.web.schemas import Body, Logprobs, SamplingBody, Usage

_SEED_LIMIT = 2**63
_MAX_TTL_S = 30 * 24 * 3600
MAX_STATE_CHARS = 1_000_000
_MAX_POSITION = 2**53  # what JSON numbers hold everywhere

SessionId = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}$",
        description="1 to 128 letters, digits, and . _ ~ - behind the first; who knows it can use the session",
    ),
]
Position = Annotated[int, Field(ge=0, le=_MAX_POSITION)]
Seed = Annotated[int, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)]


class CreateBody(Body):
    """Body of POST /v1/sessions and PUT /v1/sessions/{id}."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "shakespeare", "text": "ROMEO:", "seed": 7}})

    model: str | None = Field(
        None, max_length=200, description="name, name@version or name@alias; none: that of the state, or the default"
    )
    text: str = Field("", description="what the session begins with, or goes on with after the state")
    unknown_chars: UnknownChars = Field("error", description="what happens to characters that the model doesn't know")
    seed: Seed | None = Field(None, description="draws every character; none: that of the state, or a random one")
    ttl_s: float | None = Field(
        None, ge=1, le=_MAX_TTL_S, description="seconds it lives after its last use; none: the server's default"
    )
    state: str | None = Field(None, max_length=MAX_STATE_CHARS, description="a portable state to begin with")


class FeedBody(Body):
    """Body of POST /v1/sessions/{id}/feed."""

    model_config = ConfigDict(json_schema_extra={"example": {"text": "What light", "position": 6}})

    text: str = Field(description="what comes next; nothing: only the distribution of the next character is asked for")
    position: Position | None = Field(None, description="how long the session's text is, as far as you know")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="log-probability of each character fed, and of so many likeliest ones"
    )
    num_next: int = Field(100, ge=0, le=1000, description="how many of the likeliest next characters to answer with")
    unknown_chars: UnknownChars = Field("error", description="what happens to characters that the model doesn't know")
    rebase: str | None = Field(
        None, max_length=200, description="another model or version, into which the retained text is read first"
    )


class GenerateBody(SamplingBody):
    """Body of POST /v1/sessions/{id}/generate."""

    model_config = ConfigDict(json_schema_extra={"example": {"max_tokens": 200, "temperature": 0.8, "stream": True}})

    position: Position | None = Field(None, description="how long the session's text is, as far as you know")
    stream: bool = Field(False, description="answer with server-sent events, as characters are generated")


class RewindBody(Body):
    """Body of POST /v1/sessions/{id}/rewind."""

    position: Position = Field(description="how many characters are to be left")


class ForkBody(Body):
    """Body of POST /v1/sessions/{id}/fork."""

    id: SessionId | None = Field(None, description="of the new session; none: a random one")
    position: Position | None = Field(None, description="how many characters of the text it gets; none: all")
    seed: Seed | None = Field(None, description="none: the same, and so the same future")


class SessionPath(BaseModel):
    """Path of everything about one session."""

    # With pydantic's own engine, and 32 threads, this took 7 % of a feed's time.
    model_config = ConfigDict(regex_engine="python-re")

    id: SessionId


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PageQuery(_Query):
    """Query of GET /v1/sessions."""

    after: str = Field("", max_length=128, description="the last id of the page before")
    limit: int = Field(100, ge=1, le=1000)


class TextQuery(_Query):
    """Query of GET /v1/sessions/{id}/text."""

    start: Position | None = Field(None, alias="from", description="none: the first that is retained")
    end: Position | None = Field(None, alias="to", description="none: the end")


class ResumeQuery(_Query):
    """Query of GET /v1/sessions/{id}/generate."""

    after: Position | None = Field(
        None, description="the last position you have; none: the continuation's start. The header Last-Event-ID wins"
    )


class StateQuery(_Query):
    """Query of GET /v1/sessions/{id}/state."""

    ttl_s: float | None = Field(None, gt=0, le=100 * _MAX_TTL_S, description="seconds it is good for; none: for ever")


class SessionAnswer(BaseModel):
    """A session."""

    id: str
    object: Literal["session"] = "session"
    model: str = Field(description="name@version")
    position: int = Field(description="characters that it has consumed: the length of its text")
    seed: int
    ttl_s: float
    created_at: float = Field(description="seconds since 1970")
    expires_at: float = Field(description="the same; moves with every use but reading. In use it doesn't expire")
    text_from: int = Field(description="the first position from which its text is retained")


class SessionsAnswer(BaseModel):
    """A page of sessions, in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[SessionAnswer]
    has_more: bool


class TextAnswer(BaseModel):
    """Part of a session's text."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    text: str
    start: int = Field(alias="from")
    end: int = Field(alias="to")


class NextCharacter(BaseModel):
    """A character that may come next."""

    char: str
    logprob: float


class FeedAnswer(BaseModel):
    """How a session stands after it was fed."""

    position: int = Field(description="behind what was fed")
    next: list[NextCharacter] = Field(description="what may come there, the likeliest first")
    logprobs: Logprobs | None = Field(description="of what was fed; text_offset is its position in the session")


class GenerateAnswer(BaseModel):
    """A continuation. In a stream the event `done` has these fields but `text`."""

    text: str
    finish_reason: FinishReason
    position: int = Field(description="behind the last character generated")
    usage: Usage
    sha256: str = Field(description="of all that was generated, in UTF-8, in hexadecimal digits")


class StateAnswer(BaseModel):
    """A portable state: whoever has it can go on from it on any server with the same key and the same model."""

    state: str
    model: str
    position: int
    seed: int
    expires_at: float | None

"""The bodies of requests and answers about sessions. A token is a character; a position counts characters.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.arrays import MAX_POSITION
from service.engine.stepper import FinishReason
from service.model.charset import UnknownChars
from service.web.api.forms import GenerationBody
from service.web.api.known_fields import ClientFields
from service.web.api.schemas import (
    UNKNOWN_CHARS,
    Body,
    Logprobs,
    ModelRef,
    NumLogprobs,
    PortableState,
    Usage,
)

_SEED_LIMIT = 2**63
_MAX_TTL_S = 30 * 24 * 3600
_POSITION = (
    "length of the session's text before this request, as far as you know. If that is wrong, the request is refused "
    "(`position_conflict`), unless it repeats an earlier one. So a request with `position` can safely be sent again. "
    "Default: the end of the text"
)

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def _check_session_id(name: str) -> str:
    # Not a pattern of the field: in Python `$` also matches before a line break at the end. The other engine of
    # pydantic does not have this flaw, but took 7 % of the time of a feed with 32 threads.
    if not _SESSION_ID.fullmatch(name):
        raise PydanticCustomError(
            "session_id", "must be 1 to 128 letters, digits and . _ ~ -, of which the first is a letter or digit"
        )
    return name


SessionId = Annotated[
    str,
    AfterValidator(_check_session_id),
    Field(
        json_schema_extra={"pattern": f"^{_SESSION_ID.pattern}$"},
        description="1 to 128 characters: letters, digits and `. _ ~ -`, the first a letter or digit. On a server "
        "without API keys, anyone who knows the id can use the session",
    ),
]
Position = Annotated[int, Field(ge=0, le=MAX_POSITION)]
Seed = Annotated[int, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)]


class CreateBody(Body):
    """Body of POST /v1/sessions and PUT /v1/sessions/{id}."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "shakespeare", "text": "ROMEO:", "seed": 7}})

    model: ModelRef = Field(
        None,
        description="name, name@version or name@alias; default: the model of `state`, or else the server's default "
        "model",
    )
    text: str = Field("", description="text that the session begins with; with `state`, text to read after that state")
    unknown_chars: UnknownChars = Field("error", description=UNKNOWN_CHARS)
    seed: Seed | None = Field(
        None, description="seed of the session's random numbers; default: the seed of `state`, or else a random one"
    )
    ttl_s: float | None = Field(
        None,
        ge=1,
        le=_MAX_TTL_S,
        description="time to live: seconds after its last use until the session expires; default: the server's setting",
    )
    state: PortableState = Field(
        None,
        description="a portable state to begin from, as a session's `/state` returns it",
    )

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.text)


class FeedBody(Body):
    """Body of POST /v1/sessions/{id}/feed."""

    model_config = ConfigDict(json_schema_extra={"example": {"text": "What light", "position": 6}})

    text: str = Field(description="text to append; if it is empty, the answer has only the next characters")
    position: Position | None = Field(None, description=_POSITION)
    logprobs: NumLogprobs = Field(
        None,
        description="return the log-probability of each fed character, and of this many most likely characters at each "
        "position",
    )
    num_next: int = Field(100, ge=0, le=1000, description="number of most likely next characters to return")
    unknown_chars: UnknownChars = Field("error", description=UNKNOWN_CHARS)
    rebase: ModelRef = Field(
        None,
        description="another model or version to move the session to: it reads the session's retained text first",
    )

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.text)


class GenerateBody(ClientFields, GenerationBody):
    """Body of POST /v1/sessions/{id}/generate."""

    model_config = ConfigDict(json_schema_extra={"example": {"max_tokens": 200, "temperature": 0.8, "stream": True}})

    position: Position | None = Field(None, description=_POSITION)
    stream: bool = Field(False, description="send the text as server-sent events while it is generated")

    def num_chars(self, max_tokens: int, /) -> int:
        """See Body."""
        return self.max_tokens if self.max_tokens <= max_tokens else 0


class RewindBody(Body):
    """Body of POST /v1/sessions/{id}/rewind."""

    position: Position = Field(description="number of characters to keep")


class ForkBody(Body):
    """Body of POST /v1/sessions/{id}/fork."""

    id: SessionId | None = Field(None, description="id of the new session; default: a random one")
    position: Position | None = Field(None, description="number of characters of the text to copy; default: all")
    seed: Seed | None = Field(
        None, description="seed of the new session; default: the same seed, and so the same continuations"
    )


class SessionPath(BaseModel):
    """Path parameters of the routes of one session."""

    id: SessionId


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _check_spelling(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would also read ` 1`, `1_0` and `+1` as numbers, and `on` as true.
        kind = cls.model_fields[str(info.field_name)].annotation
        if not isinstance(value, str) or kind is str:
            return value
        if kind is bool:
            if value not in ("true", "false"):
                raise PydanticCustomError("bool_parsing", "must be true or false")
        elif not _NUMBER.fullmatch(value):
            raise PydanticCustomError("number_parsing", "must be a number, written as in JSON")
        return value


class PageQuery(_Query):
    """Query parameters of GET /v1/sessions."""

    after: str = Field(
        "", max_length=128, description="return the sessions after this id, such as the last id of the previous page"
    )
    limit: int = Field(100, ge=1, le=1000, description="number of sessions to return at most")


class TextQuery(_Query):
    """Query parameters of GET /v1/sessions/{id}/text."""

    start: Position | None = Field(
        None, alias="from", description="position of the first character; default: the first that is retained"
    )
    end: Position | None = Field(
        None, alias="to", description="position after the last character; default: the end of the text"
    )


class ResumeQuery(_Query):
    """Query parameters of GET /v1/sessions/{id}/generate."""

    after: Position | None = Field(
        None,
        description="position after the last character that you have; default: the start of the run. The header "
        "`Last-Event-ID` takes precedence",
    )
    take_over: bool = Field(
        True,
        description="take the run over from a connection that still reads it; with `false` the answer is then 409 "
        "`session_busy`",
    )


def _check_event_id(event_id: object) -> object:
    if isinstance(event_id, str) and not (event_id.isascii() and event_id.isdecimal() and len(event_id) <= 16):
        raise PydanticCustomError("event_id", "must be the id of an event of this stream, which is a position")
    return event_id


class ResumeHeader(BaseModel):
    """Headers of GET /v1/sessions/{id}/generate."""

    last_event_id: Annotated[Position | None, BeforeValidator(_check_event_id)] = Field(
        None,
        alias="Last-Event-ID",
        description="position after the last character that you have. Browsers send it by themselves when they connect "
        "again; it takes precedence over `after`",
    )


class StateQuery(_Query):
    """Query parameters of GET /v1/sessions/{id}/state."""

    ttl_s: float | None = Field(
        None, gt=0, le=100 * _MAX_TTL_S, description="seconds until the state expires; default: it never expires"
    )


class SessionAnswer(BaseModel):
    """A session."""

    id: str
    object: Literal["session"] = "session"
    model: str = Field(description="name@version")
    position: int = Field(
        description="number of characters that the session has read or generated: the length of its text"
    )
    seed: int
    ttl_s: float = Field(description="time to live: seconds after its last use until it expires")
    created_at: float = Field(description="seconds since 1970")
    expires_at: float = Field(
        description="seconds since 1970. Every use except reading moves it; a session in use doesn't expire"
    )
    text_from: int = Field(description="position of the first character that is retained; text before it is deleted")


class SessionsAnswer(BaseModel):
    """One page of sessions, in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[SessionAnswer]
    has_more: bool = Field(description="whether there are sessions after the last one of this page")


class TextAnswer(BaseModel):
    """Part of a session's text."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    text: str
    start: int = Field(alias="from", description="position of the first character")
    end: int = Field(alias="to", description="position after the last character")


class NextCharacter(BaseModel):
    """A possible next character."""

    char: str
    logprob: float = Field(description="its log-probability, in nats")


class FeedAnswer(BaseModel):
    """The result of a feed."""

    position: int = Field(description="position after the fed text")
    next: list[NextCharacter] = Field(description="possible next characters, the most likely first")
    logprobs: Logprobs | None = Field(
        description="log-probabilities of the fed characters, if requested; `text_offset` is their position in the "
        "session"
    )


class GenerateAnswer(BaseModel):
    """The result of a run. In a stream, the event `done` has these fields except `text`."""

    text: str
    finish_reason: FinishReason = Field(
        description="`stop` at a stop string or where its form is complete, `length` at `max_tokens`"
    )
    position: int = Field(description="position after the last generated character")
    usage: Usage
    sha256: str = Field(description="SHA-256 of the generated text in UTF-8, in hexadecimal digits")


class StateAnswer(BaseModel):
    """A portable state. Any server with the same state key and the same model can continue from it."""

    state: str = Field(
        description="signed text with the hidden state, the position and the seed; send it back unchanged"
    )
    model: str = Field(description="name@version")
    position: int
    seed: int
    expires_at: float | None = Field(description="seconds since 1970; null if it never expires")

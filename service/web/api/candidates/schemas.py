"""The bodies of requests and answers about candidates and suggestions.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidValue
from service.generation.candidates import MAX_CANDIDATES, Normalize
from service.generation.n_best import MAX_N
from service.model.charset import UnknownChars
from service.web.api.forms import FormBody
from service.web.api.schemas import UNKNOWN_CHARS, Body, ModelRef, Usage
from service.web.api.sessions.schemas import Position

_MAX_SUGGESTED_CHARS = 256
_PROMPT = "text that is read after the session's and before what may follow; the session doesn't change"
_POSITION = (
    "length of the session's text as far as you know. If that is wrong, the request is refused (`position_conflict`)"
)
_UNKNOWN_CHARS = f"{UNKNOWN_CHARS}, in all texts of the request"


class _CandidatesBody(Body):
    other_names: ClassVar[Mapping[str, str]] = {
        "text_1": "prompt", "text_2": "candidates", "queries": "prompt", "documents": "candidates",
        "texts": "candidates", "choices": "candidates", "input": "prompt",
    }  # fmt: skip

    candidates: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        max_length=MAX_CANDIDATES,
        fail_fast=True,
        description=f"1 to {MAX_CANDIDATES:,} texts that may follow, each of at least one character. Equal ones are "
        "computed once",
    )
    normalize: Normalize = Field(
        "none",
        description="what `score` is: the log-probability (`none`), its mean per character (`length`), or the "
        "log-probability given that it is one of the candidates (`candidates`: their probabilities sum to 1)",
    )
    prompt: str = Field("", description=_PROMPT)
    unknown_chars: UnknownChars = Field("error", description=_UNKNOWN_CHARS)

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.prompt) + sum(map(len, self.candidates))


class ScoreBody(_CandidatesBody):
    """Body of POST /v1/score."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "shakespeare", "prompt": "ROMEO:\nBut soft, what ", "candidates": ["light", "night"]}
        }
    )

    prompt: str = Field("", description="the text that the candidates may follow; default: none, as in a new session")
    model: ModelRef = Field(None, description="name, name@version or name@alias; default: the server's default model")
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only prompts with the same salt, of the same API key, share cached hidden states",
    )


class SessionScoreBody(_CandidatesBody):
    """Body of POST /v1/sessions/{id}/score."""

    model_config = ConfigDict(json_schema_extra={"example": {"candidates": ["light", "night"], "normalize": "length"}})

    position: Position | None = Field(None, description=f"{_POSITION}. Default: the end of the text")


class SuggestBody(FormBody):
    """Body of POST /v1/sessions/{id}/suggest."""

    other_names: ClassVar[Mapping[str, str]] = {"max_tokens": "max_chars", "stop": "until", "text": "prompt"}

    model_config = ConfigDict(json_schema_extra={"example": {"n": 5, "prompt": "wh"}})

    n: int = Field(5, ge=1, le=MAX_N, description="number of suggestions")
    prompt: str = Field("", description=_PROMPT)
    position: Position | None = Field(None, description=f"{_POSITION}. Default: the end of the text")
    until: str | None = Field(
        None,
        max_length=1024,
        description="characters that end a suggestion and are not part of it; empty: none, so all suggestions have "
        "`max_chars` characters. Default: all but letters and apostrophes, so that suggestions are words, or the rest "
        "of a word if the text ends in one; before a new word there may be others, such as a space",
    )
    max_chars: int = Field(
        32, ge=1, le=_MAX_SUGGESTED_CHARS, description="longer texts are not suggested, rather than cut off"
    )
    unknown_chars: UnknownChars = Field("error", description=_UNKNOWN_CHARS)

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return len(self.prompt) + self.n * self.max_chars

    @model_validator(mode="after")
    def _check_until(self) -> Self:
        if self.form_param is not None and self.until is not None:
            raise InvalidValue(f"until: not with {self.form_param}, which says where a text ends", param="until")
        return self


class CandidateScore(BaseModel):
    """How likely a candidate is."""

    object: Literal["score"] = "score"
    index: int = Field(description="place of the candidate in `candidates`")
    text: str = Field(description="the candidate as the model read it")
    logprob: float = Field(description="log-probability of its characters after the text before, in nats: their sum")
    score: float = Field(description="`logprob`, normalised as requested")


class ScoreAnswer(BaseModel):
    """How likely each candidate is."""

    object: Literal["list"] = "list"
    model: str = Field(description="name@version of the model that read the texts")
    position: int = Field(description="number of characters before the candidates")
    data: list[CandidateScore] = Field(description="in the order of the candidates")
    usage: Usage = Field(description="characters of the prompt and of all candidates")


class Suggestion(BaseModel):
    """A text that may follow."""

    index: int
    text: str
    logprob: float = Field(description="log-probability of the text, and of ending there, in nats")


class SuggestAnswer(BaseModel):
    """The likeliest texts that may follow."""

    object: Literal["list"] = "list"
    model: str = Field(description="name@version")
    position: int = Field(description="number of characters before the suggestions")
    exact: bool = Field(
        description="whether these are the likeliest of all texts; if false, the search took too long, and they are "
        "the likeliest that it found"
    )
    data: list[Suggestion] = Field(description="the likeliest first; fewer than `n` only if there are no others")
    usage: Usage = Field(description="characters of the prompt, and those that the search read")

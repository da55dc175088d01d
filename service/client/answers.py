"""What completions, chats, scores and suggestions return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """How many characters a request read and wrote."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int  # of the prompt, whose state the server had in its prefix cache

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Usage:
        """Read the API's usage."""
        details = document.get("prompt_tokens_details") or {}
        return cls(
            document["prompt_tokens"],
            document["completion_tokens"],
            document["total_tokens"],
            details.get("cached_tokens", 0),
        )


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of the characters of a text, in nats. The lists have the same length."""

    chars: list[str]
    logprobs: list[float | None]  # None for a character that is not scored: the first of a prompt
    top: list[dict[str, float]]  # the likeliest characters at each place; empty unless they were requested
    # Of each character among those that the form allowed; None for those of a prompt. None without a form.
    allowed: list[float | None] | None = None

    @classmethod
    def from_completion(cls, document: dict[str, Any] | None) -> Logprobs | None:
        """Read `logprobs` of a completion's choice."""
        if document is None:
            return None
        top = document.get("top_logprobs") or [None] * len(document["tokens"])
        allowed = document.get("allowed_logprobs")
        return cls(document["tokens"], document["token_logprobs"], [each or {} for each in top], allowed)

    @classmethod
    def from_chat(cls, document: dict[str, Any] | None) -> Logprobs | None:
        """Read `logprobs` of a chat's choice."""
        if document is None or document.get("content") is None:
            return None
        content = document["content"]
        return cls(
            [each["token"] for each in content],
            [each["logprob"] for each in content],
            [{other["token"]: other["logprob"] for other in each.get("top_logprobs") or []} for each in content],
            [each["allowed_logprob"] for each in content] if content and "allowed_logprob" in content[0] else None,
        )

    def since(self, start: int) -> Logprobs:
        """Return these without the first `start`."""
        allowed = self.allowed[start:] if self.allowed is not None else None
        return Logprobs(self.chars[start:], self.logprobs[start:], self.top[start:], allowed)


@dataclass(frozen=True)
class Choice:
    """One continuation."""

    index: int  # the continuations of one prompt follow each other
    text: str  # of a chat: the content of the answer's message
    finish_reason: str | None  # stop or length; None within a stream
    logprobs: Logprobs | None  # None unless they were requested
    state: str | None  # the portable state after the text; None unless it was requested
    token_ids: list[int] | None = None  # of what was generated of the text; None unless they were requested
    prompt_token_ids: list[int] | None = None  # of the prompt; None unless they were requested, or later in a stream
    # For each character of the prompt what the API returns, by id; None unless they were requested.
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    logprob: float | None = None  # of the text with its stop string, in nats; None without `beam`
    is_exact: bool | None = None  # whether no other text is likelier than those of this prompt; None without `beam`


@dataclass(frozen=True)
class Completion:
    """The result of a completion or of a chat."""

    id: str
    model: str  # name@version
    fingerprint: str  # equal ones give equal texts for equal seeds
    choices: list[Choice]
    usage: Usage

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Completion:
        """Read the API's response to a completion or a chat."""
        choices = [choice_from_json(each) for each in document["choices"]]
        return cls(
            document["id"],
            document["model"],
            document["system_fingerprint"],
            choices,
            Usage.from_json(document["usage"]),
        )


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed completion or chat."""

    text: str  # may be empty
    index: int = 0  # of the choice that it belongs to
    finish_reason: str | None = None  # stop or length in the choice's last chunk
    logprobs: Logprobs | None = None  # None unless they were requested
    usage: Usage | None = None  # of the whole request, only in the stream's last chunk
    state: str | None = None  # the portable state after the text, in the choice's last chunk, if it was requested
    token_ids: list[int] | None = None  # of what was generated of the text; None unless they were requested
    prompt_token_ids: list[int] | None = None  # of the prompt, in the choice's first chunk, if they were requested


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    model: str  # name@version
    text: str  # as the model read it
    logprobs: list[float | None]  # of each character, in nats; None for the first, if the server does not score it
    top: list[dict[str, float]]  # the likeliest characters at each place; empty unless they were requested

    @property
    def total(self) -> float:
        """The log-probability of the text, in nats: the sum over the characters that are scored."""
        return math.fsum(each for each in self.logprobs if each is not None)

    @property
    def bits_per_char(self) -> float:
        """The mean surprise of a scored character, in bits; NaN if none is scored."""
        num_scored = sum(each is not None for each in self.logprobs)
        return -self.total / num_scored / math.log(2) if num_scored else math.nan


@dataclass(frozen=True)
class CandidateScore:
    """How likely a model finds one of several texts that may follow another one."""

    text: str  # as the model read it
    logprob: float  # of its characters together, in nats
    score: float  # the same, normalised as requested


@dataclass(frozen=True)
class CandidateScores:
    """How likely a model finds several texts that may follow another one."""

    model: str  # name@version
    position: int  # the number of characters before the candidates
    scores: list[CandidateScore]  # in the order of the candidates

    @property
    def best(self) -> CandidateScore:
        """The candidate with the highest score; the first of equal ones."""
        return max(self.scores, key=lambda one: one.score)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> CandidateScores:
        """Read the API's answer."""
        scores = [CandidateScore(each["text"], each["logprob"], each["score"]) for each in document["data"]]
        return cls(document["model"], document["position"], scores)


@dataclass(frozen=True)
class Suggestion:
    """A text that may follow."""

    text: str
    logprob: float  # of the text, and of ending there, in nats


@dataclass(frozen=True)
class Suggestions:
    """The likeliest texts that may follow a session's text."""

    model: str  # name@version
    position: int  # the number of characters before the suggestions
    is_exact: bool  # whether no other text is likelier than these
    texts: list[Suggestion]  # the likeliest first

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Suggestions:
        """Read the API's answer."""
        texts = [Suggestion(each["text"], each["logprob"]) for each in document["data"]]
        return cls(document["model"], document["position"], document["exact"], texts)


@dataclass(frozen=True)
class Model:
    """A model that the server lists."""

    id: str  # name@version, or a name
    created: int  # seconds since 1970
    meta: dict[str, Any]  # charset, sizes, digest, aliases and loss


def choice_from_json(document: dict[str, Any]) -> Choice:
    """Read a choice of a completion or a chat, whole or streamed."""
    message = document.get("message") or document.get("delta")
    is_chat = "text" not in document
    return Choice(
        index=document["index"],
        text=((message or {}).get("content") or "") if is_chat else document["text"],
        finish_reason=document.get("finish_reason"),
        logprobs=(Logprobs.from_chat if is_chat else Logprobs.from_completion)(document.get("logprobs")),
        state=document.get("state"),
        token_ids=document.get("token_ids"),
        prompt_token_ids=document.get("prompt_token_ids"),
        prompt_logprobs=document.get("prompt_logprobs"),
        logprob=document.get("logprob"),
        is_exact=document.get("exact"),
    )

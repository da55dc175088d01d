"""The client of a server and of its sessions, for threads. It runs the coroutines of `async_client.py` to their end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Self, Unpack

from service.client.answers import CandidateScores, Chunk, Completion, Model, Score, Suggestions
from service.client.async_client import AsyncSession, Calls, FeedResult
from service.client.blocking_connections import BlockingConnections, iterate, run
from service.client.fields import (
    CandidateFields,
    ChatFields,
    CompletionFields,
    FeedFields,
    InspectFields,
    Message,
    Prompt,
    PromptCandidateFields,
    SamplingFields,
    ScoreFields,
    SessionFields,
    SuggestFields,
)
from service.client.inspection import Inspection
from service.client.transport import Address, Transport


class Client:
    """A server and the sessions on it. Any number of threads may share a client, but not a session.

    Args:
        url: the address of the server.
        api_key: the API key, which is sent as a bearer token.
        timeout_s: how long it may take to connect, how long a connection may be silent, and how long the head of an
            answer may take, in seconds. A stream is never silent for more than 10 s; a whole answer begins when all of
            it has been generated, and takes as long at most, and a second for each 16 KiB.
        retry_s: how long a call is repeated after its first failure, while the server is unreachable, overloaded or
            busy with an earlier call. A stream counts from the first failure after the last text. A pause is at least
            as long as Retry-After; a call fails at once if that is longer than what is left of `retry_s`.

    Raises ValueError for a URL that is not http:// or https:// with a host. Calls raise ServerError if the server
    refuses them, OSError if it can't be reached, and StreamBroken if a response is not complete.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout_s: float = 15, retry_s: float = 10
    ) -> None:
        address = Address.from_url(url)
        self._calls = Calls(Transport(address, BlockingConnections(address, timeout_s), api_key, retry_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections. Later calls open new ones."""
        run(self._calls.close())

    def complete(self, prompt: Prompt, *, max_tokens: int = 16, **fields: Unpack[CompletionFields]) -> Completion:
        """Continue a text, or several. Raises ServerError.

        A call that is repeated after a broken connection is computed again. With a seed, the text is the same.

        Args:
            prompt: the text to continue, as a string or as ids of characters, or a list of texts.
            max_tokens: the largest number of characters to generate.
            fields: temperature, stop, seed, n and others, as in the API.
        """
        return run(self._calls.complete(prompt, max_tokens=max_tokens, **fields))

    def stream(self, prompt: Prompt, *, max_tokens: int = 16, **fields: Unpack[CompletionFields]) -> Generator[Chunk]:
        """Continue a text, or several, and yield the pieces as they arrive. Raises ServerError.

        A stream that breaks is requested again with the same seed, and continues after the last piece: equal seeds give
        equal texts. If no seed is given, the client draws one. The last piece has the usage.
        """
        return iterate(self._calls.stream(prompt, max_tokens=max_tokens, **fields))

    def chat(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, **fields: Unpack[ChatFields]
    ) -> Completion:
        """Return the answer to a chat, as the text of its choices. Raises ServerError.

        Args:
            messages: the turns so far, such as `{"role": "user", "content": "Who goes there?"}`.
            max_tokens: the largest number of characters to generate; None: the API's default for chats.
            fields: temperature, stop, seed, n and others, as in the API.
        """
        return run(self._calls.chat(messages, max_tokens=max_tokens, **fields))

    def stream_chat(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, **fields: Unpack[ChatFields]
    ) -> Generator[Chunk]:
        """Answer a chat and yield the pieces as they arrive, as `stream` does. Raises ServerError."""
        return iterate(self._calls.stream_chat(messages, max_tokens=max_tokens, **fields))

    def score(self, text: str, *, num_top: int = 0, **fields: Unpack[ScoreFields]) -> Score:
        """Return how likely the model finds each character of a text, given those before it. Raises ServerError.

        Args:
            text: the text to score.
            num_top: how many of the likeliest characters to return at each place, 0 to 20.
            fields: model, unknown_chars, cache_salt and state, as in the API.
        """
        return run(self._calls.score(text, num_top=num_top, **fields))

    def score_candidates(self, candidates: Sequence[str], **fields: Unpack[PromptCandidateFields]) -> CandidateScores:
        """Return how likely each of several texts follows a prompt. Raises ServerError.

        Args:
            candidates: 1 to 10,000 texts. Characters that they have in common are computed once.
            fields: prompt, normalize, model, unknown_chars and cache_salt, as in the API.
        """
        return run(self._calls.score_candidates(candidates, **fields))

    def models(self) -> list[Model]:
        """Return the models of the server. Raises ServerError."""
        return run(self._calls.models())

    def create(
        self,
        text: str = "",
        *,
        id: str | None = None,  # noqa: A002 - the API's name
        state: str | None = None,
        **fields: Unpack[SessionFields],
    ) -> Session:
        """Create a session. Raises ServerError.

        Args:
            text: the beginning of the session's text.
            id: the id of the session; None creates a random one.
            state: what `save` returned of a session, with which this one begins, before `text`.
            fields: model, seed, ttl_s and unknown_chars, as in the API.
        """
        return Session(run(self._calls.create(text, id=id, state=state, **fields)))

    def load(self, state: str, **fields: Unpack[SessionFields]) -> Session:
        """Create a session from a state that `Session.save` returned, on this or another server. Raises ServerError."""
        return Session(run(self._calls.load(state, **fields)))

    def open(self, id: str) -> Session:  # noqa: A002 - the API's name
        """Open an existing session. Raises ServerError."""
        return Session(run(self._calls.open(id)))

    def inspect(self, text: str, **fields: Unpack[InspectFields]) -> Inspection:
        """Return the state of the network after each character of a text. Raises ServerError.

        Args:
            text: the text that the network reads.
            fields: model, state, gates, embedding, logprobs, portable, `from` and `to`, as in the API. `from` is a
                keyword of Python: pass it as `**{"from": 3}`.
        """
        return run(self._calls.inspect(text, **fields))


class Session:
    """A session on a server. Only one thread at a time may use it."""

    def __init__(self, calls: AsyncSession) -> None:
        self._calls = calls
        self.id, self.model, self.seed = calls.id, calls.model, calls.seed

    @property
    def position(self) -> int:
        """The length of the text, up to what this object has received."""
        return self._calls.position

    def feed(self, text: str, **fields: Unpack[FeedFields]) -> FeedResult:
        """Append text to the session, stepping the network over it. Raises ServerError.

        Args:
            text: the text to append.
            fields: logprobs, num_next, unknown_chars and rebase, as in the API.
        """
        return run(self._calls.feed(text, **fields))

    def generate(self, max_tokens: int = 16, **fields: Unpack[SamplingFields]) -> Generator[str]:
        """Generate text and yield its pieces as they arrive. Resumes the stream by itself when it breaks.

        If another connection resumes this stream, it keeps it. The rest is yielded here when that connection has ended,
        if that happens within `retry_s`.

        If the caller stops reading early, the session's text ends with the last piece that was yielded: the next call
        rewinds the session to it.

        Args:
            max_tokens: the largest number of characters to generate.
            fields: temperature, top_p, stop, seed and others, as in the API.

        Raises ServerError.
        """
        return iterate(self._calls.generate(max_tokens, **fields))

    def score_candidates(self, candidates: Sequence[str], **fields: Unpack[CandidateFields]) -> CandidateScores:
        """Return how likely each of several texts follows the session's text, which doesn't change. Raises ServerError.

        Args:
            candidates: 1 to 10,000 texts. Characters that they have in common are computed once.
            fields: prompt, normalize and unknown_chars, as in the API.
        """
        return run(self._calls.score_candidates(candidates, **fields))

    def suggest(self, n: int = 5, **fields: Unpack[SuggestFields]) -> Suggestions:
        """Return the n likeliest texts that may follow the session's text, which doesn't change. Raises ServerError.

        Args:
            n: how many.
            fields: until, max_chars, prompt and unknown_chars, as in the API. By default, suggestions are words.
        """
        return run(self._calls.suggest(n, **fields))

    def rewind(self, position: int) -> None:
        """Truncate the text to its first `position` characters. Raises ServerError."""
        run(self._calls.rewind(position))

    def fork(self, position: int | None = None, *, id: str | None = None, seed: int | None = None) -> Session:  # noqa: A002 - the API's name
        """Create a session that starts with this one's text. Raises ServerError.

        Args:
            position: how much of the text to take; None takes all of it.
            id: the id of the new session; None creates a random one.
            seed: the seed of the new session; None takes this session's seed, so that both generate the same text.
        """
        return Session(run(self._calls.fork(position, id=id, seed=seed)))

    def save(self, ttl_s: float | None = None) -> str:
        """Return the session's state as a string for `Client.load`. Raises ServerError.

        Args:
            ttl_s: for how many seconds the string can be loaded; None sets no limit.
        """
        return run(self._calls.save(ttl_s))

    def text(self, start: int | None = None, end: int | None = None) -> str:
        """Return the text between two positions. Raises ServerError.

        Args:
            start: None starts at the first character that the server still stores.
            end: None ends at the end of the text.
        """
        return run(self._calls.text(start, end))

    def inspect(self, start: int | None = None, end: int | None = None, **fields: Unpack[InspectFields]) -> Inspection:
        """Return the state of the network after each character between two positions. Raises ServerError.

        Args:
            start: None starts as early as a single call allows, which is 2,048 characters before `end` at most.
            end: None ends at the end of the text.
            fields: gates, embedding, logprobs and portable, as in the API.
        """
        return run(self._calls.inspect(start, end, **fields))

    def delete(self) -> None:
        """Delete the session on the server. Does nothing if it no longer exists. Raises ServerError."""
        run(self._calls.delete())

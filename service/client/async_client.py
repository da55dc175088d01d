"""The client of a server and of its sessions, as coroutines; `client.py` runs them over blocking connections."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Self, Unpack
from urllib.parse import quote, urlencode

from service.client.answers import (
    CandidateScores,
    Choice,
    Chunk,
    Completion,
    Model,
    Score,
    Suggestions,
    Usage,
    choice_from_json,
)
from service.client.asyncio_connections import AsyncioConnections
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
from service.client.transport import (
    Address,
    Patience,
    ServerError,
    StreamBroken,
    StreamEvent,
    Transport,
    server_error,
)

# After one of these, another connection may have the stream.
_LOST_ERRORS = ("run_taken_over", "revision_conflict")
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_SEED_BITS = 53  # a seed that every reader of JSON takes


def _listed(items: Sequence[Any]) -> Any:
    """Return a list for JSON. A text stays one, so that the server refuses it: a list would have its characters."""
    return items if isinstance(items, str) else list(items)


class Calls:
    """The calls on a server, as coroutines over any connections."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def complete(self, prompt: Prompt, *, max_tokens: int = 16, **fields: Unpack[CompletionFields]) -> Completion:
        """Continue a text, or several. Raises ServerError.

        A call that is repeated after a broken connection is computed again. With a seed, the text is the same.

        Args:
            prompt: the text to continue, as a string or as ids of characters, or a list of texts.
            max_tokens: the largest number of characters to generate.
            fields: temperature, stop, seed, n and others, as in the API.
        """
        body = {"prompt": prompt, "max_tokens": max_tokens} | fields
        return Completion.from_json(await self._transport.call("POST", _COMPLETIONS, body))

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 16, **fields: Unpack[CompletionFields]
    ) -> AsyncGenerator[Chunk]:
        """Continue a text, or several, and yield the pieces as they arrive. Raises ServerError.

        A stream that breaks is requested again with the same seed, and continues after the last piece: equal seeds give
        equal texts. If no seed is given, the client draws one. The last piece has the usage.
        """
        return self._chunks(_COMPLETIONS, {"prompt": prompt, "max_tokens": max_tokens} | fields)

    async def chat(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, **fields: Unpack[ChatFields]
    ) -> Completion:
        """Return the answer to a chat, as the text of its choices. Raises ServerError.

        Args:
            messages: the turns so far, such as `{"role": "user", "content": "Who goes there?"}`.
            max_tokens: the largest number of characters to generate; None: the API's default for chats.
            fields: temperature, stop, seed, n and others, as in the API.
        """
        body = {"messages": _listed(messages), "max_tokens": max_tokens} | fields
        return Completion.from_json(await self._transport.call("POST", _CHATS, body))

    def stream_chat(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, **fields: Unpack[ChatFields]
    ) -> AsyncGenerator[Chunk]:
        """Answer a chat and yield the pieces as they arrive, as `stream` does. Raises ServerError."""
        return self._chunks(_CHATS, {"messages": _listed(messages), "max_tokens": max_tokens} | fields)

    async def score(self, text: str, *, num_top: int = 0, **fields: Unpack[ScoreFields]) -> Score:
        """Return how likely the model finds each character of a text, given those before it. Raises ServerError.

        Args:
            text: the text to score.
            num_top: how many of the likeliest characters to return at each place, 0 to 20.
            fields: model, unknown_chars, cache_salt and state, as in the API.
        """
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": num_top} | fields
        answer = Completion.from_json(await self._transport.call("POST", _COMPLETIONS, body))
        logprobs = answer.choices[0].logprobs
        if logprobs is None:
            raise server_error(500, {"message": "the answer has no log-probabilities", "code": "damaged"})
        return Score(answer.model, answer.text, logprobs.logprobs, logprobs.top if num_top else [])

    async def score_candidates(
        self, candidates: Sequence[str], **fields: Unpack[PromptCandidateFields]
    ) -> CandidateScores:
        """Return how likely each of several texts follows a prompt. Raises ServerError.

        Args:
            candidates: 1 to 10,000 texts. Characters that they have in common are computed once.
            fields: prompt, normalize, model, unknown_chars and cache_salt, as in the API.
        """
        body = {"candidates": _listed(candidates)} | fields
        return CandidateScores.from_json(await self._transport.call("POST", "/v1/score", body))

    async def models(self) -> list[Model]:
        """Return the models of the server. Raises ServerError."""
        document = await self._transport.call("GET", "/v1/models")
        return [Model(each["id"], each["created"], each.get("meta") or {}) for each in document["data"]]

    async def create(
        self,
        text: str = "",
        *,
        id: str | None = None,  # noqa: A002 - the API's name
        state: str | None = None,
        **fields: Unpack[SessionFields],
    ) -> AsyncSession:
        """Create a session. Raises ServerError.

        Args:
            text: the beginning of the session's text.
            id: the id of the session; None creates a random one.
            state: what `save` returned of a session, with which this one begins, before `text`.
            fields: model, seed, ttl_s and unknown_chars, as in the API.
        """
        session_id = id if id is not None else secrets.token_hex(16)  # chosen here, so that the call can be repeated
        body = {"text": text, "state": state} | fields
        created = await self._transport.call("PUT", _session_path(session_id), body)
        return AsyncSession(self._transport, created)

    async def load(self, state: str, **fields: Unpack[SessionFields]) -> AsyncSession:
        """Create a session from a state that `save` returned, on this or another server. Raises ServerError."""
        return await self.create(state=state, **fields)

    async def open(self, id: str) -> AsyncSession:  # noqa: A002 - the API's name
        """Open an existing session. Raises ServerError."""
        return AsyncSession(self._transport, await self._transport.call("GET", _session_path(id)))

    async def inspect(self, text: str, **fields: Unpack[InspectFields]) -> Inspection:
        """Return the state of the network after each character of a text. Raises ServerError.

        Args:
            text: the text that the network reads.
            fields: model, state, gates, embedding, logprobs, portable, `from` and `to`, as in the API. `from` is a
                keyword of Python: pass it as `**{"from": 3}`.
        """
        return Inspection.from_json(await self._transport.call("POST", "/v1/inspect", {"text": text} | fields))

    async def close(self) -> None:
        """Close idle connections. Later calls open new ones."""
        await self._transport.close()

    async def _chunks(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
        """Yield the pieces of a stream, and request it again with the same seed when it breaks."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if body.get("seed") is None:
            body["seed"] = secrets.randbits(_SEED_BITS)
        patience, delivered = self._transport.patience(), _Delivered()
        while True:
            try:
                events = await self._transport.retrying(lambda: self._transport.stream("POST", path, body), patience)
                async with aclosing(events):
                    delivered.begin()
                    async for event in events:
                        if event.data == "[DONE]":
                            return
                        document = event.json()
                        delivered.check_maker(document)
                        for each in document["choices"]:
                            if (chunk := delivered.rest_of(choice_from_json(each))) is not None:
                                patience.renew()
                                yield chunk
                        if document.get("usage") is not None and not document["choices"]:
                            yield Chunk("", usage=Usage.from_json(document["usage"]))
                raise StreamBroken("the stream ended before its text was complete")
            except (OSError, StreamBroken):
                if not await patience.pause():
                    raise


class _Delivered:
    """What the reader of a stream has, so that a repeated stream continues after it."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}  # of each choice
        self._num_scores: dict[int, int] = {}
        self._begun: set[int] = set()  # choices with a delivered piece
        self._finished: set[int] = set()
        self._maker: tuple[str, str] | None = None
        self.begin()

    def begin(self) -> None:
        """Note that the stream begins, or begins again."""
        self._num_chars_read: dict[int, int] = {}
        self._num_scores_read: dict[int, int] = {}

    def check_maker(self, document: dict[str, Any]) -> None:
        """Raise ServerFailed if another model than before generates the text."""
        maker = (document.get("model", ""), document.get("system_fingerprint", ""))
        if self._maker is not None and maker != self._maker:
            raise _damaged("the model changed while its text was streamed")
        self._maker = maker

    def rest_of(self, choice: Choice) -> Chunk | None:
        """Return what is new in a piece; None if nothing is. Raises ServerFailed if the text is not the same."""
        number, text, logprobs = choice.index, self._texts.get(choice.index, ""), choice.logprobs
        start = self._num_chars_read.get(number, 0)
        self._num_chars_read[number] = end = start + len(choice.text)
        known = text[start:end]
        if not choice.text.startswith(known):
            raise _damaged("the repeated stream has another text")
        new = choice.text[len(known) :]
        self._texts[number] = text + new
        if logprobs is not None:
            delivered, start = self._num_scores.get(number, 0), self._num_scores_read.get(number, 0)
            self._num_scores_read[number] = start + len(logprobs.chars)
            self._num_scores[number] = max(delivered, self._num_scores_read[number])
            logprobs = logprobs.since(max(0, delivered - start))
        is_last = choice.finish_reason is not None and number not in self._finished
        if not (new or is_last or (logprobs is not None and logprobs.chars)):
            return None
        if is_last:
            self._finished.add(number)
        is_first = number not in self._begun
        self._begun.add(number)
        ids = choice.token_ids  # of the end of the piece's text: an echoed prompt has none
        return Chunk(
            new,
            number,
            choice.finish_reason,
            logprobs,
            state=choice.state if is_last else None,
            token_ids=ids[max(0, len(ids) - len(new)) :] if ids is not None else None,
            prompt_token_ids=choice.prompt_token_ids if is_first else None,
        )


def _session_path(session_id: str) -> str:
    """Return the path of a session. Any text leads to no other route: the server refuses what is no id."""
    return f"/v1/sessions/{quote(session_id, safe='')}"


def _damaged(message: str) -> ServerError:
    return server_error(500, {"message": message, "code": "damaged"})


class AsyncClient(Calls):
    """A server and the sessions on it, for asyncio. It belongs to one event loop, whose tasks may share it.

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
        super().__init__(Transport(address, AsyncioConnections(address, timeout_s), api_key, retry_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@dataclass(frozen=True)
class FeedResult:
    """The result of feeding text to a session."""

    position: int  # of the session after the text
    next: list[tuple[str, float]]  # characters that may follow, the likeliest first, with their log-probabilities
    logprobs: list[float]  # of each character that was fed; empty unless they were requested
    # The likeliest characters at each place, with their log-probabilities; empty unless they were requested.
    top: list[dict[str, float]]


class AsyncSession:
    """A session on a server. Only one task at a time may use it."""

    def __init__(self, transport: Transport, description: dict[str, Any]) -> None:
        self.id: str = description["id"]
        self.model: str = description["model"]
        self.seed: int = description["seed"]
        self.position: int = description["position"]  # the length of the text, up to what this object has received
        self._transport = transport
        self._path = _session_path(self.id)
        self._is_ahead = False  # whether the server may have generated more than this object has received

    async def feed(self, text: str, **fields: Unpack[FeedFields]) -> FeedResult:
        """Append text to the session, stepping the network over it. Raises ServerError.

        Args:
            text: the text to append.
            fields: logprobs, num_next, unknown_chars and rebase, as in the API.
        """
        body = {"text": text, "position": await self._synchronise()} | fields
        response = await self._transport.call("POST", f"{self._path}/feed", body)
        self.position = response["position"]
        scores = response["logprobs"] or {}
        return FeedResult(
            self.position,
            [(entry["char"], entry["logprob"]) for entry in response["next"]],
            scores.get("token_logprobs", []),
            scores.get("top_logprobs") or [],
        )

    async def generate(self, max_tokens: int = 16, **fields: Unpack[SamplingFields]) -> AsyncGenerator[str]:
        """Generate text and yield its pieces as they arrive. Resumes the stream by itself when it breaks.

        If another connection resumes this stream, it keeps it. The rest is yielded here when that connection has ended,
        if that happens within `retry_s`.

        If the caller stops reading early, the session's text ends with the last piece that was yielded: the next call
        rewinds the session to it. A caller that leaves the loop closes the generator, with `contextlib.aclosing`.

        Args:
            max_tokens: the largest number of characters to generate.
            fields: temperature, top_p, stop, seed and others, as in the API.

        Raises ServerError.
        """
        start = await self._synchronise()
        body = {"max_tokens": max_tokens, "position": start, "stream": True} | fields
        self._is_ahead = True
        try:
            async with aclosing(self._pieces(start, body)) as pieces:
                async for piece in pieces:
                    yield piece
        except ServerError:
            # The request was refused, or another client works on the session. Its text must not be rewound.
            self._is_ahead = False
            raise

    async def _pieces(self, start: int, body: object) -> AsyncGenerator[str]:
        """Yield the text of a stream, resuming it wherever it breaks."""
        digest, patience = hashlib.sha256(), self._transport.patience()
        events = await self._transport.retrying(lambda: self._stream(start, body), patience)
        while True:
            try:
                async with aclosing(events):
                    async for event in events:
                        data = event.json()
                        if event.kind == "reconnect":  # the server shuts down and has handed the session over
                            break
                        if event.kind == "done":
                            if data["sha256"] != digest.hexdigest():
                                raise _damaged("the text received differs from the text sent")
                            self._is_ahead = False
                            return
                        digest.update(data["text"].encode())
                        self.position = int(event.id)
                        patience.renew()
                        yield data["text"]
                    else:
                        raise StreamBroken("the stream ended before its text was complete")
            except (OSError, StreamBroken):
                if not await patience.pause():  # the stream can be resumed, but delivers no text
                    raise
            except ServerError as error:
                if error.code not in _LOST_ERRORS or not await patience.pause():
                    raise
                events = await self._after_loss(error, patience)
                continue
            events = await self._transport.retrying(lambda: self._stream(self.position, None), patience)

    async def _after_loss(self, loss: ServerError, patience: Patience) -> AsyncGenerator[StreamEvent]:
        """Return the rest of a stream that another connection took, as soon as that one no longer reads it.

        It is never taken back: two clients would take it from each other without end. The other connection may be one
        that its client gave up long ago, such as a request that arrived late. Raises ServerError.
        """
        try:
            return await self._transport.retrying(lambda: self._stream(self.position, None, take_over=False), patience)
        except ServerError as error:
            raise loss if error.code == "session_busy" else error from None

    async def score_candidates(self, candidates: Sequence[str], **fields: Unpack[CandidateFields]) -> CandidateScores:
        """Return how likely each of several texts follows the session's text, which doesn't change. Raises ServerError.

        Args:
            candidates: 1 to 10,000 texts. Characters that they have in common are computed once.
            fields: prompt, normalize and unknown_chars, as in the API.
        """
        body = {"candidates": _listed(candidates), "position": await self._synchronise()} | fields
        return CandidateScores.from_json(await self._transport.call("POST", f"{self._path}/score", body))

    async def suggest(self, n: int = 5, **fields: Unpack[SuggestFields]) -> Suggestions:
        """Return the n likeliest texts that may follow the session's text, which doesn't change. Raises ServerError.

        Args:
            n: how many.
            fields: until, max_chars, prompt and unknown_chars, as in the API. By default, suggestions are words.
        """
        body = {"n": n, "position": await self._synchronise()} | fields
        return Suggestions.from_json(await self._transport.call("POST", f"{self._path}/suggest", body))

    async def rewind(self, position: int) -> None:
        """Truncate the text to its first `position` characters. Raises ServerError."""
        rewound = await self._transport.call("POST", f"{self._path}/rewind", {"position": position})
        self.position = rewound["position"]
        self._is_ahead = False

    async def fork(
        self,
        position: int | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the API's name
        seed: int | None = None,
    ) -> AsyncSession:
        """Create a session that starts with this one's text. Raises ServerError.

        Args:
            position: how much of the text to take; None takes all of it.
            id: the id of the new session; None creates a random one.
            seed: the seed of the new session; None takes this session's seed, so that both generate the same text.
        """
        end = await self._synchronise()
        body = {"id": id if id is not None else secrets.token_hex(16), "seed": seed}
        forked = {"position": end if position is None else position}
        return AsyncSession(self._transport, await self._transport.call("POST", f"{self._path}/fork", body | forked))

    async def save(self, ttl_s: float | None = None) -> str:
        """Return the session's state as a string for `load`. Raises ServerError.

        Args:
            ttl_s: for how many seconds the string can be loaded; None sets no limit.
        """
        await self._synchronise()
        query = f"?{urlencode({'ttl_s': ttl_s})}" if ttl_s is not None else ""
        state: str = (await self._transport.call("GET", f"{self._path}/state{query}"))["state"]
        return state

    async def text(self, start: int | None = None, end: int | None = None) -> str:
        """Return the text between two positions. Raises ServerError.

        Args:
            start: None starts at the first character that the server still stores.
            end: None ends at the end of the text.
        """
        await self._synchronise()
        query = urlencode({name: value for name, value in (("from", start), ("to", end)) if value is not None})
        text: str = (await self._transport.call("GET", f"{self._path}/text?{query}"))["text"]
        return text

    async def inspect(
        self, start: int | None = None, end: int | None = None, **fields: Unpack[InspectFields]
    ) -> Inspection:
        """Return the state of the network after each character between two positions. Raises ServerError.

        Args:
            start: None starts as early as a single call allows, which is 2,048 characters before `end` at most.
            end: None ends at the end of the text.
            fields: gates, embedding, logprobs and portable, as in the API.
        """
        await self._synchronise()
        body = {"session": self.id, "from": start, "to": end} | fields
        return Inspection.from_json(await self._transport.call("POST", "/v1/inspect", body))

    async def delete(self) -> None:
        """Delete the session on the server. Does nothing if it no longer exists. Raises ServerError."""
        try:
            await self._transport.call("DELETE", self._path)
        except ServerError as error:
            if error.code not in ("session_not_found", "session_gone"):  # another 404 is about the address
                raise

    async def _synchronise(self) -> int:
        """Discard what the server generated beyond the text received, and return the position."""
        if self._is_ahead:
            await self.rewind(self.position)
        return self.position

    async def _stream(self, after: int, body: object, *, take_over: bool = True) -> AsyncGenerator[StreamEvent]:
        """Return the events after a position: of a new stream if there is a body, else of the stream under way.

        take_over: whether another connection that reads that stream loses it.
        """
        if body is not None:
            return await self._transport.stream("POST", f"{self._path}/generate", body)
        query = "" if take_over else "?take_over=false"
        return await self._transport.stream(
            "GET", f"{self._path}/generate{query}", headers={"Last-Event-ID": str(after)}
        )

"""The client of a server and of its sessions."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlencode

from service.client.inspection import Inspection
from service.client.transport import Patience, ServerError, StreamBroken, Transport

# After one of these, another connection may have the stream.
_LOST_ERRORS = ("run_taken_over", "revision_conflict")
_Event = tuple[int, str, dict[str, Any]]  # position, kind and data


class Client(Transport):
    """A server and the sessions on it. Any number of threads may share a client, but not a session."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, text: str = "", *, id: str | None = None, **fields: Any) -> Session:  # noqa: A002 - the API's name
        """Create a session. Raises ServerError.

        Args:
            text: the beginning of the session's text.
            id: the id of the session; None creates a random one.
            fields: model, seed, ttl_s, state and unknown_chars, as in the API.
        """
        session_id = id if id is not None else secrets.token_hex(16)  # chosen here, so that the call can be repeated
        return Session(self, self.call("PUT", f"/v1/sessions/{session_id}", {"text": text} | fields))

    def load(self, state: str, **fields: Any) -> Session:
        """Create a session from a state that `Session.save` returned, on this or another server. Raises ServerError."""
        return self.create(state=state, **fields)

    def open(self, id: str) -> Session:  # noqa: A002 - the API's name
        """Open an existing session. Raises ServerError."""
        return Session(self, self.call("GET", f"/v1/sessions/{id}"))

    def inspect(self, text: str, **fields: Any) -> Inspection:
        """Return the state of the network after each character of a text. Raises ServerError.

        Args:
            text: the text that the network reads.
            fields: model, state, gates, embedding, logprobs, portable, `from` and `to`, as in the API. `from` is a
                keyword of Python: pass it as `**{"from": 3}`.
        """
        return Inspection.from_json(self.call("POST", "/v1/inspect", {"text": text} | fields))


@dataclass(frozen=True)
class FeedResult:
    """The result of feeding text to a session."""

    position: int  # of the session after the text
    next: list[tuple[str, float]]  # characters that may follow, the likeliest first, with their log-probabilities
    logprobs: list[float]  # of each character that was fed; empty unless they were requested


class Session:
    """A session on a server. Only one thread at a time may use it."""

    def __init__(self, client: Transport, description: dict[str, Any]) -> None:
        self.id: str = description["id"]
        self.model: str = description["model"]
        self.seed: int = description["seed"]
        self.position: int = description["position"]  # the length of the text, up to what this object has received
        self._client = client
        self._path = f"/v1/sessions/{self.id}"
        self._is_ahead = False  # whether the server may have generated more than this object has received

    def feed(self, text: str, **fields: Any) -> FeedResult:
        """Append text to the session, stepping the network over it. Raises ServerError.

        Args:
            text: the text to append.
            fields: logprobs, num_next, unknown_chars and rebase, as in the API.
        """
        body = {"text": text, "position": self._synchronise()} | fields
        response = self._client.call("POST", f"{self._path}/feed", body)
        self.position = response["position"]
        scores = response["logprobs"]
        return FeedResult(
            self.position,
            [(entry["char"], entry["logprob"]) for entry in response["next"]],
            scores["token_logprobs"] if scores is not None else [],
        )

    def generate(self, max_tokens: int = 16, **fields: Any) -> Generator[str]:
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
        start = self._synchronise()
        body = {"max_tokens": max_tokens, "position": start, "stream": True} | fields
        self._is_ahead = True
        try:
            yield from self._pieces(start, body)
        except ServerError:
            # The request was refused, or another client works on the session. Its text must not be rewound.
            self._is_ahead = False
            raise

    def _pieces(self, start: int, body: object) -> Generator[str]:
        """Yield the text of a stream, resuming it wherever it breaks."""
        digest, patience = hashlib.sha256(), self._client.patience()
        events = self._client.retrying(lambda: self._stream(start, body), patience)
        while True:
            try:
                for position, kind, data in events:
                    if kind == "reconnect":  # the server is shutting down and has handed the session over
                        break
                    if kind == "done":
                        if data["sha256"] != digest.hexdigest():
                            raise ServerError(
                                500, {"message": "the text received differs from the text sent", "code": "damaged"}
                            )
                        self._is_ahead = False
                        return
                    digest.update(data["text"].encode())
                    self.position = position
                    patience.renew()
                    yield data["text"]
                else:
                    raise StreamBroken("the stream ended before its text was complete")
            except (OSError, http.client.HTTPException, StreamBroken):
                if not patience.pause():  # the stream can be resumed, but delivers no text
                    raise
            except ServerError as error:
                if error.code not in _LOST_ERRORS or not patience.pause():
                    raise
                events = self._after_loss(error, patience)
                continue
            events = self._client.retrying(lambda: self._stream(self.position, None), patience)

    def _after_loss(self, loss: ServerError, patience: Patience) -> Iterator[_Event]:
        """Return the rest of a stream that another connection took, as soon as that one no longer reads it.

        It is never taken back: two clients would take it from each other without end. The other connection may be one
        that its client gave up long ago, such as a request that arrived late. Raises ServerError.
        """
        try:
            return self._client.retrying(lambda: self._stream(self.position, None, take_over=False), patience)
        except ServerError as error:
            raise loss if error.code == "session_busy" else error from None

    def rewind(self, position: int) -> None:
        """Truncate the text to its first `position` characters. Raises ServerError."""
        self.position = self._client.call("POST", f"{self._path}/rewind", {"position": position})["position"]
        self._is_ahead = False

    def fork(self, position: int | None = None, *, id: str | None = None, seed: int | None = None) -> Session:  # noqa: A002 - the API's name
        """Create a session that starts with this one's text. Raises ServerError.

        Args:
            position: how much of the text to take; None takes all of it.
            id: the id of the new session; None creates a random one.
            seed: the seed of the new session; None takes this session's seed, so that both generate the same text.
        """
        end = self._synchronise()
        body = {"id": id if id is not None else secrets.token_hex(16), "seed": seed}
        body["position"] = end if position is None else position
        return Session(self._client, self._client.call("POST", f"{self._path}/fork", body))

    def save(self, ttl_s: float | None = None) -> str:
        """Return the session's state as a string for `Client.load`. Raises ServerError.

        Args:
            ttl_s: for how many seconds the string can be loaded; None sets no limit.
        """
        self._synchronise()
        query = f"?{urlencode({'ttl_s': ttl_s})}" if ttl_s is not None else ""
        state: str = self._client.call("GET", f"{self._path}/state{query}")["state"]
        return state

    def text(self, start: int | None = None, end: int | None = None) -> str:
        """Return the text between two positions. Raises ServerError.

        Args:
            start: None starts at the first character that the server still stores.
            end: None ends at the end of the text.
        """
        self._synchronise()
        query = urlencode({name: value for name, value in (("from", start), ("to", end)) if value is not None})
        text: str = self._client.call("GET", f"{self._path}/text?{query}")["text"]
        return text

    def inspect(self, start: int | None = None, end: int | None = None, **fields: Any) -> Inspection:
        """Return the state of the network after each character between two positions. Raises ServerError.

        Args:
            start: None starts as early as a single call allows, which is 2,048 characters before `end` at most.
            end: None ends at the end of the text.
            fields: gates, embedding, logprobs and portable, as in the API.
        """
        self._synchronise()
        return Inspection.from_json(
            self._client.call("POST", "/v1/inspect", {"session": self.id, "from": start, "to": end} | fields)
        )

    def delete(self) -> None:
        """Delete the session on the server. Does nothing if it no longer exists. Raises ServerError."""
        try:
            self._client.call("DELETE", self._path)
        except ServerError as error:
            if error.status not in (404, 410):
                raise

    def _synchronise(self) -> int:
        """Discard what the server generated beyond the text received, and return the position."""
        if self._is_ahead:
            self.rewind(self.position)
        return self.position

    def _stream(self, after: int, body: object, *, take_over: bool = True) -> Iterator[_Event]:
        """Return the events after a position: of a new stream if there is a body, else of the stream under way.

        take_over: whether another connection that reads that stream loses it.
        """
        connection = self._client.connect()
        try:
            if body is not None:
                response = self._client.send(connection, "POST", f"{self._path}/generate", body)
            else:
                headers = {"Last-Event-ID": str(after)}
                query = "" if take_over else "?take_over=false"
                response = self._client.send(connection, "GET", f"{self._path}/generate{query}", **headers)
        except BaseException:
            connection.close()
            raise
        return _events(connection, response)


def _events(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[_Event]:
    """Yield (position, kind, data) of each complete event of a stream, and close the connection after the last.

    Ends early after an error that the server marks with `retry`: the stream can be resumed, there or at another server.
    Raises ServerError after any other error event.
    """
    fields: dict[str, str] = {}
    try:
        for line in response:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if not line.endswith(b"\n"):
                return
            if name:
                fields[name] = value
            elif "data" in fields:
                data = json.loads(fields["data"])
                if fields["event"] == "error" and data["error"].get("retry") is True:
                    return
                if fields["event"] == "error":
                    raise ServerError(200, data["error"])
                yield int(fields["id"]), fields["event"], data
            if not name:
                fields = {}
    finally:
        response.close()  # it has the socket if the server closes the connection after it
        connection.close()

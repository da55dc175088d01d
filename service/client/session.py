"""A session on a server."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from service.client.calls import Calls, ServerError, StreamBroken
from service.client.inspection import Inspection

_PAUSE_S = 0.02  # before a broken stream is taken up
# Errors of a stream that another server, or the next one, may go on with.
_ELSEWHERE = ("engine_failed", "not_ready", "draining", "session_store_unavailable", "outcome_unknown")


@dataclass(frozen=True)
class Fed:
    """Answer to a feed. next: (character, log-probability) of what may come, the likeliest first. logprobs: of each
    character that was fed, if they were asked for.
    """

    position: int
    next: list[tuple[str, float]]
    logprobs: list[float]


class Session:
    """A text on a server. position: how long it is, as far as this object has seen. Not for several threads at once."""

    def __init__(self, client: Calls, facts: dict[str, Any]) -> None:
        self.id: str = facts["id"]
        self.model: str = facts["model"]
        self.seed: int = facts["seed"]
        self.position: int = facts["position"]
        self._client = client
        self._path = f"/v1/sessions/{self.id}"
        self._is_ahead = False  # the server may have generated more than was taken

    def feed(self, text: str, **fields: Any) -> Fed:
        """Step the network over more text. fields: logprobs, num_next, unknown_chars, rebase, as in the API."""
        body = {"text": text, "position": self._settled()} | fields
        answer = self._client.call("POST", f"{self._path}/feed", body)
        self.position = answer["position"]
        scores = answer["logprobs"]
        return Fed(
            self.position,
            [(entry["char"], entry["logprob"]) for entry in answer["next"]],
            scores["token_logprobs"] if scores is not None else [],
        )

    def generate(self, max_tokens: int = 16, **fields: Any) -> Generator[str]:
        """Pieces of a continuation as they come. fields: temperature, top_p, stop, seed and so on, as in the API.

        Resumes by itself. Who stops taking pieces stops the text: it stands behind the last one taken.
        """
        start = self._settled()
        body = {"max_tokens": max_tokens, "position": start, "stream": True} | fields
        self._is_ahead = True
        try:
            yield from self._pieces(start, body)
        except ServerError:
            # It was refused, or somebody else has the text now: what they write is not ours to take back.
            self._is_ahead = False
            raise

    def _pieces(self, start: int, body: object) -> Generator[str]:
        """The text of a stream, taken up again wherever it breaks."""
        whole, patience = hashlib.sha256(), time.monotonic() + self._client.retry_s
        events = self._client.retrying(lambda: self._stream(start, body))
        while True:
            try:
                for position, kind, data in events:
                    if kind == "reconnect":  # the server goes away in order, and another one has the session
                        break
                    if kind == "done":
                        if data["sha256"] != whole.hexdigest():
                            raise ServerError(500, {"message": "the text is not what was sent", "code": "damaged"})
                        self._is_ahead = False
                        return
                    whole.update(data["text"].encode())
                    self.position, patience = position, time.monotonic() + self._client.retry_s
                    yield data["text"]
                else:
                    raise StreamBroken("the stream ended before its text did")
            except (OSError, http.client.HTTPException, StreamBroken):
                if time.monotonic() > patience:  # it can be taken up again and again, but brings nothing
                    raise
                time.sleep(_PAUSE_S)
            events = self._client.retrying(lambda: self._stream(self.position, None))

    def rewind(self, position: int) -> None:
        """Back to a place in the text."""
        self.position = self._client.call("POST", f"{self._path}/rewind", {"position": position})["position"]
        self._is_ahead = False

    def fork(self, position: int | None = None, *, id: str | None = None, seed: int | None = None) -> Session:  # noqa: A002 - the API's word
        """A new session with the same past and, unless another seed is given, the same future."""
        end = self._settled()
        body = {"id": id if id is not None else secrets.token_hex(16), "seed": seed}
        body["position"] = end if position is None else position
        return Session(self._client, self._client.call("POST", f"{self._path}/fork", body))

    def save(self, ttl_s: float | None = None) -> str:
        """The state as text, for `Client.load`. ttl_s: how long it is good for; None: for ever."""
        self._settled()
        query = f"?{urlencode({'ttl_s': ttl_s})}" if ttl_s is not None else ""
        state: str = self._client.call("GET", f"{self._path}/state{query}")["state"]
        return state

    def text(self, start: int | None = None, end: int | None = None) -> str:
        """Its text between two positions; None: from the first that is retained, up to the end."""
        self._settled()
        query = urlencode({name: value for name, value in (("from", start), ("to", end)) if value is not None})
        text: str = self._client.call("GET", f"{self._path}/text?{query}")["text"]
        return text

    def inspect(self, start: int | None = None, end: int | None = None, **fields: Any) -> Inspection:
        """The state of the network after each character between two positions; None: up to the end, from the first that
        can be answered at once. fields: gates, embedding, logprobs, portable, as in the API.
        """
        self._settled()
        return Inspection.read(
            self._client.call("POST", "/v1/inspect", {"session": self.id, "from": start, "to": end} | fields)
        )

    def delete(self) -> None:
        """Let the server forget it. Harmless if it has."""
        try:
            self._client.call("DELETE", self._path)
        except ServerError as error:
            if error.status not in (404, 410):
                raise

    def _settled(self) -> int:
        """The position, at which the server stands too: what it generated beyond it is taken back."""
        if self._is_ahead:
            self.rewind(self.position)
        return self.position

    def _stream(self, after: int, body: object) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Events behind a position: with a body, of a new continuation, else of the one that was begun."""
        connection = self._client.connect()
        try:
            if body is not None:
                response = self._client.send(connection, "POST", f"{self._path}/generate", body)
            else:
                headers = {"Last-Event-ID": str(after)}
                response = self._client.send(connection, "GET", f"{self._path}/generate", **headers)
        except BaseException:
            connection.close()
            raise
        return _events(connection, response)


def _events(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(id, kind, data) of each event of a stream, up to the last whole one. Raises ServerError for one that says so."""
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
                if fields["event"] == "error" and data["error"]["code"] in _ELSEWHERE:
                    return
                if fields["event"] == "error":
                    raise ServerError(200, data["error"])
                yield int(fields["id"]), fields["event"], data
            if not name:
                fields = {}
    finally:
        connection.close()

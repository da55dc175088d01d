"""Calls to a server, repeated where that may help."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_TRY_AGAIN = (429, 502, 503, 504)

Answer = TypeVar("Answer")


class ServerError(Exception):
    """What the server refused. status, code, param, position: of the answer, as far as it has them."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{error.get('message', 'no message')} ({status} {error.get('code')})")
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")
        self.position: int | None = error.get("position")


class StreamBroken(Exception):
    """An answer ended before its end."""


class Calls:
    """A server. api_key: sent as a bearer token. timeout_s: of one connection. retry_s: how long a call is repeated
    that meets a server which is away, overloaded, or still busy with what came before. Any number of threads may use
    it; a session of it one at a time.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout_s: float = 30, retry_s: float = 10
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an address of a server: {url}")
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s, self.retry_s = timeout_s, retry_s
        self._idle: list[http.client.HTTPConnection] = []  # kept for the next call

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """One call that may be repeated; the JSON of its answer. Raises ServerError."""
        return self.retrying(lambda: self._once(method, path, body))

    def connect(self) -> http.client.HTTPConnection:
        """A connection, not opened yet."""
        return self._connection_class(self._host, self._port, timeout=self._timeout_s)

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str
    ) -> http.client.HTTPResponse:
        """Send a request; its answer, of which only the head was read. Raises ServerError."""
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, self._base + path, data, self._headers | headers)
        response = connection.getresponse()
        if "Content-Type" not in response.headers and response.status != 204:
            raise StreamBroken("the answer ended in the midst of its head")
        if response.status >= 400:
            try:
                error = json.loads(response.read()).get("error", {})
            except ValueError:
                error = {"message": "what answered is not this service"}
            raise ServerError(response.status, error)
        return response

    def retrying(self, attempt: Callable[[], Answer]) -> Answer:
        """What the attempt returns, tried again for a while if the server can't do it now. Raises ServerError."""
        pause_s, deadline = _FIRST_PAUSE_S, time.monotonic() + self.retry_s
        while True:
            try:
                return attempt()
            except (OSError, http.client.HTTPException, StreamBroken, ServerError) as error:
                is_final = isinstance(error, ServerError) and not (
                    error.status in _TRY_AGAIN or error.code == "session_busy"
                )
                if is_final or time.monotonic() + pause_s > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Close idle connections. The client can be used on."""
        while self._idle:
            self._idle.pop().close()

    def _once(self, method: str, path: str, body: object) -> dict[str, Any]:
        connection = self._idle.pop() if self._idle else self.connect()
        try:
            data = self.send(connection, method, path, body).read()
        except ServerError:
            self._idle.append(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        try:
            answer: dict[str, Any] = json.loads(data) if data else {}
        except ValueError as error:
            raise StreamBroken("the answer is no JSON, or not all of it") from error
        return answer

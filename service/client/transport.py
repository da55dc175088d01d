"""HTTP requests to a server, repeated when that may help."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_RETRIED_STATUSES = (429, 502, 503, 504)
_RETRIED_CODES = ("session_busy", "revision_conflict")  # another call was in the way: a call names its position

Result = TypeVar("Result")


class ServerError(Exception):
    """The server refused a request or failed. The fields come from its error response."""

    def __init__(self, status: int, error: dict[str, Any], retry_after_s: float = 0.0) -> None:
        super().__init__(f"{error.get('message', 'no message')} ({status} {error.get('code')})")
        self.status = status  # 200 for an error inside a stream
        self.code: str | None = error.get("code")  # such as session_not_found
        self.param: str | None = error.get("param")  # the field that is at fault; None if there is none
        self.position: int | None = error.get("position")  # of the session, in a position conflict
        self.retry_after_s = retry_after_s  # how long the server wants to be left alone; 0 if it does not say


class StreamBroken(Exception):
    """A response ended before it was complete."""


class Patience:
    """How long failures are overcome: `retry_s` from the first one since the last progress."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self.renew()

    def renew(self) -> None:
        """Note progress."""
        self._pause_s, self._deadline = _FIRST_PAUSE_S, math.inf

    def pause(self, at_least_s: float = 0.0) -> bool:
        """Wait after a failure, a little longer each time, and at least as long as the server asks for.

        Returns false, at once, if it is time to give up, or would be after the pause.
        """
        now, pause_s = time.monotonic(), max(self._pause_s, at_least_s)
        self._deadline = min(self._deadline, now + self._retry_s)
        if now + pause_s > self._deadline:
            return False
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


class Transport:
    """Sends requests to one server. Any number of threads may share it.

    Args:
        url: the address of the server.
        api_key: the API key, which is sent as a bearer token.
        timeout_s: how long a connection may be silent, in seconds. A stream never is for more than 10 s.
        retry_s: how long a call is repeated after its first failure, while the server is unreachable, overloaded or
            busy with an earlier call. A stream counts from the first failure after the last text. A pause is at least
            as long as Retry-After; a call fails at once if that is longer than what is left of `retry_s`.

    Raises ValueError for a URL that is not http:// or https:// with a host.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout_s: float = 15, retry_s: float = 10
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not the address of a server: {url}")
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._idle: list[http.client.HTTPConnection] = []  # open connections for the next calls

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Make a call that may safely be repeated, and return the JSON of its response. Raises ServerError."""
        return self.retrying(lambda: self._once(method, path, body))

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection. It opens with its first request."""
        return self._connection_class(self._host, self._port, timeout=self._timeout_s)

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str
    ) -> http.client.HTTPResponse:
        """Send a request and return its response, whose body is not read yet.

        Raises ServerError for an error status, and StreamBroken if the response ends within its headers.
        """
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, self._base + path, data, self._headers | headers)
        response = connection.getresponse()
        # http.client accepts headers that end early. Every response of the server with a body has this one.
        if "Content-Type" not in response.headers and response.status != 204:
            raise StreamBroken("the response ended within its headers")
        if response.status >= 400:
            try:
                error = json.loads(response.read()).get("error", {})
            except ValueError:
                error = {"message": "the response does not come from this service"}
            raise ServerError(response.status, error, _seconds(response.headers.get("Retry-After")))
        return response

    def patience(self) -> Patience:
        """Return the patience with which one call or one stream is repeated."""
        return Patience(self._retry_s)

    def retrying(self, attempt: Callable[[], Result], patience: Patience | None = None) -> Result:
        """Call `attempt` and return its result; repeat it after errors that may pass, as long as the patience lasts.

        Raises ServerError, OSError, HTTPException or StreamBroken: the last error, or the first that can't pass.
        """
        patience = patience if patience is not None else self.patience()
        while True:
            try:
                return attempt()
            except (OSError, http.client.HTTPException, StreamBroken, ServerError) as error:
                is_final = isinstance(error, ServerError) and not (
                    error.status in _RETRIED_STATUSES or error.code in _RETRIED_CODES
                )
                # A busy session may be free long before the second that its error names has passed.
                asked_s = error.retry_after_s if isinstance(error, ServerError) and error.status != 409 else 0.0
                if is_final or not patience.pause(asked_s):
                    raise

    def close(self) -> None:
        """Close idle connections. Later calls open new ones."""
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
            document: dict[str, Any] = json.loads(data) if data else {}
        except ValueError as error:
            raise StreamBroken("the response is not JSON, or not complete") from error
        return document


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After, which is a number or a date; 0 without one that can be read."""
    if retry_after is None:
        return 0.0
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0

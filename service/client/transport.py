"""What every call of the client needs: errors, patience, requests that are repeated, and the events of a stream.

All of it is written once, as coroutines over `Connections`. `asyncio_connections.py` waits on asyncio's sockets;
`blocking_connections.py` blocks, so that its coroutines never suspend and need no event loop.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_MAX_BODY_BYTES = 2**30  # of a whole response
_MAX_EVENT_BYTES = 2**26
_MIN_BYTES_PER_S = 2**14  # a whole body takes longer only from a server that doesn't mean to answer
_RETRIED_STATUSES = (429, 502, 503, 504)
_RETRIED_CODES = ("session_busy", "revision_conflict")  # another call was in the way: a call names its position

Result = TypeVar("Result")


class ServerError(Exception):
    """The server refused a request or failed. The fields come from its error response.

    A subclass names the kind of the status, `code` the reason:

        ServerError
        ├── InvalidRequest   400, 413, 415 and other 4xx: the request itself is wrong
        ├── NotPermitted     401, 403: the API key is missing, unknown, or not enough
        ├── NotFound         404: no such model, session or route
        ├── Conflict         409: another call, or another position, is in the way
        ├── Gone             410: a session or a position existed, and no longer does
        ├── Overloaded       429: too much at once; `retry_after_s` says when to try again
        └── ServerFailed     5xx: the server can't do it now, or broke
    """

    def __init__(self, status: int, error: dict[str, Any], retry_after_s: float = 0.0) -> None:
        super().__init__(f"{error.get('message', 'no message')} ({status} {error.get('code')})")
        self.status = status  # 200 for an error inside a stream
        self.code: str | None = error.get("code")  # such as session_not_found
        self.param: str | None = error.get("param")  # the field that is at fault; None if there is none
        self.position: int | None = error.get("position")  # of the session, in a position conflict
        self.retry_after_s = retry_after_s  # how long the server wants to be left alone; 0 if it does not say


class InvalidRequest(ServerError):
    """The request itself is wrong: `param` names the field."""


class NotPermitted(ServerError):
    """The API key is missing, unknown, or not enough."""


class NotFound(ServerError):
    """There is no such model, session or route."""


class Conflict(ServerError):
    """Another call is in the way, or the text is at another position."""


class Gone(ServerError):
    """The session, or the text at a position, is no longer stored."""


class Overloaded(ServerError):
    """Too much at once. `retry_after_s` says when to try again."""


class ServerFailed(ServerError):
    """The server can't serve the request now, or broke while it did."""


class StreamBroken(Exception):
    """A response ended before it was complete, or is no HTTP."""


_KINDS = {401: NotPermitted, 403: NotPermitted, 404: NotFound, 409: Conflict, 410: Gone, 429: Overloaded}


def server_error(status: int, error: dict[str, Any], retry_after_s: float = 0.0) -> ServerError:
    """Return the error of the class that belongs to the status."""
    kind = _KINDS.get(status) or (ServerFailed if status >= 500 else InvalidRequest if status >= 400 else ServerError)
    return kind(status, error, retry_after_s)


class Response(Protocol):
    """The response to one request. Its methods raise OSError and StreamBroken."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def headers(self) -> Message:
        """The headers."""

    async def read_some(self) -> bytes:
        """Return what has arrived of the body, at least one byte; nothing at its end."""

    def release(self) -> None:
        """Give the connection to the next request; the body has been read."""

    def close(self) -> None:
        """Close the connection."""


class Connections(Protocol):
    """Sends requests to one server over connections that it reuses."""

    timeout_s: float  # how long it may take to connect, until the head of a response has arrived, and for each piece

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, is_new: bool
    ) -> Response:
        """Send a request and return its response, whose body is not read yet. Raises OSError and StreamBroken.

        is_new: use a new connection.
        """

    async def sleep(self, duration_s: float) -> None:
        """Wait."""

    async def close(self) -> None:
        """Close the idle connections. Later requests open new ones."""


@dataclass(frozen=True)
class Address:
    """The address of a server, taken from its URL."""

    is_encrypted: bool
    host: str
    port: int | None  # None: the scheme's own
    base: str  # the path before each route

    @classmethod
    def from_url(cls, url: str) -> Address:
        """Read a URL. Raises ValueError if it is not http:// or https:// with a host."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not the address of a server: write it as in http://127.0.0.1:8000")
        return cls(parts.scheme == "https", parts.hostname, parts.port, parts.path.rstrip("/"))


class Patience:
    """How long failures are overcome: `retry_s` from the first one since the last progress."""

    def __init__(self, retry_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._retry_s, self._sleep = retry_s, sleep
        self.renew()

    def renew(self) -> None:
        """Note progress."""
        self._pause_s, self._deadline = _FIRST_PAUSE_S, math.inf

    async def pause(self, at_least_s: float = 0.0) -> bool:
        """Wait after a failure, a little longer each time, and at least as long as the server asks for.

        Returns false, at once, if it is time to give up, or would be after the pause.
        """
        now, pause_s = time.monotonic(), max(self._pause_s, at_least_s)
        self._deadline = min(self._deadline, now + self._retry_s)
        if now + pause_s > self._deadline:
            return False
        await self._sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream."""

    id: str
    kind: str  # its `event` field; `message` without one
    data: str

    def json(self) -> dict[str, Any]:
        """Return the data of an event that is no error.

        Raises ServerError for an error, and StreamBroken for one that the server marks with `retry`: the stream can be
        taken up again, there or at another server.
        """
        try:
            data = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise StreamBroken("an event is not JSON") from error
        if not isinstance(data, dict):
            raise StreamBroken("an event is not an object")
        refusal = data.get("error")
        if isinstance(refusal, dict):
            if refusal.get("retry") is True:
                raise StreamBroken(str(refusal.get("message")))
            raise ServerError(200, refusal)
        return data


class Transport:
    """Sends requests to one server, and repeats them when that may help.

    Args:
        address: where the server is.
        connections: how requests are sent.
        api_key: the API key, which is sent as a bearer token.
        retry_s: how long a call is repeated after its first failure, while the server is unreachable, overloaded or
            busy with an earlier call.
    """

    def __init__(self, address: Address, connections: Connections, api_key: str | None, retry_s: float) -> None:
        self._connections, self._base, self._retry_s = connections, address.base, retry_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Make a call that may safely be repeated, and return the JSON of its response. Raises ServerError."""
        return await self.retrying(lambda: self._once(method, path, body))

    async def stream(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[StreamEvent]:
        """Send a request whose response is a stream, and return its events. Iterate over them at once.

        Raises ServerError, OSError or StreamBroken if the request is refused or fails.
        """
        return _events(await self._send(method, path, body, headers or {}, is_new=True))

    def patience(self) -> Patience:
        """Return the patience with which one call or one stream is repeated."""
        return Patience(self._retry_s, self._connections.sleep)

    async def retrying(self, attempt: Callable[[], Awaitable[Result]], patience: Patience | None = None) -> Result:
        """Call `attempt` and return its result; repeat it after errors that may pass, as long as the patience lasts.

        Raises ServerError, OSError or StreamBroken: the last error, or the first that can't pass.
        """
        patience = patience if patience is not None else self.patience()
        while True:
            try:
                return await attempt()
            except (OSError, StreamBroken, ServerError) as error:
                is_final = isinstance(error, ServerError) and not (
                    error.status in _RETRIED_STATUSES or error.code in _RETRIED_CODES
                )
                # A busy session may be free long before the second that its error names has passed.
                asked_s = error.retry_after_s if isinstance(error, ServerError) and error.status != 409 else 0.0
                if is_final or not await patience.pause(asked_s):
                    raise

    async def close(self) -> None:
        """Close idle connections. Later calls open new ones."""
        await self._connections.close()

    async def _once(self, method: str, path: str, body: object) -> dict[str, Any]:
        response = await self._send(method, path, body, {}, is_new=False)
        try:
            data = await self._whole(response)
        except BaseException:
            response.close()
            raise
        response.release()
        try:
            document: dict[str, Any] = json.loads(data) if data else {}
        except (ValueError, RecursionError) as error:
            raise StreamBroken("the response is not JSON, or not complete") from error
        return document

    async def _whole(self, response: Response) -> bytes:
        """Return the body of a response that is no stream. Raises OSError and StreamBroken."""
        pieces, num_bytes, began = [], 0, time.monotonic()
        while piece := await response.read_some():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > _MAX_BODY_BYTES:
                raise StreamBroken("the response is too large")
            if time.monotonic() - began > self._connections.timeout_s + num_bytes / _MIN_BYTES_PER_S:
                raise TimeoutError("the response takes too long")
        return b"".join(pieces)

    async def _send(
        self, method: str, path: str, body: object, headers: Mapping[str, str], *, is_new: bool
    ) -> Response:
        """Send a request and return its response. Raises ServerError for an error status."""
        data = None if body is None else json.dumps(body).encode()
        response = await self._connections.request(
            method, self._base + path, data, self._headers | dict(headers), is_new=is_new
        )
        try:
            # Headers may end early without an error. Every response of the server with a body has this one.
            if "Content-Type" not in response.headers and response.status != 204:
                raise StreamBroken("the response ended within its headers")
            if response.status < 300:
                return response
            content = await self._whole(response)
        except BaseException:
            response.close()
            raise
        response.release()
        raise server_error(response.status, _error(content), _seconds(response.headers.get("Retry-After")))


def _error(content: bytes) -> dict[str, Any]:
    """Return the error object of a response."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        error = None
    return error if isinstance(error, dict) else {"message": "the response does not come from this service"}


async def _events(response: Response) -> AsyncGenerator[StreamEvent]:
    """Yield each complete event of a stream, and close the connection after the last. Raises OSError, StreamBroken."""
    fields: dict[str, str] = {}
    data: list[str] = []  # the lines of its field of that name
    rest = bytearray()
    num_bytes = 0  # of the event that is not complete yet
    try:
        while piece := await response.read_some():
            num_bytes += len(piece)
            if num_bytes > _MAX_EVENT_BYTES:
                raise StreamBroken("an event is too large")
            rest += piece
            if b"\n" not in piece:
                continue
            *lines, rest = rest.split(b"\n")
            for line in lines:
                name, _, value = line.decode(errors="replace").removesuffix("\r").partition(":")
                value = value.removeprefix(" ")
                if name == "data":
                    data.append(value)
                elif name:
                    fields[name] = value
                elif line.strip():
                    pass  # a comment
                else:
                    text, event = data, fields
                    data, fields, num_bytes = [], {}, len(piece)
                    if text:
                        yield StreamEvent(event.get("id", ""), event.get("event", "message"), "\n".join(text))
    finally:
        response.close()


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After, which is a number or a date; 0 without one that can be read."""
    if retry_after is None:
        return 0.0
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):  # a date that no calendar has
        return 0.0

"""Connections that block, with `http.client`, and the way to run coroutines over them without an event loop."""

from __future__ import annotations

import http.client
import time
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from service.client.transport import Address, StreamBroken

_READ_BYTES = 65_536
Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that never suspends, because its connections block."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: Result = finished.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine over blocking connections has suspended")


def iterate(items: AsyncGenerator[Result]) -> Generator[Result]:
    """Yield the items of an asynchronous generator that never suspends, and close it at the end."""

    async def next_item() -> Result:
        return await anext(items)

    try:
        while True:
            try:
                item = run(next_item())
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(items.aclose())


class BlockingConnections:
    """Any number of threads may share it.

    Args:
        address: where the server is.
        timeout_s: how long a connection may be silent, in seconds.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._idle: list[http.client.HTTPConnection] = []  # open connections for the next calls

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, is_new: bool
    ) -> BlockingResponse:
        """Send a request and return its response."""
        connection = self._idle.pop() if self._idle and not is_new else self._connection()
        try:
            with _broken_as_such():
                connection.request(method, path, body, dict(headers))
                return BlockingResponse(self._idle, connection, connection.getresponse())
        except BaseException:
            connection.close()
            raise

    async def sleep(self, duration_s: float) -> None:
        """Block the thread."""
        time.sleep(duration_s)

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.is_encrypted else http.client.HTTPConnection
        return kind(self._address.host, self._address.port, timeout=self._timeout_s)


class BlockingResponse:
    """A response of `http.client`."""

    def __init__(
        self,
        idle: list[http.client.HTTPConnection],
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> None:
        self._idle, self._connection, self._response = idle, connection, response
        self.status, self.headers = response.status, response.headers

    async def read(self) -> bytes:
        """Return the whole body."""
        with _broken_as_such():
            return self._response.read()

    async def read_some(self) -> bytes:
        """Return what has arrived of the body."""
        with _broken_as_such():
            return self._response.read1(_READ_BYTES)

    def release(self) -> None:
        """Give the connection to the next request."""
        self._idle.append(self._connection)

    def close(self) -> None:
        """Close the connection."""
        self._response.close()  # it has the socket if the server closes the connection after it
        self._connection.close()


@contextmanager
def _broken_as_such() -> Iterator[None]:
    """Raise StreamBroken for what `http.client` can't read. A connection that ends raises its own OSError."""
    try:
        yield
    except http.client.HTTPException as error:
        if isinstance(error, OSError):
            raise
        raise StreamBroken(f"the response is not complete, or no HTTP: {error!r}") from error

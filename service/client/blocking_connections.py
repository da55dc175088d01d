"""Connections that block, with `http.client`, and the way to run coroutines over them without an event loop."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from service.client.transport import Address, StreamBroken
from service.host_names import HostNames, connect

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
        timeout_s: how long it may take to connect, until the head of a response has arrived, and for each piece.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address, self.timeout_s = address, timeout_s
        self._names = HostNames(timeout_s)
        self._idle: list[http.client.HTTPConnection] = []  # open connections for the next calls

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, is_new: bool
    ) -> BlockingResponse:
        """Send a request and return its response."""
        connection = self._idle.pop() if self._idle and not is_new else self._connection()
        try:
            with _broken_as_such():
                connection.request(method, path, body, dict(headers))
                return BlockingResponse(self._idle, connection, self.timeout_s)
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
        connection = kind(self._address.host, self._address.port, timeout=self.timeout_s)
        # http.client sets no limit to the look-up of the host, and one for each of its addresses.
        connection._create_connection = self._connect  # type: ignore[attr-defined]
        return connection

    def _connect(self, place: tuple[str, int], *_options: Any) -> socket.socket:
        ends_at = time.monotonic() + self.timeout_s
        sock = connect(self._names.places(*place), ends_at)
        sock.settimeout(self.timeout_s)
        return sock


class _Reader(io.RawIOBase):
    """Reads from a socket until a time. http.client limits each read, however little arrives, and not their number."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._file = sock, sock.makefile("rb", buffering=0)
        self.ends_at = 0.0  # monotonic

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self.ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the response takes too long")
        self._sock.settimeout(left_s)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class BlockingResponse:
    """A response of `http.client`, whose head is read here."""

    def __init__(
        self, idle: list[http.client.HTTPConnection], connection: http.client.HTTPConnection, timeout_s: float
    ) -> None:
        self._idle, self._connection, self._timeout_s = idle, connection, timeout_s
        connection.response_class = self._start  # type: ignore[assignment]
        self._response = connection.getresponse()
        self.status, self.headers = self._response.status, self._response.headers

    async def read_some(self) -> bytes:
        """Return what has arrived of the body."""
        self._reader.ends_at = time.monotonic() + self._timeout_s
        with _broken_as_such():
            piece = self._response.read1(_READ_BYTES)
        if not piece and self._response.length:
            raise StreamBroken("the response ended within its body")
        return piece

    def release(self) -> None:
        """Give the connection to the next request."""
        self._response.close()
        if self._connection.sock is not None:
            self._connection.sock.settimeout(self._timeout_s)
        self._idle.append(self._connection)

    def _start(self, sock: socket.socket, *options: Any, **named: Any) -> http.client.HTTPResponse:
        """Return a response that reads through a `_Reader`."""
        response = http.client.HTTPResponse(sock, *options, **named)
        response.fp.close()
        self._reader = _Reader(sock)
        self._reader.ends_at = time.monotonic() + self._timeout_s
        response.fp = io.BufferedReader(self._reader, _READ_BYTES)
        return response

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

"""Connections of asyncio. They speak as much of HTTP/1.1 as the server does.

No library for HTTP is used: the client is for programs that have pinned libraries of their own, and what it needs is
little. The server sends no redirects, no cookies and nothing compressed.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import math
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from service.client.transport import Address, StreamBroken

_READ_BYTES = 65_536


class AsyncioConnections:
    """Belongs to one event loop, whose tasks may share it.

    Args:
        address: where the server is.
        timeout_s: how long it may take to connect, until the head of a response has arrived, and for each piece.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address, self.timeout_s = address, timeout_s
        self._tls = ssl.create_default_context() if address.is_encrypted else None
        port = address.port if address.port is not None else 443 if address.is_encrypted else 80
        self._place = (address.host, port)
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._host_header = host if address.port is None else f"{host}:{port}"
        self._idle: list[Line] = []  # open connections for the next calls

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, is_new: bool
    ) -> AsyncioResponse:
        """Send a request and return its response."""
        fields = {"Host": self._host_header, "Accept-Encoding": "identity", **headers}
        if body is not None or method in ("POST", "PUT"):
            fields["Content-Length"] = str(len(body or b""))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        head = "\r\n".join(lines)
        if head.count("\r\n") != len(lines) - 1 or head.count("\n") != len(lines) - 1:
            raise ValueError("a line break in a path or a header")
        line = self._idle.pop() if self._idle and not is_new else await self._open()
        try:
            async with line.answering():
                line.writer.write(head.encode("latin-1") + (body or b""))
                await line.writer.drain()
                answer = await line.reader.readuntil(b"\r\n\r\n")
            return AsyncioResponse(self._idle, line, method, answer)
        except BaseException:
            line.writer.close()
            raise

    async def sleep(self, duration_s: float) -> None:
        """Let other tasks run."""
        await asyncio.sleep(duration_s)

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            writer = self._idle.pop().writer
            writer.close()
            with suppress(OSError):  # the server has closed it before
                await writer.wait_closed()

    async def _open(self) -> Line:
        async with asyncio.timeout(self.timeout_s):
            return Line(*await asyncio.open_connection(*self._place, ssl=self._tls), self.timeout_s)


class Line:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self.reader, self.writer, self._timeout_s = reader, writer, timeout_s

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Raise TimeoutError if the server is silent, and StreamBroken for what can't be read."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise StreamBroken(f"the response is not complete, or no HTTP: {error!r}") from error


class AsyncioResponse:
    """A response whose head has been read. Raises StreamBroken if the head is no HTTP."""

    def __init__(self, idle: list[Line], line: Line, method: str, head: bytes) -> None:
        self._idle, self._line = idle, line
        first, _, fields = head.partition(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise StreamBroken("the response is no HTTP")
        self.status = int(status[:3])
        try:
            self.headers = http.client.parse_headers(io.BytesIO(fields))
        except http.client.HTTPException as error:
            raise StreamBroken(f"the response is no HTTP: {error!r}") from error
        self._is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self._is_kept = version != b"HTTP/1.0" and self.headers.get("Connection", "").lower() != "close"
        length = self.headers.get("Content-Length")
        self._left: float = math.inf  # bytes of the body, or of its chunk, that have not been read
        if self.status == 204 or method == "HEAD":
            self._left = 0
        elif self._is_chunked:
            self._left = -1  # the next chunk's size has to be read
        elif length is not None:
            if not length.isdecimal():
                raise StreamBroken("the response has a Content-Length that is no number")
            self._left = int(length)
        elif self._is_kept:
            self._is_kept = False  # only its end ends the body

    async def read_some(self) -> bytes:
        """Return what has arrived of the body."""
        async with self._line.answering():
            if self._left == -1:
                await self._read_chunk_size()
            if self._left == 0:
                return b""
            piece = await self._line.reader.read(int(min(self._left, _READ_BYTES)))
            if not piece and self._left != math.inf:
                raise StreamBroken("the response ended within its body")
            self._left -= len(piece)
            if self._is_chunked and self._left == 0:
                await self._line.reader.readuntil(b"\r\n")
                self._left = -1
            return piece

    async def _read_chunk_size(self) -> None:
        size = await self._line.reader.readuntil(b"\r\n")
        self._left = int(size.partition(b";")[0], 16)
        if self._left < 0:
            raise StreamBroken("the response has a chunk of negative size")
        if self._left == 0:
            while await self._line.reader.readuntil(b"\r\n") != b"\r\n":
                pass  # a trailer

    def release(self) -> None:
        """Give the connection to the next request."""
        if self._is_kept:
            self._idle.append(self._line)
        else:
            self._line.writer.close()

    def close(self) -> None:
        """Close the connection."""
        self._line.writer.close()

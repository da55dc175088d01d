"""The network between a page and a server, which can be slow and can be cut."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW = 500  # characters a second
PIECE_CHARS = 4  # of an event of a slow line
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class Line(ThreadingHTTPServer):
    """Forwards every request to a server. chars_per_s: of streams; None: as they come.

    Streams of a slow line arrive in pieces of a few characters, each with the position behind it.
    """

    def __init__(self, server_port: int, chars_per_s: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_port_behind, self.chars_per_s = server_port, chars_per_s
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.is_interrupted = False
        self.ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def cut(self) -> None:
        """End what is under way, and let nothing through."""
        self.is_interrupted = True
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let requests through again."""
        self.is_interrupted = False

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.is_interrupted

    @contextmanager
    def tracked(self, connection: socket.socket) -> Iterator[None]:
        """Within, the connection ends when the line is cut."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that goes away is no error."""


@contextmanager
def line_to(server_port: int, chars_per_s: float | None = None) -> Iterator[Line]:
    """A line, and its threads."""
    line = Line(server_port, chars_per_s)
    thread = threading.Thread(target=line.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield line
    finally:
        line.ended.set()
        line.cut()
        line.shutdown()
        line.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Line

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.server_port_behind, timeout=60)
        with self.server.tracked(self.connection), suppress(OSError, http.client.HTTPException):
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
                upstream.request(self.command, self.path, body or None, headers)
                self._answer(upstream.getresponse())
            finally:
                upstream.close()

    do_GET = do_POST = do_PUT = do_DELETE = _forward  # noqa: N815 - the base's names

    def _answer(self, response: http.client.HTTPResponse) -> None:
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        self.end_headers()
        if (response.getheader("Content-Type") or "").startswith("text/event-stream"):
            for part in self._paced(response):
                self.wfile.write(part)
        else:
            self.wfile.write(response.read())

    def _paced(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The stream's events, and those of text in pieces, each at its time."""
        due = time.monotonic()
        block = b""
        while line := response.readline():
            block += line
            if line != b"\n":
                continue
            event = dict(row.split(": ", 1) for row in block.decode().splitlines() if ": " in row)
            if self.server.chars_per_s is None or event.get("event") != "text":
                yield block
            else:
                text, end = json.loads(event["data"])["text"], int(event["id"])
                for start in range(0, len(text), PIECE_CHARS):
                    piece = text[start : start + PIECE_CHARS]
                    position = end - len(text) + start + len(piece)
                    due += len(piece) / self.server.chars_per_s
                    self.server.ended.wait(max(0, due - time.monotonic()))
                    yield f"id: {position}\nevent: text\ndata: {json.dumps({'text': piece})}\n\n".encode()
            block = b""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's parameter
        """Tests' output is for tests."""

"""A proxy between a page and a server, which can slow streams down and break connections."""

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
PIECE_CHARS = 4  # characters in one event of a slowed stream
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class Line(ThreadingHTTPServer):
    """Forwards every request to a server.

    If `chars_per_s` is set, streams arrive at that speed: each text event is split into events of a few characters, and
    each of these has the position after its own text as its id.
    """

    def __init__(self, server_port: int, chars_per_s: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = server_port
        self.chars_per_s = chars_per_s  # speed of streams; None if they are not slowed down
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.is_interrupted = False
        self.ended = threading.Event()  # set at the end, so that no stream waits any longer
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def interrupt(self) -> None:
        """Break all connections and refuse new ones."""
        self.is_interrupted = True
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """Accept connections again."""
        self.is_interrupted = False

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.is_interrupted

    @contextmanager
    def tracked(self, connection: socket.socket) -> Iterator[None]:
        """Register a connection for the duration of the block, so that `interrupt` can break it."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: a page that is closed breaks its connections."""


@contextmanager
def line_to(server_port: int, chars_per_s: float | None = None) -> Iterator[Line]:
    """Run a line to a server on this port."""
    line = Line(server_port, chars_per_s)
    thread = threading.Thread(target=line.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield line
    finally:
        line.ended.set()
        line.interrupt()
        line.shutdown()
        line.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Line

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        with self.server.tracked(self.connection), suppress(OSError, http.client.HTTPException):
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
                upstream.request(self.command, self.path, body or None, headers)
                self._answer(upstream.getresponse())
            finally:
                upstream.close()

    do_GET = do_POST = do_PUT = do_DELETE = _forward  # noqa: N815 - names of the base class

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
        """Yield the stream's events. Text events are split and delayed to keep the speed."""
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
                    # What a machine that stalls has missed is not made up for: no stream is faster than it has to be.
                    due = max(due, time.monotonic() - 0.1) + len(piece) / self.server.chars_per_s
                    self.server.ended.wait(max(0, due - time.monotonic()))
                    yield f"id: {position}\nevent: text\ndata: {json.dumps({'text': piece})}\n\n".encode()
            block = b""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
        """Log nothing: requests would clutter the output of the tests."""

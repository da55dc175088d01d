"""The real server as a process: start it, wait until it is ready, and send it requests.

A server under test listens on port 0. The kernel chooses a free port, and the harness reads it from gunicorn's line
"Listening at: ..." in the server's log: probing for a free port first would let another program take it meanwhile.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.wait import wait_until

SERVE = [sys.executable, "-m", "service", "serve", "--port", "0"]
KEYS = {"GRU_SERVE_STATE_KEYS": "a key for tests alone"}
BODY = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 50, "seed": 7}
ENDLESS = BODY | {"max_tokens": 10_000_000, "stream": True}


@dataclass(frozen=True)
class Endpoint:
    """Something on this machine that answers HTTP."""

    port: int

    def call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """Send one request on a new connection; return the status and the JSON of the answer."""
        connection = self.connect()
        try:
            ask(connection, method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def text(self, **changes: object) -> str:
        """Return the text of a completion of BODY with some fields changed."""
        status, answer = self.call("POST", "/v1/completions", BODY | changes)
        assert status == 200, answer
        text: str = answer["choices"][0]["text"]
        return text

    def is_ready(self) -> bool:
        """Return whether /readyz says that it takes requests; False if nothing listens."""
        try:
            return self.call("GET", "/readyz")[0] == 200
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that opens with its first request."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def open(self, body: object, version: str = "1.1", receive_bytes: int | None = None) -> socket.socket:
        """Return a bare connection on which a completion has been requested.

        Args:
            body: The body of the request.
            version: The version of HTTP.
            receive_bytes: The size of the receive buffer; None for the system's default.
        """
        connection = socket.socket()
        connection.settimeout(30)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection


@dataclass(frozen=True)
class Server(Endpoint):
    """A server process that is ready."""

    process: subprocess.Popen[str]
    log: list[str]  # the lines of its standard error so far

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the log about this event so far."""
        return [line for line in map(json.loads, list(self.log)) if line["event"] == event]

    @property
    def worker(self) -> Path:
        """The `/proc` directory of the process that answers requests."""
        pid = self.process.pid
        return Path("/proc", Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextmanager
def serving(command: list[str], environment: dict[str, str], directory: Path | None = None) -> Iterator[Server]:
    """Start a server that listens on port 0, wait until it is ready, and end it with the block.

    The environment must not raise the log level above `info`: the server reports its port at that level.
    """
    process = subprocess.Popen(
        command, env=os.environ | KEYS | environment, cwd=directory, stderr=subprocess.PIPE, text=True
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or []))
    reader.start()

    def is_ready() -> bool:
        assert process.poll() is None, "".join(log)
        port = _reported_port(log)
        return port is not None and Endpoint(port).is_ready()

    try:
        wait_until(is_ready)
        port = _reported_port(log)
        assert port is not None
        yield Server(port, process, log)
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        if process.stderr:
            process.stderr.close()


def _reported_port(log: list[str]) -> int | None:
    """Return the port that gunicorn has logged, in our JSON lines or in its own format; None before that."""
    found = re.search(r"Listening at: http://(?:\[[^\]]+\]|[^\s:]+):(\d+)", "".join(log))
    return int(found[1]) if found else None


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> None:
    """Send a request with a JSON body, or without a body."""
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})

"""The real process for tests: started, ready, and asked over sockets of its own."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVE = [sys.executable, "-m", "service", "serve", "--port", "PORT"]
KEYS = {"GRU_SERVE_STATE_KEYS": "a key for tests alone"}
BODY = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 50, "seed": 7}
ENDLESS = BODY | {"max_tokens": 10_000_000, "stream": True}


@dataclass(frozen=True)
class Server:
    """A server that is ready. log: the lines of its standard error so far."""

    port: int
    process: subprocess.Popen[str]
    log: list[str]

    def call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """One request on a connection of its own: status and JSON."""
        connection = self.connect()
        try:
            ask(connection, method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def text(self, **changes: object) -> str:
        """The text of a completion."""
        status, answer = self.call("POST", "/v1/completions", BODY | changes)
        assert status == 200, answer
        text: str = answer["choices"][0]["text"]
        return text

    def connect(self) -> http.client.HTTPConnection:
        """A connection, not opened yet."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def open(self, body: object, version: str = "1.1", receive_bytes: int | None = None) -> socket.socket:
        """A bare connection on which a completion was asked for."""
        connection = socket.socket()
        connection.settimeout(30)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Lines of the log about this event so far."""
        return [line for line in map(json.loads, self.log) if line["event"] == event]

    @property
    def worker(self) -> Path:
        """The `/proc` directory of the process that answers requests."""
        pid = self.process.pid
        return Path("/proc", Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextmanager
def serving(command: list[str], environment: dict[str, str]) -> Iterator[Server]:
    """Start a server on a free port (`PORT` in the command) and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    process = subprocess.Popen(words, env=os.environ | KEYS | environment, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or []))
    reader.start()
    server = Server(port, process, log)

    def is_ready() -> bool:
        assert process.poll() is None, "".join(log)
        try:
            return server.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    try:
        wait_until(is_ready)
        yield server
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        if process.stderr:
            process.stderr.close()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> None:
    """Send a request with a JSON body."""
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for a state of the server."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.02)

"""A server whose surroundings hang: Redis, the collector of traces, and the program that reads its log."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.store.model_store import ModelStore
from tests.harness.lossy_proxy import lossy_proxy
from tests.harness.redis_process import redis_process
from tests.harness.server import KEYS, SERVE, Endpoint
from tests.harness.wait import wait_until

DRAIN_S = 2
CLOSING_S = 6  # of a busy machine; a part that hangs would be killed 8 s after the drain


@contextmanager
def silent_collector() -> Iterator[str]:
    """Accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class LogReader:
    """Reads the log of a server, until it is told to pause."""

    def __init__(self, descriptor: int) -> None:
        self.text, self.reads = "", threading.Event()
        self.reads.set()
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def events(self) -> list[str]:
        lines = self.text.splitlines()[:-1]
        return [json.loads(line)["event"] for line in lines if line.startswith("{") and line.endswith("}")]

    def join(self) -> None:
        self.reads.set()
        self._thread.join()

    def _run(self) -> None:
        while self.reads.wait() and (data := os.read(self._descriptor, 4096)):
            self.text += data.decode()


def test_server__whose_surroundings_hang_starts_answers_and_exits(tiny_store: ModelStore, tmp_path: Path) -> None:
    with (
        redis_process(tmp_path) as redis,
        lossy_proxy(redis.url) as proxy,
        silent_collector() as collector,
    ):
        proxy.deliver = lambda _sock, _data: None
        environment = {
            "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
            "GRU_SERVE_MODEL": "tiny",
            "GRU_SERVE_ENGINE_THREADS": "1",
            "GRU_SERVE_SESSION_STORE": proxy.url,
            "GRU_SERVE_DRAIN_S": str(DRAIN_S),
            "GRU_SERVE_DRAIN_NOTICE_S": "0",
            "GRU_SERVE_RATE_LIMIT": "100000/minute",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        process = subprocess.Popen(SERVE, env=os.environ | KEYS | environment, stderr=subprocess.PIPE)
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 8192)
        log = LogReader(process.stderr.fileno())
        try:
            wait_until(lambda: "Listening at" in log.text or process.poll() is not None)
            found = re.search(r"Listening at: http://[^:]+:(\d+)", log.text)
            assert found, log.text
            server = Endpoint(int(found[1]))

            # At the start: it listens, and says that it is not ready.
            assert server.call("GET", "/healthz")[0] == 200
            assert server.call("GET", "/readyz")[0] == 503
            wait_until(lambda: server.call("GET", "/readyz?part=completions")[0] == 200)
            text = server.text()
            assert server.call("POST", "/v1/sessions", {"model": "tiny"})[0] == 503
            proxy.deliver = socket.socket.sendall
            wait_until(server.is_ready)

            # The log: requests are answered, and later a line says what is missing.
            log.reads.clear()
            for _ in range(100):
                assert server.text() == text
            assert server.call("GET", "/healthz")[0] == 200
            log.reads.set()

            def is_told() -> bool:
                server.text()
                return any("log lines were left out" in event for event in log.events())

            wait_until(is_told)

            # The end, while nothing answers or reads.
            assert server.call("POST", "/v1/sessions", {"model": "tiny"})[0] == 201
            proxy.deliver = lambda _sock, _data: None
            log.reads.clear()
            for _ in range(50):
                server.text()
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            took_s = time.monotonic() - began
            assert took_s < DRAIN_S + CLOSING_S
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
            log.join()
            process.stderr.close()

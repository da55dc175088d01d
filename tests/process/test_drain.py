"""How the real process ends after SIGTERM and Ctrl-C, with work in progress and clients of every kind."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.store.model_store import ModelStore
from tests.harness.server import BODY, ENDLESS, SERVE, Server, ask, serving
from tests.harness.sse import read_events
from tests.harness.wait import wait_until

MAX_CHARS = 9_000_000  # more than any test waits for
GRACE_S = 30  # how long a supervisor would wait


@pytest.fixture
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_ENGINE_THREADS": "1",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
        "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
        "GRU_SERVE_MAX_BATCH": "16",
        "GRU_SERVE_MAX_QUEUE": "4",
        "GRU_SERVE_DRAIN_S": "1",  # its end is waited for, and the engine computes until then
    }


# Longer than any test: what is sent to a server that drains arrives before its end, also on a machine that stalls.
LONG = {"GRU_SERVE_DRAIN_S": "600"}


@dataclass
class Stream:
    """What has arrived of a session's stream."""

    text: str = ""
    position: int = 6
    last: str = "cut off"  # the kind of the last event that was no text
    data: dict[str, Any] = field(default_factory=dict)  # of that event
    began: threading.Event = field(default_factory=threading.Event)

    def read(self, response: http.client.HTTPResponse) -> None:
        """Read all events up to the end."""
        for event in read_events(response):
            self.position = event.id
            if event.kind == "text":
                self.text += event.data["text"]
                self.began.set()
            else:
                self.last, self.data = event.kind, event.data


def create(server: Server, name: str) -> None:
    assert server.call("PUT", f"/v1/sessions/{name}", {"text": "ROMEO:", "seed": 7})[0] == 201


def stream(server: Server, name: str, num_chars: int, stream: Stream) -> None:
    """Create a session and read a stream of it into the given object."""
    create(server, name)
    with closing(server.connect()) as connection:
        ask(connection, "POST", f"/v1/sessions/{name}/generate", {"max_tokens": num_chars, "stream": True})
        stream.read(connection.getresponse())


def refusal(server: Server, method: str, path: str, body: object = None) -> tuple[int, str, str | None, str | None]:
    """Send a request; return status, error code, Retry-After and Connection of the answer."""
    with closing(server.connect()) as connection:
        ask(connection, method, path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        code = answer.get("error", {}).get("code", "")
        return response.status, code, response.headers["Retry-After"], response.headers["Connection"]


def test_drain__streams_finish_or_say_where_to_resume(environment: dict[str, str]) -> None:
    streams = {f"s{num_chars}": Stream() for num_chars in (10_000, 300_000, MAX_CHARS, MAX_CHARS - 1)}
    with serving(SERVE, environment | LONG) as server, ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(stream, server, name, int(name[1:]), one) for name, one in streams.items()]
        assert all(one.began.wait(30) for one in streams.values())
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        assert refusal(server, "GET", "/readyz") == (503, "not_ready", "1", "close")
        assert refusal(server, "POST", "/v1/completions", BODY) == (503, "draining", "1", "close")
        assert refusal(server, "POST", "/v1/sessions/s300000/feed", {"text": "a"}) == (503, "draining", "1", "close")
        assert refusal(server, "GET", "/v1/sessions/s300000/generate") == (503, "draining", "1", "close")
        assert refusal(server, "GET", "/healthz") == (200, "", None, "close")
        server.process.send_signal(signal.SIGTERM)  # again, as an impatient supervisor does
        readers[0].result(60)  # a stream that can finish does
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(GRACE_S) == 0
        for each in readers:
            each.result(60)
    longest = max((one.text for one in streams.values()), key=len)
    for name, one in streams.items():
        assert one.last == ("done" if len(one.text) == int(name[1:]) else "reconnect")
        assert one.data["position"] == one.position == 6 + len(one.text)
        assert longest.startswith(one.text)
    assert streams["s10000"].last == "done"
    assert [one.last for one in streams.values()][2:] == ["reconnect", "reconnect"]
    assert "Traceback" not in "".join(server.log)


def num_running(server: Server) -> float:
    with closing(server.connect()) as connection:
        ask(connection, "GET", "/metrics")
        text = connection.getresponse().read().decode()
    return sum(map(float, re.findall(r"^gru_serve:num_requests_running\{[^}]*\} (\S+)$", text, re.MULTILINE)))


def test_drain__answers_that_can_not_finish_are_errors(environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as server, ThreadPoolExecutor(8) as pool:
        create(server, "a")
        generate = {"max_tokens": MAX_CHARS}
        whole = pool.submit(refusal, server, "POST", "/v1/sessions/a/generate", generate)
        completion = pool.submit(refusal, server, "POST", "/v1/completions", ENDLESS | {"stream": False})
        with server.open(ENDLESS) as connection:
            assert connection.recv(1)
            wait_until(lambda: num_running(server) == 3)
            server.process.send_signal(signal.SIGTERM)
            raw = b""
            while part := connection.recv(65_536):
                raw = raw[-1000:] + part
        assert b"event: error\r\n" in raw.replace(b"\n", b"\r\n")
        assert b"engine_failed" in raw
        assert whole.result(30)[:3] == (503, "draining", "1")
        assert completion.result(30)[:3] == (503, "engine_failed", "1")
        assert server.process.wait(GRACE_S) == 0


def test_drain__waits_for_balancers_to_notice_even_when_idle(environment: dict[str, str]) -> None:
    notice = {"GRU_SERVE_DRAIN_S": "600", "GRU_SERVE_DRAIN_NOTICE_S": "600"}
    with serving(SERVE, environment | notice) as server:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        for _ in range(20):
            assert refusal(server, "POST", "/v1/completions", BODY)[:2] == (503, "draining")
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)  # Ctrl-C ends the notice period
        assert server.process.wait(GRACE_S) == 0


def test_drain__an_idle_server_exits_at_once(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | LONG) as server:
        assert server.text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GRACE_S) == 0
    assert {json.loads(line)["level"] for line in server.log} == {"info"}


def test_drain__a_request_on_an_idle_connection_is_answered_before_it_closes(environment: dict[str, str]) -> None:
    with (
        serving(SERVE, environment | LONG) as server,
        closing(server.connect()) as idle,
        server.open(ENDLESS) as running,
    ):
        assert running.recv(1)
        ask(idle, "GET", "/healthz")
        assert idle.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        ask(idle, "POST", "/v1/completions", BODY)
        response = idle.getresponse()
        assert (response.status, response.headers["Connection"]) == (503, "close")
        assert json.loads(response.read())["error"]["code"] == "draining"
        server.process.send_signal(signal.SIGINT)


def test_ctrl_c__waits_for_no_stream(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | LONG) as server, ThreadPoolExecutor(1) as pool:
        one = Stream()
        pool.submit(stream, server, "a", MAX_CHARS, one)
        assert one.began.wait(30)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(GRACE_S) == 0
        wait_until(lambda: one.last == "reconnect")


def test_clients_that_never_read__block_neither_health_checks_nor_the_exit(environment: dict[str, str]) -> None:
    """Twice as many clients as threads: half request streams, half request more answers than the buffers hold."""
    num_threads = 36
    with serving(SERVE, environment | {"GRU_SERVE_HTTP_THREADS": str(num_threads)}) as server, ExitStack() as stack:
        create(server, "a")
        stack.enter_context(server.open(ENDLESS, receive_bytes=4096))
        pages = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300
        for number in range(2 * num_threads):
            silent = server.open(ENDLESS, receive_bytes=4096) if number % 2 else socket.socket()
            stack.enter_context(silent)
            if not number % 2:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                silent.connect(("127.0.0.1", server.port))
                silent.sendall(pages)
        ask_for_session = stack.enter_context(closing(server.connect()))
        ask(ask_for_session, "POST", "/v1/sessions/a/generate", {"max_tokens": MAX_CHARS, "stream": True})
        for _ in range(20):
            # A thread that waits for a silent client waits 20 s.
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b'{"status":"ok"}'
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GRACE_S) == 0
    assert "Traceback" not in "".join(server.log)


def test_killed_parent__lets_the_worker_drain(environment: dict[str, str]) -> None:
    """Nobody restarts the worker or stops it, so it ends by itself, and saves what it was doing."""
    with serving(SERVE, environment) as server, ThreadPoolExecutor(1) as pool:
        one, worker = Stream(), server.worker
        pool.submit(stream, server, "a", MAX_CHARS, one)
        assert one.began.wait(30)
        server.process.kill()
        wait_until(lambda: one.last == "reconnect")
        wait_until(lambda: not worker.exists())

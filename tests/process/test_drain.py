"""SIGTERM and Ctrl-C: the real process, with work under way and clients of every kind."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.server import BODY, ENDLESS, SERVE, Server, ask, serving
from tests.harness.wait import wait_until

MAX_CHARS = 9_000_000  # more than any test waits for
GRACE_S = 30  # what a supervisor would give; the tests' own drains are shorter


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
        "GRU_SERVE_DRAIN_S": "4",
    }


@dataclass
class Stream:
    """What came of a session's stream, event by event."""

    text: str = ""
    position: int = 6
    last: str = "cut"
    data: dict[str, Any] = field(default_factory=dict)
    began: threading.Event = field(default_factory=threading.Event)

    def read(self, response: http.client.HTTPResponse) -> None:
        """Take in everything up to the end."""
        for block in _blocks(response):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = json.loads(fields["data"])
            if fields["event"] != "text":
                self.last, self.data, self.position = fields["event"], data, int(fields["id"])
                continue
            self.text += data["text"]
            self.position = int(fields["id"])
            self.began.set()


def _blocks(response: http.client.HTTPResponse) -> Iterator[str]:
    lines = ""
    for line in response:
        lines += line.decode()
        if lines.endswith("\n\n"):
            yield lines[:-2]
            lines = ""


def create(server: Server, name: str) -> None:
    assert server.call("PUT", f"/v1/sessions/{name}", {"text": "ROMEO:", "seed": 7})[0] == 201


def stream(server: Server, name: str, num_chars: int, stream: Stream) -> None:
    """Create a session, and stream into the given object."""
    create(server, name)
    with closing(server.connect()) as connection:
        ask(connection, "POST", f"/v1/sessions/{name}/generate", {"max_tokens": num_chars, "stream": True})
        stream.read(connection.getresponse())


def refusal(server: Server, method: str, path: str, body: object = None) -> tuple[int, str, str | None, str | None]:
    """Status, code, Retry-After and Connection of an answer."""
    with closing(server.connect()) as connection:
        ask(connection, method, path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        code = answer.get("error", {}).get("code", "")
        return response.status, code, response.headers["Retry-After"], response.headers["Connection"]


def test_streams_finish_or_say_where_to_go_on(environment: dict[str, str]) -> None:
    streams = {f"s{num_chars}": Stream() for num_chars in (100_000, 300_000, MAX_CHARS, MAX_CHARS - 1)}
    with serving(SERVE, environment) as server, ThreadPoolExecutor(8) as pool:
        told = [pool.submit(stream, server, name, int(name[1:]), one) for name, one in streams.items()]
        assert all(one.began.wait(30) for one in streams.values())
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        assert refusal(server, "GET", "/readyz") == (503, "not_ready", "1", "close")
        assert refusal(server, "POST", "/v1/completions", BODY) == (503, "draining", "1", "close")
        assert refusal(server, "POST", "/v1/sessions/s300000/feed", {"text": "a"}) == (503, "draining", "1", "close")
        assert refusal(server, "GET", "/v1/sessions/s300000/generate") == (503, "draining", "1", "close")
        assert refusal(server, "GET", "/healthz") == (200, "", None, "close")
        server.process.send_signal(signal.SIGTERM)  # once more, as an impatient supervisor does
        assert server.process.wait(GRACE_S) == 0
        for each in told:
            each.result(30)
    longest = max((one.text for one in streams.values()), key=len)
    for name, one in streams.items():
        assert one.last == ("done" if len(one.text) == int(name[1:]) else "reconnect")
        assert one.data["position"] == one.position == 6 + len(one.text)
        assert longest.startswith(one.text)
    assert [one.last for one in streams.values()][2:] == ["reconnect", "reconnect"]
    assert "Traceback" not in "".join(server.log)


def test_answers_that_can_not_be_finished_say_so(environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as server, ThreadPoolExecutor(8) as pool:
        create(server, "a")
        generate = {"max_tokens": MAX_CHARS}
        whole = pool.submit(refusal, server, "POST", "/v1/sessions/a/generate", generate)
        completion = pool.submit(refusal, server, "POST", "/v1/completions", ENDLESS | {"stream": False})
        with server.open(ENDLESS) as connection:
            assert connection.recv(1)
            wait_until(lambda: server.call("POST", "/v1/sessions/a/feed", {"text": "a"})[0] == 409)  # it runs
            server.process.send_signal(signal.SIGTERM)
            raw = b""
            while part := connection.recv(65_536):
                raw = raw[-1000:] + part
        assert b"event: error\r\n" in raw.replace(b"\n", b"\r\n")
        assert b"engine_failed" in raw
        assert whole.result(30)[:3] == (503, "draining", "1")
        assert completion.result(30)[:3] == (503, "engine_failed", "1")
        assert server.process.wait(GRACE_S) == 0


def test_a_balancer_gets_its_time_to_notice_also_when_nothing_is_running(environment: dict[str, str]) -> None:
    notice = {"GRU_SERVE_DRAIN_S": "600", "GRU_SERVE_DRAIN_NOTICE_S": "600"}
    with serving(SERVE, environment | notice) as server:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        for _ in range(20):
            assert refusal(server, "POST", "/v1/completions", BODY)[:2] == (503, "draining")
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)  # who waits at a terminal has waited enough
        assert server.process.wait(GRACE_S) == 0


def test_a_server_with_nothing_to_do_goes_at_once(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | {"GRU_SERVE_DRAIN_S": "600"}) as server:
        assert server.text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GRACE_S) == 0
    assert {json.loads(line)["level"] for line in server.log} == {"info"}


def test_a_request_on_a_kept_connection_is_answered_before_it_is_closed(environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as server, closing(server.connect()) as kept, server.open(ENDLESS) as running:
        assert running.recv(1)
        ask(kept, "GET", "/healthz")
        assert kept.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.call("GET", "/readyz")[0] == 503)
        ask(kept, "POST", "/v1/completions", BODY)
        response = kept.getresponse()
        assert (response.status, response.headers["Connection"]) == (503, "close")
        assert json.loads(response.read())["error"]["code"] == "draining"


def test_control_c_waits_for_nobody(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | {"GRU_SERVE_DRAIN_S": "600"}) as server, ThreadPoolExecutor(1) as pool:
        one = Stream()
        pool.submit(stream, server, "a", MAX_CHARS, one)
        assert one.began.wait(30)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(GRACE_S) == 0
        wait_until(lambda: one.last == "reconnect")


def test_clients_that_never_read_keep_nobody_from_health_and_no_server_from_its_end(
    environment: dict[str, str],
) -> None:
    """Twice as many as threads, all kinds: streams, and answers of which more is asked for than the buffers hold."""
    num_threads = 36
    with serving(SERVE, environment | {"GRU_SERVE_HTTP_THREADS": str(num_threads)}) as server, ExitStack() as stack:
        create(server, "held")
        held = server.open(ENDLESS, receive_bytes=4096)
        stack.enter_context(held)
        pages = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300
        for number in range(2 * num_threads):
            silent = server.open(ENDLESS, receive_bytes=4096) if number % 2 else socket.socket()
            stack.enter_context(silent)
            if not number % 2:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                silent.connect(("127.0.0.1", server.port))
                silent.sendall(pages)
        ask_for_session = stack.enter_context(closing(server.connect()))
        ask(ask_for_session, "POST", "/v1/sessions/held/generate", {"max_tokens": MAX_CHARS, "stream": True})
        for _ in range(20):
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=1)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b'{"status":"ok"}'
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GRACE_S) == 0
    assert "Traceback" not in "".join(server.log)


def test_the_client_takes_a_stream_up_at_once_where_it_is_told_to() -> None:
    """A server that says `reconnect`, and the one behind the same address that goes on: what is sent is theirs."""
    parts = [
        b'id: 8\nevent: text\ndata: {"text": "ab"}\n\nid: 8\nevent: reconnect\ndata: {"position": 8}\n\n',
        b'id: 9\nevent: text\ndata: {"text": "c"}\n\nid: 9\nevent: done\ndata: {"finish_reason": "length", "position": '
        b'9, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}\n\n',
    ]
    facts = {"id": "a", "model": "tiny@1", "seed": 7, "position": 6}
    json_head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    stream_head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    answers = [json_head + json.dumps(facts).encode(), *(stream_head + part for part in parts)]
    asked = []

    def serve(listener: socket.socket) -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(30)
                request = connection.recv(65_536)
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                asked.append(request)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, listener)
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            session = client.open("a")
            client.close()
            assert "".join(session.generate(3)) == "abc"
            assert session.position == 9
        served.result(30)
    assert asked[1].startswith(b"POST /v1/sessions/a/generate ")
    assert asked[2].startswith(b"GET /v1/sessions/a/generate ")
    assert b"last-event-id: 8\r\n" in asked[2].lower()

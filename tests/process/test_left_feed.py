"""A call whose client leaves is stopped, so that the session is free for others, or never begun."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from service.client import Client, ServerError
from service.store.model_store import ModelStore
from tests.harness.balancer import balancing
from tests.harness.server import SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until

NUM_CHARS = 1_000_000  # which take this server far longer than the test


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_KERNEL": "torch",
        "GRU_SERVE_MAX_PROMPT_CHARS": "1000000",
        "GRU_SERVE_MAX_BODY_BYTES": "10000000",
        "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
        "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
    }
    with serving(SERVE, environment) as server:
        yield server


@pytest.mark.parametrize("through_balancer", [False, True])
def test_feed__is_stopped_when_its_client_leaves(server: Server, through_balancer: bool) -> None:
    with ExitStack() as stack:
        entry: Endpoint = stack.enter_context(balancing([server.port])) if through_balancer else server
        client = stack.enter_context(Client(f"http://127.0.0.1:{entry.port}", retry_s=0))
        session = client.create("ROMEO:", id=f"left-{through_balancer}")
        num_logged = len(server.logged("request"))
        with socket.create_connection(("127.0.0.1", entry.port)) as connection:
            body = json.dumps({"text": "a" * NUM_CHARS, "position": 6}).encode()
            head = (
                f"POST /v1/sessions/{session.id}/feed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

            def is_busy() -> bool:
                status, answer = entry.call("POST", f"/v1/sessions/{session.id}/rewind", {"position": 6})
                assert status == 200 or answer["error"]["code"] == "session_busy", answer
                return status != 200

            wait_until(is_busy)
        wait_until(lambda: not is_busy(), 10)
        assert session.feed("b").position == 7
        assert 499 in {line.get("status") for line in server.logged("request")[num_logged:]}


def test_calls__whose_clients_left_before_they_began_do_nothing(server: Server) -> None:
    """The server is paused while they arrive. It finds them when it wakes up."""
    calls: list[tuple[str, str, dict[str, object]]] = [
        ("PUT", "never", {"text": "abc"}),
        ("POST", "there/feed", {"text": "abc"}),
        ("POST", "there/generate", {"max_tokens": 5}),
        ("POST", "there/generate", {"max_tokens": 5, "stream": True}),
        ("POST", "there/rewind", {"position": 2}),
        ("POST", "there/fork", {"id": "copy"}),
        ("DELETE", "there", {}),
    ]
    with Client(f"http://127.0.0.1:{server.port}") as client:
        session = client.create("ROMEO:", id="there")
        num_logged = len(server.logged("request"))
        pids = [server.process.pid, int(server.worker.name)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            for method, path, content in calls:
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    body = json.dumps(content).encode()
                    head = f"{method} /v1/sessions/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                    connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: len(server.logged("request")) >= num_logged + len(calls))
        assert {line["status"] for line in server.logged("request")[num_logged:]} == {499}
        assert session.text() == "ROMEO:"
        for name in ("never", "copy"):
            with pytest.raises(ServerError) as error:
                client.open(name)
            assert error.value.code == "session_not_found"

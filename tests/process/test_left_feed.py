"""A call whose client leaves is stopped, so that the session is free for others, or never begun."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Collection, Iterator
from contextlib import ExitStack

import pytest

from service.client import Client, ServerError
from service.store.model_store import ModelStore
from tests.harness.balancer import balancing
from tests.harness.server import SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until

NUM_CHARS = 1_000_000  # which take this server far longer than the test
SOON_S = 30


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


def call(method: str, path: str, content: object, request_id: str) -> bytes:
    """Return a request to a session's route. The server logs its id."""
    body = json.dumps(content).encode()
    head = (
        f"{method} /v1/sessions/{path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {request_id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def statuses(server: Server, ids: Collection[str]) -> list[int]:
    """Return the statuses of the requests with these ids that the server has logged so far."""
    return [line["status"] for line in server.logged("request") if line["request_id"] in ids]


@pytest.mark.parametrize("through_balancer", [False, True])
def test_feed__is_stopped_when_its_client_leaves(server: Server, through_balancer: bool) -> None:
    with ExitStack() as stack:
        entry: Endpoint = stack.enter_context(balancing([server.port])) if through_balancer else server
        client = stack.enter_context(Client(f"http://127.0.0.1:{entry.port}", retry_s=0))
        session = client.create("ROMEO:", id=f"left-{through_balancer}")
        with socket.create_connection(("127.0.0.1", entry.port)) as connection:
            connection.sendall(call("POST", f"{session.id}/feed", {"text": "a" * NUM_CHARS, "position": 6}, session.id))

            def is_busy() -> bool:
                status, answer = entry.call("POST", f"/v1/sessions/{session.id}/rewind", {"position": 6})
                assert status == 200 or answer["error"]["code"] == "session_busy", answer
                return status != 200

            wait_until(is_busy)
        wait_until(lambda: not is_busy(), SOON_S)
        assert session.feed("b").position == 7
        wait_until(lambda: statuses(server, [session.id]) == [499])


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
        ids = [f"call-{number}" for number in range(len(calls))]
        pids = [server.process.pid, int(server.worker.name)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            for request_id, (method, path, content) in zip(ids, calls, strict=True):
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    connection.sendall(call(method, path, content, request_id))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: len(statuses(server, ids)) == len(calls))
        assert set(statuses(server, ids)) == {499}
        assert session.text() == "ROMEO:"
        for name in ("never", "copy"):
            with pytest.raises(ServerError) as error:
                client.open(name)
            assert error.value.code == "session_not_found"

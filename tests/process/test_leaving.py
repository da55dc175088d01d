"""Clients that leave before their whole answer is complete, directly and through the balancer: the engine stops."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from service.store.model_store import ModelStore
from tests.harness.balancer import balancing
from tests.harness.server import SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until

NUM_CHARS = 90_000  # of a prompt; reading it takes this server seconds
MAX_TOKENS = 1_000_000
SOON_S = 30  # the engine stops at its next tick; whole, the largest of these answers take longer


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_KERNEL": "torch",
        "GRU_SERVE_MAX_TOKENS": str(MAX_TOKENS),
        "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
        "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
    }
    with serving(SERVE, environment) as server:
        yield server


@pytest.fixture(scope="module", params=["direct", "balancer"])
def entry(request: pytest.FixtureRequest, server: Server) -> Iterator[Endpoint]:
    if request.param == "direct":
        yield server
    else:
        with balancing([server.port]) as balancer:
            yield balancer


def send(entry: Endpoint, path: str, body: object, request_id: str) -> socket.socket:
    """Send a request on a new connection; return the connection."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {request_id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", entry.port), timeout=60)
    connection.sendall(head.encode() + data)
    return connection


def counted(server: Server, series: str) -> float:
    """Return the sum of a metric's series at the replica itself."""
    with closing(server.connect()) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return sum(float(value) for value in re.findall(rf"^gru_serve:{series}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


def work(server: Server) -> float:
    """Return how many characters the engine has read and generated. It counts only while it computes."""
    return counted(server, "prompt_tokens_total") + counted(server, "generation_tokens_total")


def is_idle(server: Server) -> bool:
    return counted(server, "num_requests_running") + counted(server, "num_requests_waiting") == 0


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("many", {"prompt": "ROMEO:", "n": 64, "max_tokens": MAX_TOKENS // 64}),
        ("reading", {"prompt": "a" * NUM_CHARS, "n": 2, "max_tokens": 1}),  # its prompt is read once for both
    ],
)
def test_completion__stops_when_its_client_leaves(server: Server, entry: Endpoint, name: str, body: object) -> None:
    """A client with a short time-out and two retries, which would else cost three whole answers."""
    before = work(server)
    for attempt in range(3):
        request_id = f"{name}-{entry.port}-{attempt}"
        with send(entry, "/v1/completions", body, request_id):
            wait_until(lambda: not is_idle(server))
        wait_until(lambda: is_idle(server), SOON_S)
        wait_until(lambda request_id=request_id: statuses(server, request_id) == [499])  # type: ignore[misc]
    assert work(server) - before < (MAX_TOKENS if name == "many" else NUM_CHARS)  # three times as much without it


def statuses(server: Server, request_id: str) -> list[int]:
    """Return the statuses that the server has logged of the requests with this id."""
    return [line["status"] for line in server.logged("request") if line["request_id"] == request_id]


def test_session__does_not_grow_when_its_client_leaves(server: Server, entry: Endpoint) -> None:
    path = f"/v1/sessions/left-{entry.port}"
    assert entry.call("PUT", path, {"text": "ROMEO:"})[0] == 201
    with send(entry, f"{path}/generate", {"max_tokens": MAX_TOKENS}, f"run-{entry.port}"):
        wait_until(lambda: not is_idle(server))
    wait_until(lambda: is_idle(server), SOON_S)
    wait_until(lambda: statuses(server, f"run-{entry.port}") == [499])
    position = entry.call("GET", path)[1]["position"]
    assert position < MAX_TOKENS
    assert entry.call("POST", f"{path}/feed", {"text": "b", "position": position})[1]["position"] == position + 1


def test_repeated_feed__stops_when_its_client_leaves(server: Server, entry: Endpoint) -> None:
    """The session has the text already, so that only the scores are computed again."""
    path = f"/v1/sessions/scored-{entry.port}"
    text = "a" * (NUM_CHARS // 6)
    assert entry.call("PUT", path, {"text": text})[0] == 201
    again = {"text": text, "position": 0, "logprobs": 20}
    with send(entry, f"{path}/feed", again, f"scored-{entry.port}"):
        wait_until(lambda: not is_idle(server))
    wait_until(lambda: is_idle(server), SOON_S)
    wait_until(lambda: statuses(server, f"scored-{entry.port}") == [499])


def test_score__stops_when_its_client_leaves(server: Server, entry: Endpoint) -> None:
    path = f"/v1/sessions/candidates-{entry.port}"
    assert entry.call("PUT", path, {"text": "ROMEO:"})[0] == 201
    body = {"candidates": ["a" * (NUM_CHARS // 2), "b" * (NUM_CHARS // 2)]}
    for route in ("/v1/score", f"{path}/score"):
        request_id = f"{route.count('/')}-{entry.port}"
        with send(entry, route, body, request_id):
            wait_until(lambda: not is_idle(server))
            assert entry.call("POST", f"{path}/feed", {"text": "b"})[0] == 200  # the session is free
        wait_until(lambda: is_idle(server), SOON_S)
        wait_until(lambda request_id=request_id: statuses(server, request_id) == [499])  # type: ignore[misc]


@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_client__gets_its_answer_from_a_server_and_a_400_from_the_balancer(
    server: Server, entry: Endpoint, stream: bool
) -> None:
    """HAProxy can't tell a half-closed client from one that has left: it ends the request of both at once."""
    body = {"prompt": "ROMEO:", "max_tokens": 2000, "seed": 7, "stream": stream}
    with send(entry, "/v1/completions", body, f"half-{entry.port}-{stream}") as connection:
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            raw = answer.read()
    if entry is server:
        assert b" 200 OK\r\n" in raw
        assert raw.rstrip().endswith(b"[DONE]\n\n\r\n0" if stream else b"}")
    else:
        assert raw.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"bad_request"' in raw
    wait_until(lambda: is_idle(server), SOON_S)

"""Budgets of memory on the real server: a client that has taken its half of one leaves room for the others."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from service.api_keys import new_key
from service.store.model_store import ModelStore
from tests.harness.server import BODY, ENDLESS, SERVE, Server, serving
from tests.harness.wait import wait_until

LARGE = 200_000  # bytes of a body: two of them fit into the half of a client, and five into the budget
NUM_SCORED = 20_000  # characters, each with 20 alternatives
ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_API_KEYS": f"{ALICE_ENTRY},{BOB_ENTRY}",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_MAX_TEXT_BYTES": str(2**20),
        "GRU_SERVE_MAX_SCORES": str(2 * 21 * NUM_SCORED),
        "GRU_SERVE_MAX_BODY_BYTES": str(2**18),
        "GRU_SERVE_MAX_LARGE_BODIES_BYTES": str(2**20),
    }
    with serving(SERVE, environment) as server:
        yield server


def request(key: str, body: dict[str, object], num_bytes: int = 0) -> bytes:
    """Return a whole request, with spaces after its body up to a number of bytes."""
    data = json.dumps(body).encode().ljust(num_bytes)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Authorization: Bearer {key}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def send(server: Server, data: bytes, receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def status_of(connection: socket.socket) -> int:
    """Wait for the beginning of an answer."""
    return int(connection.recv(12).removeprefix(b"HTTP/1.1 "))


def open_until_refused(server: Server, data: bytes, stack: ExitStack) -> int:
    """Open streams until one is refused for lack of memory; return how many are open."""
    for num_open in range(20):
        if status_of(stack.enter_context(send(server, data))) == 429:
            return num_open
    raise AssertionError("nothing is refused")


def answer(server: Server, data: bytes) -> tuple[int, str]:
    """Return the status of a short answer, and the code of its error."""
    with send(server, data) as connection:
        received = b""
        while not received.endswith((b"}\n", b"}")):
            received += connection.recv(65_536)
    error = json.loads(received.partition(b"\r\n\r\n")[2]).get("error", {})
    return int(received[9:12]), error.get("code", "")


def test_scores__of_one_client_leave_half_of_the_rest_to_another_one(server: Server) -> None:
    scored = BODY | {"prompt": "a" * NUM_SCORED, "max_tokens": 0, "echo": True, "logprobs": 20}
    short = BODY | {"logprobs": 0, "max_tokens": 1}
    assert answer(server, request(BOB, scored | {"prompt": "a" * (NUM_SCORED + 1)})) == (400, "out_of_range")
    with send(server, request(ALICE, scored), receive_bytes=4096) as slow:
        assert status_of(slow) == 200
        with send(server, request(ALICE, scored), receive_bytes=4096) as another:
            assert status_of(another) == 429
        assert answer(server, request(BOB, short)) == (200, "")
    wait_until(lambda: answer(server, request(ALICE, short)) == (200, ""))


def test_texts__of_one_client_leave_room_for_another_one(server: Server) -> None:
    long = request(ALICE, ENDLESS | {"prompt": "ab" * 10_000})  # 160 KB of ids
    with ExitStack() as stack:
        assert open_until_refused(server, long, stack) == 2
        assert answer(server, long) == (429, "overloaded")
        assert answer(server, request(BOB, BODY | {"prompt": "ab" * 10_000})) == (200, "")
        too_long = BODY | {"prompt": "ba" * 40_000}  # of which no beginning is cached
        assert answer(server, request(BOB, too_long)) == (400, "out_of_range")
    wait_until(lambda: answer(server, request(ALICE, BODY | {"prompt": "ab" * 10_000})) == (200, ""))


def test_large_bodies__of_one_client_leave_room_for_another_one(server: Server) -> None:
    """A body counts until its answer has ended, streams included."""
    with ExitStack() as stack:
        assert open_until_refused(server, request(ALICE, ENDLESS, LARGE), stack) == 2
        assert answer(server, request(ALICE, BODY, LARGE)) == (429, "overloaded")
        assert answer(server, request(ALICE, BODY, 60_000)) == (200, "")  # small ones do not count
        assert answer(server, request(BOB, BODY, LARGE)) == (200, "")
    wait_until(lambda: answer(server, request(ALICE, BODY, LARGE)) == (200, ""))


def test_large_bodies__count_from_their_first_byte_to_the_end_of_their_request(server: Server) -> None:
    """Two that are answered and three that arrive fill the budget. One more displaces the oldest that arrives."""
    with ExitStack() as stack:
        for _ in range(2):
            assert status_of(stack.enter_context(send(server, request(ALICE, ENDLESS, LARGE)))) == 200
        begun = request(ALICE, BODY, LARGE)[:-1]
        arriving = [stack.enter_context(send(server, begun)) for _ in range(3)]
        assert answer(server, request(BOB, BODY, 60_000)) == (200, "")
        assert answer(server, request(BOB, BODY, LARGE)) == (200, "")
        assert status_of(arriving[0]) == 429
        arriving[2].sendall(b" ")
        assert status_of(arriving[2]) == 429  # it has arrived, and Alice has her half
    wait_until(lambda: answer(server, request(ALICE, BODY, LARGE)) == (200, ""))


def call(server: Server, key: str, method: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    """Send a request of a client; return its answer."""
    with closing(server.connect()) as connection:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        found: dict[str, Any] = json.loads(response.read())
        assert response.status in (200, 201), found
        return found


def test_searches__of_one_client_wait_for_each_other(server: Server) -> None:
    """Two at a time have the memory that they need; the others wait, as suggestions and other clients' searches do."""
    beam: dict[str, object] = {"prompt": "ROMEO: ", "max_tokens": 100, "beam": 4}

    def choices(key: str) -> list[dict[str, Any]]:
        return [*call(server, key, "POST", "/v1/completions", beam)["choices"]]

    expected = choices(ALICE)
    assert [choice["exact"] for choice in expected] == [False] * 4
    call(server, ALICE, "PUT", "/v1/sessions/s", {"text": "ROMEO: "})
    with ThreadPoolExecutor(12) as pool:
        found = [pool.submit(choices, key) for _ in range(4) for key in (ALICE, BOB, ALICE)]
        words = [call(server, ALICE, "POST", "/v1/sessions/s/suggest", {"n": 3}) for _ in range(3)]
        assert [future.result(60) for future in found] == [expected] * 12
    assert [len(one["data"]) for one in words] == [3] * 3

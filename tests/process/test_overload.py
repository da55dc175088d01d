"""More clients than the real process admits, and clients that vanish.

VANISHING_CLIENTS=10000 pytest tests/process/test_overload.py     # by hand; 300 otherwise
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import pytest

from service.store.model_store import ModelStore
from tests.harness.server import BODY, ENDLESS, SERVE, Server, ask, serving
from tests.harness.wait import wait_until

MAX_BATCH, MAX_QUEUE = 4, 4
NUM_PLACES = MAX_BATCH + MAX_QUEUE
NUM_THREADS = NUM_PLACES + 16
NUM_VANISHING = int(os.environ.get("VANISHING_CLIENTS", "300"))
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_MAX_BATCH": str(MAX_BATCH),
        "GRU_SERVE_MAX_QUEUE": str(MAX_QUEUE),
        "GRU_SERVE_HTTP_THREADS": str(NUM_THREADS),
        "GRU_SERVE_PREFIX_CACHE_BYTES": "100000",
    }
    with serving(SERVE, environment) as server:
        yield server


@dataclass(frozen=True)
class Usage:
    """What the process that answers requests uses."""

    num_threads: int
    num_files: int
    memory_bytes: int

    @classmethod
    def of(cls, server: Server) -> Usage:
        lines = (server.worker / "status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        num_files = len(os.listdir(server.worker / "fd"))
        return cls(int(status["Threads"]), num_files, int(status["VmRSS"].split()[0]) * 1024)


def is_idle(server: Server) -> bool:
    """Return whether every place is free: as many texts as there are places are admitted at once."""
    prompts = ["ROMEO:"] * NUM_PLACES
    return server.call("POST", "/v1/completions", BODY | {"prompt": prompts, "max_tokens": 1})[0] == 200


def test_overload__requests_are_answered_right_or_refused_at_once(server: Server) -> None:
    seeds = range(5)
    alone = {seed: server.text(seed=seed, max_tokens=3000) for seed in seeds}
    num_clients = 10 * NUM_PLACES
    start = threading.Barrier(num_clients)

    def outcome(client: int) -> str:
        """Send one request; return `right` or `refused`. Any other answer fails the test."""
        seed, stream = client % 5, client % 2 == 1
        start.wait(60)
        with closing(server.connect()) as connection:
            ask(connection, "POST", "/v1/completions", BODY | {"seed": seed, "max_tokens": 3000, "stream": stream})
            response = connection.getresponse()
            body = response.read().decode()
        if response.status == 429:
            assert response.headers["Retry-After"] == "1"
            assert json.loads(body)["error"]["code"] == "overloaded"
            return "refused"
        assert response.status == 200, body
        answers = [body]
        if stream:
            answers = [block.removeprefix("data: ") for block in body.split("\n\n")]
            assert answers[-2:] == ["[DONE]", ""]
            del answers[-2:]
        assert "".join(json.loads(answer)["choices"][0]["text"] for answer in answers) == alone[seed]
        return "right"

    with ThreadPoolExecutor(num_clients) as pool:
        outcomes = list(pool.map(outcome, range(num_clients)))
    assert outcomes.count("right") >= NUM_PLACES
    assert outcomes.count("refused") >= 1
    wait_until(lambda: is_idle(server))


def test_overload__a_request_for_more_texts_than_free_places_is_refused_whole(server: Server) -> None:
    wait_until(lambda: is_idle(server))
    with server.open(ENDLESS) as holder:
        assert holder.recv(1)
        status, answer = server.call("POST", "/v1/completions", BODY | {"n": NUM_PLACES})
        assert (status, answer["error"]["code"]) == (429, "overloaded")
        assert len(server.text()) == 50


def test_vanishing_clients__leave_no_thread_file_or_memory(server: Server) -> None:
    vanish(server, 50)
    wait_until(lambda: is_idle(server))
    before = Usage.of(server)
    vanish(server, NUM_VANISHING)
    wait_until(lambda: is_idle(server))
    # A connection closes a moment after its place is free.
    wait_until(lambda: Usage.of(server).num_files <= before.num_files)
    wait_until(lambda: Usage.of(server).num_threads <= before.num_threads)  # idle threads end
    after = Usage.of(server)
    assert after.memory_bytes < before.memory_bytes + 50_000_000
    assert "Traceback" not in "".join(server.log)


def vanish(server: Server, num_clients: int) -> None:
    """Let clients begin a stream, read a little and close their connection; every second one resets it."""

    def begins_and_leaves(client: int) -> bool:
        """Return whether the stream was admitted. It is refused until the server notices that others have left."""
        with server.open(ENDLESS | {"seed": client}) as connection:
            is_admitted = connection.recv(100).startswith(b"HTTP/1.1 200") and connection.recv(1000) != b""
            if client % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return is_admitted

    with ThreadPoolExecutor(NUM_PLACES) as pool:
        list(pool.map(lambda client: wait_until(lambda: begins_and_leaves(client)), range(num_clients)))

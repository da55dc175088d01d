"""One client with as much work as it may have, beside others that have little."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from service.api_keys import new_key
from service.store.model_store import ModelStore
from tests.harness.server import BODY, SERVE, Server, serving
from tests.harness.wait import wait_until

(GREEDY, GREEDY_ENTRY), (OTHER, OTHER_ENTRY), (THIRD, THIRD_ENTRY) = (new_key(name) for name in ("greedy", "b", "c"))
NUM_PLACES = 16


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_MAX_BATCH": str(NUM_PLACES // 2),
        "GRU_SERVE_MAX_QUEUE": str(NUM_PLACES // 2),
        "GRU_SERVE_API_KEYS": ",".join((GREEDY_ENTRY, OTHER_ENTRY, THIRD_ENTRY)),
    }
    with serving(SERVE, environment) as server:
        yield server


def send(server: Server, key: str, body: dict[str, object]) -> http.client.HTTPConnection:
    """Send a request for a completion."""
    connection = server.connect()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(BODY | body), headers)
    return connection


def status(server: Server, key: str, body: dict[str, object]) -> int:
    """Return the status of the answer to a completion."""
    with closing(send(server, key, body)) as connection:
        response = connection.getresponse()
        response.read()
        return response.status


def num_open(server: Server) -> int:
    """Return the number of texts in the engine."""
    with closing(server.connect()) as connection:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {OTHER}"})
        lines = connection.getresponse().read().decode().splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("gru_serve:num_requests_"))


@contextmanager
def requests_of_the_greedy(server: Server, num_requests: int, **body: object) -> Iterator[None]:
    """Have this many endless requests, which take all places that one client can have."""
    endless = {"max_tokens": 10_000_000} | body
    connections = [send(server, GREEDY, endless) for _ in range(num_requests)]
    try:
        wait_until(lambda: num_open(server) == NUM_PLACES)
        assert status(server, GREEDY, {"n": 1}) == 429
        yield
    finally:
        for connection in connections:
            connection.close()
        wait_until(lambda: status(server, GREEDY, {"n": NUM_PLACES, "max_tokens": 1}) == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_four_requests_for_many_texts__do_not_shut_out_other_clients(server: Server, stream: bool) -> None:
    with requests_of_the_greedy(server, 4, n=NUM_PLACES // 4, stream=stream):
        assert [status(server, OTHER, {"seed": seed}) for seed in range(30)] == [200] * 30


def test_many_requests__do_not_shut_out_other_clients(server: Server) -> None:
    with requests_of_the_greedy(server, NUM_PLACES):
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda key=key: answers.append(status(server, key, {"stream": True})))
            for key in (OTHER, THIRD)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * len(threads)


def test_texts__are_the_same_beside_a_greedy_client(server: Server) -> None:
    def text() -> str:
        with closing(send(server, OTHER, {"max_tokens": 700})) as connection:
            return str(json.loads(connection.getresponse().read())["choices"][0]["text"])

    alone = text()
    with requests_of_the_greedy(server, 4, n=NUM_PLACES // 4):
        assert text() == alone

"""The rate limit of a client, and the limits on open streams and concurrent requests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.errors import InvalidSettings, Overloaded, TooManyStreams
from service.settings import Settings, read_settings
from service.store.model_store import ModelStore
from service.web.gate.admission import AdmissionLimit
from service.web.gate.drain import Drain
from service.web.gate.error_responses import register_error_handlers
from service.web.gate.guard import register_guard
from service.web.gate.rate_limit import register_rate_limit
from tests.harness.application import client_of
from tests.harness.redis_topologies import admin_of, sentinel_group
from tests.harness.wait import wait_until

(ALICE, ALICE_ENTRY), (ALICE_2, ALICE_2_ENTRY), (BOB, BOB_ENTRY) = new_key("alice"), new_key("alice"), new_key("bob")
ENTRIES = SecretStr(",".join([ALICE_ENTRY, ALICE_2_ENTRY, BOB_ENTRY]))
STREAM = {"prompt": "a", "max_tokens": 400, "stream": True}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_rate_limit__refuses_posts_and_puts_above_the_rate(tiny_store: ModelStore) -> None:
    settings = Settings(model_store=tiny_store.root, model="tiny", api_keys=ENTRIES, rate_limit="4/day")
    with client_of(settings) as client:

        def started(key: str, path: str = "/v1/completions") -> int:
            return client.post(path, json={"prompt": "a"}, headers=bearer(key)).status_code

        assert client.put("/v1/sessions/a", json={}, headers=bearer(ALICE)).status_code == 201
        assert started(ALICE_2, "/v1/sessions/a/feed") == 400  # counts all the same, and both keys are alice's
        assert [started(ALICE) for _ in range(3)] == [200, 200, 429]
        refused = client.put("/v1/sessions/b", json={}, headers=bearer(ALICE_2))
        assert refused.status_code == 429
        assert (refused.get_json()["error"]["code"], refused.get_json()["error"]["type"]) == (
            "rate_limited",
            "rate_limit_error",
        )
        assert 1 <= int(refused.headers["Retry-After"]) <= 86_401
        for path in ("/v1/sessions/a", "/v1/models", "/healthz", "/metrics", "/v1/sessions/a/text"):
            assert client.get(path, headers=bearer(ALICE)).status_code == 200  # reading doesn't count
        assert client.get("/v1/sessions/a/generate", headers=bearer(ALICE)).status_code == 409  # nor does resuming
        assert client.delete("/v1/sessions/a", headers=bearer(ALICE)).status_code == 204
        assert started(BOB) == 200
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401  # counts for no client


@pytest.mark.parametrize("rate", ["often", "10", "0/minute", "-1/second", "10/fortnight"])
def test_rate_setting__that_is_invalid_stops_the_server_start(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("GRU_SERVE_RATE_LIMIT", rate)
    with pytest.raises(InvalidSettings, match="GRU_SERVE_RATE_LIMIT"):
        read_settings()


@pytest.mark.parametrize("rate", ["600/minute", "10 per second", "10/second;100/minute"])
def test_rate_setting__accepts_several_notations(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("GRU_SERVE_RATE_LIMIT", rate)
    assert read_settings().rate_limit == rate


# Several replicas that count in one real Redis


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A redis-server for this test alone, and its port."""
    command = shutil.which("redis-server")
    if command is None:
        assert os.environ.get("CI") != "true", "redis-server is not installed"
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [command, "--port", str(port), "--save", "", "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    wait_until(lambda: answers(port))
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)


def answers(port: int) -> bool:
    """Whether Redis answers on a port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(10).startswith(b"+PONG")
    except OSError:
        return False


@dataclass(frozen=True)
class Replica:
    """A small application. Calling it sends a request that counts, and returns the status of the answer."""

    client: FlaskClient
    limiter: Any

    def __call__(self) -> int:
        return self.client.post("/start").status_code


@contextmanager
def replica(rate: str, redis: int | str) -> Iterator[Replica]:
    """An application with one route and a rate limit. redis: The URL of Redis, or its port on this machine."""
    app = Flask(__name__)
    register_guard(app, Drain(0, 0))
    close = register_rate_limit(app, rate, redis if isinstance(redis, str) else f"redis://127.0.0.1:{redis}/0")
    register_error_handlers(app)

    @app.post("/start")
    def start() -> str:
        return ""

    (limiter,) = app.extensions["limiter"]
    yield Replica(app.test_client(), limiter)
    close()


def test_rate_limit__is_shared_by_replicas_and_per_replica_without_redis(
    redis_server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = redis_server
    with replica("3/day", port) as first, replica("3/day", port) as second:
        assert [first(), second(), first(), second(), first()] == [200, 200, 200, 429, 429]
        process.kill()
        process.wait(10)
        assert [first(), first(), first(), first()] == [200, 200, 200, 429]
        assert second() == 200


def test_rate_limit__with_an_unresponsive_redis_falls_back(redis_server: tuple[subprocess.Popen[bytes], int]) -> None:
    """A stopped process accepts connections and never answers: without a timeout the first request would never end."""
    process, port = redis_server
    with replica("4/day", port) as start:
        assert start() == 200
        process.send_signal(signal.SIGSTOP)
        assert [start() for _ in range(5)] == [200, 200, 200, 200, 429]


def test_rate_limit__counts_at_the_new_master_after_a_failover(tmp_path: Path) -> None:
    with sentinel_group(tmp_path, num_replicas=1, num_sentinels=1) as group, replica("1000/day", group.url) as start:
        assert start() == 200
        old = group.master()
        group.fail_over()
        wait_until(lambda: group.master() is not old, 30)
        old.kill()  # else it would accept writes for some seconds more

        def counts_there() -> bool:
            assert start() == 200  # meanwhile the process counts for itself
            with admin_of(group.master()) as client:
                values = [int(client.get(key)) for key in client.keys("gru-serve:starts*")]
            return max(values, default=0) > 1

        wait_until(counts_there, 20)


def test_rate_limit__waits_for_redis_for_a_limited_time() -> None:
    with replica("4/day", 1) as start:  # nothing listens on this port
        assert start() == 200
        assert start.limiter.storage._connections._timeout_s == 0.1


# Streams


@pytest.fixture
def capped(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    settings = Settings(model_store=tiny_store.root, model="tiny", api_keys=ENTRIES, max_streams=2)
    with client_of(settings) as client:
        yield client


def test_stream_limit__counts_the_streams_of_each_client(capped: FlaskClient) -> None:
    def begin(key: str) -> object:
        return capped.post("/v1/completions", json=STREAM, headers=bearer(key), buffered=False)

    streams = [begin(ALICE), begin(ALICE_2)]
    refused = capped.post("/v1/completions", json=STREAM, headers=bearer(ALICE))
    assert refused.status_code == 429
    assert refused.get_json()["error"]["code"] == "too_many_streams"
    assert refused.headers["Retry-After"] == "1"
    assert capped.put("/v1/sessions/s", json={"text": "a"}, headers=bearer(ALICE)).status_code == 201
    body = {"max_tokens": 5, "stream": True}
    assert capped.post("/v1/sessions/s/generate", json=body, headers=bearer(ALICE)).status_code == 429
    assert capped.get("/v1/sessions/s/generate", headers=bearer(ALICE)).status_code == 429
    assert capped.post("/v1/sessions/s/generate", json={"max_tokens": 5}, headers=bearer(ALICE)).status_code == 200
    whole = capped.post("/v1/completions", json=STREAM | {"stream": False}, headers=bearer(ALICE))
    assert whole.status_code == 200  # it is not a stream
    others = capped.post("/v1/completions", json=STREAM, headers=bearer(BOB))
    assert others.text.endswith("[DONE]\n\n")
    others.close()
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_stream_limit__is_released_however_a_stream_ends(capped: FlaskClient) -> None:
    """Streams that end, that are closed before or after their first event, refused, failed at the start, resumed."""
    assert capped.put("/v1/sessions/s", json={"text": "a"}, headers=bearer(ALICE)).status_code == 201
    for _ in range(3):
        done = capped.post("/v1/completions", json=STREAM, headers=bearer(ALICE))
        assert done.text.endswith("[DONE]\n\n")
        done.close()
        capped.post("/v1/completions", json=STREAM, headers=bearer(ALICE), buffered=False).close()
        left = capped.post("/v1/completions", json=STREAM, headers=bearer(ALICE), buffered=False)
        next(left.iter_encoded())
        left.close()
        refused = capped.post("/v1/completions", json=STREAM | {"prompt": "§"}, headers=bearer(ALICE))
        assert refused.status_code == 400
        body = {"max_tokens": 5, "stream": True}
        wrong = capped.post("/v1/sessions/s/generate", json=body | {"position": 9_999}, headers=bearer(ALICE))
        assert wrong.status_code == 409
        run = capped.post("/v1/sessions/s/generate", json=body, headers=bearer(ALICE))
        assert "event: done" in run.text
        run.close()
        again = capped.get("/v1/sessions/s/generate", headers=bearer(ALICE))
        assert "event: done" in again.text
        again.close()
        assert capped.get("/v1/sessions/none/generate", headers=bearer(ALICE)).status_code == 404
    two = [capped.post("/v1/completions", json=STREAM, headers=bearer(ALICE), buffered=False) for _ in range(2)]
    assert [stream.status_code for stream in two] == [200, 200]
    for stream in two:
        stream.close()


def test_admission_limit__counts_requests_and_streams() -> None:
    admission = AdmissionLimit(3, max_streams_per_client=1)
    admission.acquire("a")
    with pytest.raises(TooManyStreams):
        admission.acquire("a")
    admission.acquire("b")
    assert admission.num_streams == 2
    admission.acquire()  # the refused stream doesn't count as a request
    with pytest.raises(Overloaded):
        admission.acquire("c")
    for streaming_client in ("a", "b", None):
        admission.release(streaming_client)
    assert admission.num_streams == 0
    unlimited = AdmissionLimit(3)
    for _ in range(3):
        unlimited.acquire("a")
    assert unlimited.num_streams == 3

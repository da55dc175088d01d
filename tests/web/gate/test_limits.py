"""The rate limit of a client, and the limits on open streams and concurrent requests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from flask import Flask
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.errors import InvalidSettings, Overloaded, TooManyStreams
from service.settings import Settings, read_settings
from service.shares import work_for
from service.store.model_store import ModelStore
from service.web.api.schemas import Body
from service.web.gate.admission import AdmissionLimit
from service.web.gate.drain import Drain
from service.web.gate.error_responses import register_error_handlers
from service.web.gate.guard import register_guard
from service.web.gate.rate_limit import register_rate_limit
from service.web.gate.rate_storage import ProcessStorage
from service.web.gate.route import Route, route_of
from tests.harness.application import client_of
from tests.harness.clock import Clock
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


def test_rate_limit__counts_large_requests_several_times(tiny_store: ModelStore) -> None:
    """A start counts once for each 8,192 characters of all its texts. A body that its schema refuses counts once."""
    settings = Settings(model_store=tiny_store.root, model="tiny", rate_limit="20/day")
    small = {"prompt": "a", "max_tokens": 1}
    with client_of(settings) as client:

        def started(body: dict[str, object], address: str) -> int:
            environ = {"REMOTE_ADDR": address}
            return client.post("/v1/completions", json=body, environ_base=environ).status_code

        def num_left(address: str) -> int:
            return [started(small, address) for _ in range(25)].index(429)

        large = {"prompt": ["a", "b"], "n": 3, "max_tokens": 5000}  # 30,002 characters
        requests: list[tuple[dict[str, object], int, int]] = [
            (small, 200, 1),
            (large, 200, 4),
            (large | {"n": 1, "best_of": 3}, 200, 4),
            (large | {"n": 129}, 400, 1),
            (large | {"max_tokens": 8193}, 400, 1),
            (large | {"max_tokens": "5000"}, 400, 1),
            (large | {"n": 1.5}, 400, 1),
            ({"prompt": "a" * 99_000, "max_tokens": 1}, 200, 13),
            ({"prompt": {"a": 1}}, 400, 1),
            ({"prompt": "a", "n": 24, "max_tokens": 8192}, 200, 20),  # more than the limit: it uses all that is left
            # Fields that are not sent, or sent as null, count with their defaults.
            ({"prompt": "a" * 8190}, 200, 2),  # 8,190 characters are read, and 16 generated
            ({"prompt": "a" * 8190, "max_tokens": None, "n": None, "beam": None, "best_of": None}, 200, 2),
            ({"prompt": [[1] * 4000, [1] * 4180]}, 200, 2),
            ({"prompt": ["a" * 1000] * 8, "beam": 2}, 200, 2),
            ({"prompt": "a" * 8190, "max_tokens": 1.0, "n": 2.0}, 200, 1),
            ({"prompt": "a" * 8190, "max_tokens": 2.0, "n": 2.0}, 200, 2),
            ({"prompt": "a" * 20_000, "text": "a" * 20_000}, 400, 1),  # an unknown field is not read
        ]
        for number, (body, status, cost) in enumerate(requests):
            address = f"10.0.0.{number}"
            assert started(body, address) == status
            assert num_left(address) == 20 - cost, body
        parts = [{"role": "user", "content": [{"type": "text", "text": "a" * 20_000}]}] * 2
        others: list[tuple[str, dict[str, object], int]] = [
            ("chat/completions", {"messages": parts, "max_completion_tokens": 1}, 5),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 16}, 3),  # 1,024 characters each
            ("embeddings", {"input": ["a" * 20_000] * 2}, 5),
            ("embeddings", {"input": [[[[[[["a"]]]]]]]}, 1),
            ("score", {"prompt": "a" * 20_000, "candidates": ["a" * 10_000, "b" * 10_000]}, 5),
            ("chat/completions", {"messages": parts, "max_tokens": None, "max_completion_tokens": 8192}, 6),
            ("chat/completions", {"messages": parts, "max_completion_tokens": 8193}, 1),
            ("../tokenize", {"prompt": "a" * 20_000}, 3),
            ("../detokenize", {"tokens": [1] * 20_000}, 3),
            ("sessions/none/suggest", {"n": 32, "max_chars": 256, "prompt": "a"}, 2),
        ]
        for number, (path, body, cost) in enumerate(others):
            path = f"/v1/{path}".replace("/v1/..", "")
            client.post(path, json=body, environ_base={"REMOTE_ADDR": f"10.0.1.{number}"})
            assert num_left(f"10.0.1.{number}") == 20 - cost, path
        assert client.put("/v1/sessions/a", json={"text": "a" * 50_000}).status_code == 201
        assert client.post("/v1/sessions/a/generate", json={"max_tokens": 2}).status_code == 200
        assert num_left("127.0.0.1") == 20 - 7 - 1


def test_start_costs__every_body_of_a_route_that_counts_says_what_it_reads(tiny_store: ModelStore) -> None:
    """So that no route is forgotten: the cost is that of the validated body, with its defaults."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        bodies = {
            get_type_hints(view).get("body"): route.path
            for view in client.application.view_functions.values()
            if (route := route_of(view)) is not None and route.counts_as_start
        }
    reading_little = {"/v1/inspect", "/v1/sessions/<id>/rewind", "/v1/sessions/<id>/fork", "/admin/reload"}
    silent = {path for body, path in bodies.items() if body is not None and body.num_chars is Body.num_chars}
    assert silent <= reading_little
    assert len(bodies) >= 14


def test_rate_storage__forgets_what_is_old_and_whom_it_has_not_seen_for_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("service.web.gate.rate_storage._MAX_KEYS", 3)
    storage = ProcessStorage(clock=clock)
    clock.now = 600.0
    assert [storage.acquire_sliding_window_entry("a", 3, 60) for _ in range(4)] == [True, True, True, False]
    assert storage.get_sliding_window("a", 60) == (0, 0.0, 3, 120.0)
    clock.now += 90  # half of the window in which 3 were counted is within the last minute
    assert storage.get_sliding_window("a", 60) == (3, 30.0, 0, 90.0)
    assert storage.acquire_sliding_window_entry("a", 3, 60, 2)
    assert not storage.acquire_sliding_window_entry("a", 3, 60)
    clock.now += 120
    assert storage.get_sliding_window("a", 60) == (0, 0.0, 0, 90.0)
    for key in "abcd":
        assert storage.acquire_sliding_window_entry(key, 1, 60)
    assert [storage.acquire_sliding_window_entry(key, 1, 60) for key in "bcd"] == [False] * 3
    assert storage.acquire_sliding_window_entry("a", 1, 60)  # forgotten
    assert storage.reset() == 3


@pytest.mark.parametrize("has_keys", [True, False])
def test_session_limit__a_client_does_not_push_out_the_sessions_of_others(
    tiny_store: ModelStore, has_keys: bool
) -> None:
    entries = ENTRIES if has_keys else SecretStr("")
    settings = Settings(model_store=tiny_store.root, model="tiny", api_keys=entries, max_sessions=20)
    with client_of(settings) as client:

        def call(method: str, session_id: str, who: str) -> int:
            key, address = (BOB, "10.0.0.1") if who == "bob" else (ALICE, "10.0.0.2")
            answer = client.open(
                f"/v1/sessions/{session_id}",
                method=method,
                json={} if method == "PUT" else None,
                headers=bearer(key),
                environ_base={"REMOTE_ADDR": address},
            )
            return answer.status_code

        assert [call("PUT", f"bob{number}", "bob") for number in range(5)] == [201] * 5
        assert [call("PUT", f"alice{number}", "alice") for number in range(50)] == [201] * 50
        assert [call("GET", f"bob{number}", "bob") for number in range(5)] == [200] * 5
        found = [call("GET", f"alice{number}", "alice") for number in range(50)]
        assert found == [410] * 35 + [200] * 15


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
        process.wait(60)


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
    @Route("POST", "/start", counts_as_start=True)
    def start() -> str:
        return ""

    (limiter,) = app.extensions["limiter"]
    try:
        yield Replica(app.test_client(), limiter)
    finally:
        close()


def test_rate_limit__is_shared_by_replicas_and_per_replica_without_redis(
    redis_server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = redis_server
    with replica("3/day", port) as first, replica("3/day", port) as second:
        assert [first(), second(), first(), second(), first()] == [200, 200, 200, 429, 429]
        process.kill()
        process.wait(60)
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
        group.wait_until_whole()
        group.fail_over()
        wait_until(lambda: group.master() is not old)
        old.kill()  # else it would accept writes for some seconds more

        def counts_there() -> bool:
            assert start() == 200  # meanwhile the process counts for itself
            with admin_of(group.master()) as client:
                values = [int(client.get(key)) for key in client.keys("gru-serve:starts*")]
            return max(values, default=0) > 1

        wait_until(counts_there)


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


@contextmanager
def admitted(admission: AdmissionLimit, client: str, *, is_stream: bool = True) -> Iterator[None]:
    """Admit a request of a client for as long as the block lasts."""
    work_for(client)
    try:
        with admission.admit(is_stream=is_stream):
            work_for("")  # the block ends where another client is the current one
            yield
    finally:
        work_for("")


def test_admission_limit__counts_requests_and_streams() -> None:
    admission = AdmissionLimit(3, max_per_client=1)
    with ExitStack() as held:
        held.enter_context(admitted(admission, "a"))
        with pytest.raises(TooManyStreams), admitted(admission, "a"):
            pass
        held.enter_context(admitted(admission, "b"))
        assert admission.num_streams == 2
        held.enter_context(admission.admit())  # the refused stream doesn't count as a request
        with pytest.raises(Overloaded), admitted(admission, "c"):
            pass
    assert admission.num_streams == 0
    unlimited = AdmissionLimit(3)
    with admitted(unlimited, "a"), admitted(unlimited, "a"), admitted(unlimited, "a"):
        assert unlimited.num_streams == 3
    assert unlimited.num_streams == 0


def test_admission_limit__leaves_places_for_other_clients() -> None:
    admission = AdmissionLimit(8, num_reserved=4)
    with ExitStack() as held:
        for _ in range(8):
            held.enter_context(admitted(admission, "greedy"))
        with pytest.raises(Overloaded), admitted(admission, "greedy"):
            pass
        for client in ("b", "b", "c"):
            held.enter_context(admitted(admission, client))
        assert admission.num_streams == 11


def test_stream_limit__counts_whole_answers_separately() -> None:
    """As many answers that are not streams are admitted as streams, and no more."""
    admission = AdmissionLimit(9, max_per_client=2)
    with ExitStack() as held:
        for is_stream in (True, False, True, False):
            held.enter_context(admitted(admission, "a", is_stream=is_stream))
        for is_stream in (True, False):
            with pytest.raises(TooManyStreams, match="2"), admitted(admission, "a", is_stream=is_stream):
                pass
        held.enter_context(admitted(admission, "b"))
        with admitted(admission, "b", is_stream=False):
            pass
        with pytest.raises(TooManyStreams), admitted(admission, "a", is_stream=False):
            pass
    with admitted(admission, "a", is_stream=False):
        pass

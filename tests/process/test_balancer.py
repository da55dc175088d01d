"""Replicas behind the real balancer with the shipped configuration: where requests go, and what comes back."""

from __future__ import annotations

import json
import re
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPResponse

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.balancer import CONFIGURATION, Balancer, balancing, kill, replicas
from tests.harness.programs import free_port, program
from tests.harness.redis_process import redis_process
from tests.harness.server import BODY, ENDLESS, Server, ask
from tests.harness.wait import wait_until

NUM_THREADS = 24  # of a replica: four texts side by side and four that wait


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with redis_process(tmp_path_factory.mktemp("redis")) as redis:
        yield {
            "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
            "GRU_SERVE_MODEL": "tiny",
            "GRU_SERVE_ENGINE_THREADS": "1",
            "GRU_SERVE_MAX_TOKENS": "10000000",
            "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
            "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
            "GRU_SERVE_MAX_BATCH": "4",
            "GRU_SERVE_MAX_QUEUE": "4",
            "GRU_SERVE_HTTP_THREADS": str(NUM_THREADS),
            "GRU_SERVE_SESSION_STORE": redis.url,
            "GRU_SERVE_DRAIN_S": "5",
            "GRU_SERVE_DRAIN_NOTICE_S": "2",
        }


@pytest.fixture(scope="module")
def servers(environment: dict[str, str]) -> Iterator[list[Server]]:
    with replicas(3, environment) as servers:
        yield servers


@pytest.fixture(scope="module")
def balancer(servers: list[Server]) -> Iterator[Balancer]:
    with balancing([server.port for server in servers]) as balancer:
        yield balancer


def served_by(balancer: Balancer, method: str, path: str, body: object = None) -> str:
    """Which server the balancer had answer a request."""
    request_id = secrets.token_hex(8)
    with closing(balancer.connect()) as connection:
        data = json.dumps(body).encode() if body is not None else b""
        connection.request(method, path, data, {"Content-Type": "application/json", "X-Request-Id": request_id})
        response = connection.getresponse()
        assert response.status < 400, response.read()
        response.read()
    wait_until(lambda: request_id in balancer.requests())
    server: str = balancer.requests()[request_id]["server"]
    return server


def answer(balancer: Balancer, request: bytes) -> tuple[int, str, str | None]:
    """Status, code and Retry-After of the answer to raw bytes."""
    connection = socket.create_connection(("127.0.0.1", balancer.port), timeout=30)
    with connection, closing(HTTPResponse(connection)) as response:
        connection.sendall(request)
        response.begin()
        assert response.headers["Content-Type"] == "application/json"
        error = json.loads(response.read())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status, error["code"], response.headers["Retry-After"]


def test_the_shipped_configuration_is_valid_and_without_warnings() -> None:
    command = [program("haproxy"), "-c", "-f", str(CONFIGURATION)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result
    assert "WARNING" not in result.stdout + result.stderr


def test_a_session_is_always_served_by_one_replica_and_sessions_by_all(balancer: Balancer) -> None:
    servers = set()
    for number in range(24):
        path = f"/v1/sessions/s{number}"
        calls: list[tuple[str, str, object]] = [
            ("PUT", path, {"text": "ROMEO:"}),
            ("POST", f"{path}/feed", {"text": "a"}),
            ("GET", path, None),
        ]
        calls += [("POST", f"{path}/generate", {"max_tokens": 5}), ("GET", f"{path}/text?to=3", None)]
        calls += [("GET", f"/v1/sessions/%73{number}", None)]  # the same id
        served = {served_by(balancer, *call) for call in calls}
        assert len(served) == 1, served
        servers |= served
    assert servers == {"sessions/app1", "sessions/app2", "sessions/app3"}


def test_everything_else_goes_to_who_has_the_least_to_do(balancer: Balancer) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(balancer.open(ENDLESS))
            assert connection.recv(1)
        busy = {served_by(balancer, "POST", "/v1/completions", BODY) for _ in range(6)}
    assert busy <= {f"completions/app{number}" for number in (1, 2, 3)}
    assert len(busy) == 3
    assert served_by(balancer, "POST", "/v1/sessions", {}).startswith("any_session/")


def test_streams_are_not_collected(balancer: Balancer) -> None:
    with balancer.open(ENDLESS) as connection:
        got = b""
        while got.count(b"data: ") < 3:
            got += connection.recv(4096)


@pytest.mark.parametrize(
    "path", ["/metrics", "//metrics", "/%6detrics", "/metrics/", "/metrics?a=b", "/admin/reload", "/%61dmin/x"]
)
def test_what_is_for_inside_can_not_be_reached(balancer: Balancer, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    assert answer(balancer, request) == (404, "not_found", None)
    request = f"GET http://127.0.0.1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    assert answer(balancer, request) == (404, "not_found", None)


def test_the_id_of_a_request_is_the_same_everywhere(balancer: Balancer, servers: list[Server]) -> None:
    for given, is_kept in (("my-request.7", True), ("not one { of ours", False), (None, False)):
        with closing(balancer.connect()) as connection:
            connection.request("GET", "/v1/models", headers={"X-Request-Id": given} if given else {})
            response = connection.getresponse()
            response.read()
        request_id = response.headers["X-Request-Id"]
        assert (request_id == given) == is_kept
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id)
        wait_until(lambda request_id=request_id: request_id in balancer.requests())  # type: ignore[misc]
        seen = [line for server in servers for line in server.log if f'"{request_id}"' in line]
        assert len(seen) == 1


def test_no_id_of_a_session_is_logged(balancer: Balancer) -> None:
    assert served_by(balancer, "PUT", "/v1/sessions/a-secret-name", {})
    assert "a-secret-name" not in "".join(balancer.log)
    assert [line["route"] for line in balancer.requests().values()].count("session") > 0


def test_its_own_errors_have_our_shape() -> None:
    with balancing([free_port()], timeout_http__request="300ms", timeout_queue="100ms") as alone:
        for path in ("/v1/completions", "/v1/sessions", "/v1/sessions/a"):
            request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
            assert answer(alone, request) == (503, "not_ready", "1")
        slow_body = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
        assert answer(alone, slow_body) == (408, "incomplete_body", None)


def test_what_is_no_http_is_refused_before_there_is_a_request() -> None:
    """With HAProxy's own text, which can't be changed there."""
    with balancing([free_port()], timeout_http__request="300ms") as alone:
        for request, status in ((b"GET / HTTP/1.1\r\nHost\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHo", 408)):
            with socket.create_connection(("127.0.0.1", alone.port), timeout=30) as connection:
                connection.sendall(request)
                assert connection.recv(100).startswith(b"HTTP/1.1 %d " % status)


def test_clients_that_send_slowly_never_reach_a_replica(environment: dict[str, str]) -> None:
    """Ten times as many as a replica has threads: half of a head, half of a body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with replicas(1, environment) as servers, balancing([servers[0].port]) as balancer, ExitStack() as stack:
        files = len(list((servers[0].worker / "fd").iterdir()))
        for number in range(10 * NUM_THREADS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", balancer.port)))
            connection.sendall(head + (b"Content-Length: 100\r\n\r\n{" if number % 2 else b"X-Slow: "))
        for _ in range(20):
            assert len(balancer.text()) == 50
        assert len(list((servers[0].worker / "fd").iterdir())) < files + NUM_THREADS


def test_a_replica_that_dies_costs_no_request_and_no_character(environment: dict[str, str]) -> None:
    """Without a word, in the midst of a stream; requests that come then find the others at once."""
    with replicas(3, environment) as servers, balancing([server.port for server in servers]) as balancer:
        with Client(f"http://127.0.0.1:{servers[2].port}") as direct:
            whole = "".join(direct.create("ROMEO:", seed=7).generate(500_000))
        with Client(f"http://127.0.0.1:{balancer.port}") as client:
            session = client.create("ROMEO:", seed=7, id="a")
            pieces = session.generate(500_000)
            text = next(pieces)
            serving_it = int(served_by(balancer, "GET", "/v1/sessions/a").removeprefix("sessions/app"))
            kill(servers[serving_it - 1])
            for _ in range(30):
                assert len(balancer.text()) == 50
            text += "".join(pieces)
            assert text == whole
            for number in range(30):
                assert client.create("ROMEO:", id=f"after{number}").feed("a").position == 7


def test_replicas_that_drain_cost_no_request_and_no_character(environment: dict[str, str]) -> None:
    """One of three after the other, under load of all kinds from clients that never repeat a request by themselves."""
    hurry = {"GRU_SERVE_DRAIN_S": "3", "GRU_SERVE_DRAIN_NOTICE_S": "1"}
    hurry |= {"GRU_SERVE_MAX_BATCH": "16", "GRU_SERVE_HTTP_THREADS": "36"}  # the last one has to do it all
    with replicas(3, environment | hurry) as servers, balancing([server.port for server in servers]) as balancer:
        is_over = False

        def complete() -> set[int]:
            """The statuses of all answers, twenty on each connection."""
            found = set()
            while not is_over:
                with closing(balancer.connect()) as connection:
                    for _ in range(20):
                        ask(connection, "POST", "/v1/completions", BODY)
                        response = connection.getresponse()
                        response.read()
                        found.add(response.status)
            return found

        def feed(name: str) -> str:
            with Client(f"http://127.0.0.1:{balancer.port}", retry_s=0) as client:
                session = client.create("", id=name)
                while not is_over:
                    session.feed("ab")
                return session.text()

        def stream(name: str) -> str:
            """What came of a text that would go on for very long."""
            with Client(f"http://127.0.0.1:{balancer.port}") as client:
                pieces, text = client.create("ROMEO:", seed=7, id=name).generate(9_000_000), ""
                while not is_over:
                    text += next(pieces)
                pieces.close()
                return text

        with ThreadPoolExecutor(9) as pool:
            answers = [pool.submit(complete) for _ in range(2)]
            fed = [pool.submit(feed, f"fed{number}") for number in range(3)]
            streams = [pool.submit(stream, f"streamed{number}") for number in range(4)]
            try:
                for number in (1, 2):
                    servers[number - 1].process.send_signal(signal.SIGTERM)
                    assert servers[number - 1].process.wait(60) == 0
            finally:
                is_over = True
            assert set().union(*(each.result(60) for each in answers)) == {200}
            assert {part for each in fed for part in each.result(60).split("ab")} == {""}
            texts = sorted((each.result(60) for each in streams), key=len)
        with Client(f"http://127.0.0.1:{servers[2].port}") as direct:
            whole = "".join(direct.create("ROMEO:", seed=7).generate(len(texts[-1])))
        assert all(text and whole.startswith(text) for text in texts)
        endings = [line["ending"] for server in servers for line in server.logged("session stream ended")]
        assert "reconnect" in endings

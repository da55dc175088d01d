"""Replicas behind the real balancer with the shipped configuration: which replica answers, and what clients receive."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.balancer import CONFIGURATION, Balancer, balancing, kill, replicas, served_by
from tests.harness.name_server import name_server
from tests.harness.programs import free_port, has_ipv6, program
from tests.harness.redis_process import redis_process
from tests.harness.server import BODY, ENDLESS, Server, ask
from tests.harness.wait import wait_until

NUM_THREADS = 24  # of a replica: enough for four texts that run and four that wait


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


def answer(balancer: Balancer, request: bytes) -> tuple[int, str, str | None]:
    """Send raw bytes; return status, error code and Retry-After of the answer."""
    connection = socket.create_connection(("127.0.0.1", balancer.port), timeout=30)
    with connection, closing(HTTPResponse(connection)) as response:
        connection.sendall(request)
        response.begin()
        assert response.headers["Content-Type"] == "application/json"
        error = json.loads(response.read())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status, error["code"], response.headers["Retry-After"]


def test_configuration__is_valid_and_has_no_warnings() -> None:
    command = [program("haproxy"), "-c", "-f", str(CONFIGURATION)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result
    assert "WARNING" not in result.stdout + result.stderr


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("bind", [":::{port}", "[::]:{port}", "127.0.0.1:{port},::1:{port}"])
def test_address__may_be_all_of_ipv6_and_then_also_answers_ipv4(bind: str) -> None:
    """As docs/operations.md advises for clusters that have only IPv6. No replica is there, so the balancer answers."""
    port = free_port()
    environment = {"LB_BIND": bind.format(port=port), "LB_METRICS_BIND": f"127.0.0.1:{free_port()}"}
    command = [program("haproxy"), "-W", "-db", "-f", str(CONFIGURATION)]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL) as process:
        try:
            for host in ("127.0.0.1", "::1"):

                def is_down(host: str = host) -> bool:
                    assert process.poll() is None
                    with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
                        try:
                            connection.request("GET", "/v1/models")
                            return connection.getresponse().status == 503
                        except OSError:  # it does not listen yet
                            return False

                wait_until(is_down)
        finally:
            process.terminate()


def test_routing__a_session_stays_on_one_replica_and_sessions_use_all(balancer: Balancer) -> None:
    servers = set()
    for number in range(24):
        path = f"/v1/sessions/s{number}"
        calls: list[tuple[str, str, object]] = [
            ("PUT", path, {"text": "ROMEO:"}),
            ("POST", f"{path}/feed", {"text": "a"}),
            ("GET", path, None),
        ]
        calls += [("POST", f"{path}/generate", {"max_tokens": 5}), ("GET", f"{path}/text?to=3", None)]
        # No other spelling of the path leads to the session, so none can lead to another replica.
        for other in (f"/v1/sessions/%73{number}", f"/v1/%73essions/s{number}", f"/v1/sessions%2Fs{number}"):
            assert balancer.call("GET", other)[0] == 404
        served = {served_by(balancer, *call) for call in calls}
        assert len(served) == 1, served
        servers |= served
    assert servers == {"sessions/app1", "sessions/app2", "sessions/app3"}


def test_routing__other_requests_go_to_the_least_loaded_replica(balancer: Balancer) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(balancer.open(ENDLESS))
            assert connection.recv(1)
        busy = {served_by(balancer, "POST", "/v1/completions", BODY) for _ in range(6)}
    assert busy <= {f"completions/app{number}" for number in (1, 2, 3)}
    assert len(busy) == 3
    assert served_by(balancer, "POST", "/v1/sessions", {}).startswith("any_session/")


class TwoPartReplica(ThreadingHTTPServer):
    """A replica whose streams send a first event, and the second one only when `may_end` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TwoPartHandler)
        self.may_end = threading.Event()


class _TwoPartHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: TwoPartReplica

    def do_GET(self) -> None:
        """Pass the balancer's check."""
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        """Send the stream, framed as the real server frames it."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"d\r\ndata: first\n\n\r\n")
        self.server.may_end.wait(30)
        self.wfile.write(b"e\r\ndata: second\n\n\r\n0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's parameter
        """Print nothing."""


def test_streams__reach_the_client_event_by_event() -> None:
    """The stream cannot go on before its first event has arrived: a balancer that buffers it never delivers that."""
    with TwoPartReplica() as replica, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(replica.serve_forever, 0.05)
        try:
            with balancing([replica.server_address[1]]) as balancer, closing(balancer.connect()) as connection:
                connection.timeout = 5
                ask(connection, "POST", "/v1/completions", {})
                response = connection.getresponse()
                assert response.readline() == b"data: first\n"
                replica.may_end.set()
                assert response.read() == b"\ndata: second\n\n"
        finally:
            replica.may_end.set()
            replica.shutdown()
            serving.result(30)


def test_reload_and_stop__let_streams_end() -> None:
    """SIGUSR2 starts a worker with the new configuration, which takes new requests at once; SIGUSR1 ends the balancer.

    A worker that has got either signal ends after its streams, and a balancer that stops refuses new connections.
    """
    with TwoPartReplica() as replica, ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        serving = pool.submit(replica.serve_forever, 0.05)
        stack.callback(serving.result, 30)
        stack.callback(replica.shutdown)
        stack.callback(replica.may_end.set)
        balancer = stack.enter_context(balancing([replica.server_address[1]]))
        connections = []

        def begun() -> HTTPResponse:
            """Return a stream whose first event has arrived."""
            connections.append(stack.enter_context(closing(balancer.connect())))
            ask(connections[-1], "POST", "/v1/completions", {})
            response = connections[-1].getresponse()
            assert response.readline() == b"data: first\n"
            return response

        def refuses() -> bool:
            try:
                balancer.call("GET", "/v1/models")
            except OSError:
                return True
            return False

        streams = [begun()]
        balancer.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: sum("Loading success" in line for line in list(balancer.log)) == 2)
        streams.append(begun())
        balancer.process.send_signal(signal.SIGUSR1)
        wait_until(refuses)
        replica.may_end.set()
        assert [stream.read() for stream in streams] == [b"\ndata: second\n\n"] * 2
        for connection in connections:  # on which HAProxy would wait for another request
            connection.close()
        assert balancer.process.wait(30) == 0


@pytest.mark.parametrize(
    "path", ["/metrics", "//metrics", "/%6detrics", "/metrics/", "/metrics?a=b", "/admin/reload", "/%61dmin/x"]
)
def test_internal_routes__can_not_be_reached(balancer: Balancer, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    assert answer(balancer, request) == (404, "not_found", None)
    request = f"GET http://127.0.0.1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    assert answer(balancer, request) == (404, "not_found", None)


def logged_by_one(servers: list[Server], request_id: str) -> bool:
    """Wait until a request is in the log of a server; return whether that is one line."""

    def num_lines() -> int:
        return sum(f'"{request_id}"' in line for server in servers for line in list(server.log))

    wait_until(lambda: num_lines() > 0)
    return num_lines() == 1


def test_request_id__is_the_same_in_all_logs_and_the_answer(balancer: Balancer, servers: list[Server]) -> None:
    for given, is_accepted in (("my-request.7", True), ("has { and spaces", False), (None, False)):
        with closing(balancer.connect()) as connection:
            connection.request("GET", "/v1/models", headers={"X-Request-Id": given} if given else {})
            response = connection.getresponse()
            response.read()
        request_id = response.headers["X-Request-Id"]
        assert (request_id == given) == is_accepted
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id)
        wait_until(lambda request_id=request_id: request_id in balancer.requests())  # type: ignore[misc]
        assert logged_by_one(servers, request_id)


def test_log__has_no_session_id(balancer: Balancer) -> None:
    assert served_by(balancer, "PUT", "/v1/sessions/a-secret-name", {})
    assert "a-secret-name" not in "".join(balancer.log)
    assert [line["route"] for line in balancer.requests().values()].count("session") > 0


def test_errors__of_the_balancer_have_the_shape_of_the_servers() -> None:
    with balancing([free_port()], timeout_http__request="300ms", timeout_queue="100ms") as alone:
        for path in ("/v1/completions", "/v1/sessions", "/v1/sessions/a"):
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            assert answer(alone, request) == (503, "not_ready", "1")
        slow_body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        assert answer(alone, slow_body) == (408, "incomplete_body", None)


def test_reconnect__of_a_browser_waits_while_no_server_is_ready() -> None:
    """An EventSource gives up at any status but 200. Its first connection, and other clients, get the error."""
    browser = "Accept: text/event-stream\r\n"
    with balancing([free_port()], timeout_queue="100ms") as alone:
        for headers, status in ((browser + "Last-Event-ID: 7\r\n", 200), (browser, 503), ("Last-Event-ID: 7\r\n", 503)):
            request = f"GET /v1/sessions/a/generate HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode()
            with socket.create_connection(("127.0.0.1", alone.port), timeout=30) as connection:
                connection.sendall(request)
                with closing(HTTPResponse(connection)) as response:
                    response.begin()
                    kind = response.headers["Content-Type"]
                    assert (response.status, kind == "text/event-stream") == (status, status == 200)
                    assert b"data:" not in response.read()


def test_errors__of_malformed_http_are_haproxys_own() -> None:
    """HAProxy answers them before it has a request, and its text for them can't be configured."""
    with balancing([free_port()], timeout_http__request="300ms") as alone:
        for request, status in ((b"GET / HTTP/1.1\r\nHost\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHo", 408)):
            with socket.create_connection(("127.0.0.1", alone.port), timeout=30) as connection:
                connection.sendall(request)
                assert connection.recv(100).startswith(b"HTTP/1.1 %d " % status)


def test_slow_senders__never_reach_a_replica(servers: list[Server]) -> None:
    """Ten times as many clients as a replica has threads; half of them stop in the head, half in the body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with balancing([servers[0].port]) as balancer, ExitStack() as stack:
        files = len(list((servers[0].worker / "fd").iterdir()))
        for number in range(10 * NUM_THREADS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", balancer.port)))
            connection.sendall(head + (b"Content-Length: 100\r\n\r\n{" if number % 2 else b"X-Slow: "))
        for _ in range(20):
            assert len(balancer.text()) == 50
        assert len(list((servers[0].worker / "fd").iterdir())) < files + NUM_THREADS


def test_killed_replica__costs_no_request_and_no_character(environment: dict[str, str]) -> None:
    """It dies in the middle of a stream. Requests that arrive afterwards reach the other replicas at once."""
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


def test_draining_replicas__cost_no_request_and_no_character(environment: dict[str, str]) -> None:
    """Two of three replicas drain in turn, under load of every kind from clients that never retry by themselves."""
    hurry = {"GRU_SERVE_DRAIN_S": "3", "GRU_SERVE_DRAIN_NOTICE_S": "1"}
    hurry |= {"GRU_SERVE_MAX_BATCH": "16", "GRU_SERVE_HTTP_THREADS": "36"}  # the last one gets the whole load
    with replicas(3, environment | hurry) as servers, balancing([server.port for server in servers]) as balancer:
        is_over = False

        def complete() -> set[int]:
            """Return the statuses of all answers. A connection is used twenty times."""
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
            """Return what has arrived of a very long text when the load ends."""
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
            for each in fed:
                text = each.result(60)
                assert text == "ab" * (len(text) // 2) != ""
            texts = sorted((each.result(60) for each in streams), key=len)
        with Client(f"http://127.0.0.1:{servers[2].port}") as direct:
            whole = "".join(direct.create("ROMEO:", seed=7).generate(len(texts[-1])))
        assert all(text and whole.startswith(text) for text in texts)

        def endings() -> list[str]:
            return [line["ending"] for server in servers for line in server.logged("session stream ended")]

        wait_until(lambda: "reconnect" in endings())


@pytest.mark.parametrize("addresses", [["::1", "127.0.0.1"], ["127.0.0.1"]])
def test_replicas__are_reached_over_ipv4_where_names_have_addresses_of_both_kinds(
    servers: list[Server], addresses: list[str]
) -> None:
    """Docker's name server answers with both. Replicas listen on IPv4 only, unless GRU_SERVE_HOST says otherwise."""
    with name_server(addresses) as port, balancing([servers[0].port], port) as balancer:
        assert balancer.call("POST", "/v1/completions", BODY)[0] == 200

"""Pages of other origins, strangers without a key, and clients of a proxy, against the real server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from service.api_keys import new_key
from service.store.model_store import ModelStore
from tests.harness.balancer import balancing
from tests.harness.server import BODY, SERVE, Endpoint, Server, serving

KEY, ENTRY = new_key("alice")
FRIEND = "https://friend.example"
STARTS = 30  # that the key may make


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}


@pytest.fixture(scope="module")
def closed(environment: dict[str, str]) -> Iterator[Server]:
    """A server with a key and a rate limit, which the pages of two other origins may call."""
    settings = {
        "GRU_SERVE_API_KEYS": ENTRY,
        "GRU_SERVE_ALLOWED_ORIGINS": f"{FRIEND}, http://localhost:3000",
        "GRU_SERVE_RATE_LIMIT": f"{STARTS}/day",
    }
    with serving(SERVE, environment | settings) as server:
        yield server


class Response:
    """The answer to one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.data = response.status, response.headers, response.read()

    @property
    def code(self) -> str:
        """The code of an error of the service."""
        code: str = json.loads(self.data)["error"]["code"]
        return code


def send(
    server: Endpoint,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: object = None,
    source: str = "127.0.0.1",
) -> Response:
    """Send one request on a new connection from an address of this machine."""
    data = json.dumps(body) if body is not None else None
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30, source_address=(source, 0))
    with closing(connection):
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        return Response(connection.getresponse())


def preflight(server: Server, path: str, origin: str, method: str, names: str = "authorization") -> Response:
    """Ask as a browser does whether a page of an origin may send a request."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
    return send(server, "OPTIONS", path, headers)


def words(header: str) -> set[str]:
    """The names in a header that lists names, in lower case."""
    return {word.strip().lower() for word in header.split(",")}


# Pages of other origins


@pytest.mark.parametrize("origin", [FRIEND, "http://localhost:3000"])
def test_preflight__of_an_allowed_origin_needs_no_key_and_never_counts(closed: Server, origin: str) -> None:
    for _ in range(STARTS):
        answer = preflight(closed, "/v1/completions", origin, "POST", "authorization,content-type")
        assert (answer.status, answer.data) == (204, b"")
    for method, path in (("DELETE", "/v1/sessions/a"), ("PUT", "/v1/sessions/a"), ("POST", "/nope")):
        names = "authorization,content-type,last-event-id,x-request-id,x-stainless-os,X-Stainless-Retry-Count"
        answer = preflight(closed, path, origin, method, names)
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert {"get", "head", "post", "put", "delete"} <= words(answer.headers["Access-Control-Allow-Methods"])
        assert words(names) <= words(answer.headers["Access-Control-Allow-Headers"])
        assert int(answer.headers["Access-Control-Max-Age"]) >= 600
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert words(answer.headers["Vary"]) >= {"origin"}


def test_preflight__allows_no_header_that_a_proxy_sets(closed: Server) -> None:
    answer = preflight(closed, "/v1/completions", FRIEND, "POST", "x-forwarded-for,cookie,x-stainless-\u00e9")
    allowed = words(answer.headers["Access-Control-Allow-Headers"])
    assert allowed == {"authorization", "content-type", "last-event-id", "x-request-id"}


@pytest.mark.parametrize("origin", ["https://foreign.example", "http://friend.example", f"{FRIEND}:444", f"{FRIEND}.a"])
def test_origin__that_is_not_in_the_setting_is_refused(closed: Server, origin: str) -> None:
    for answer in (
        preflight(closed, "/v1/completions", origin, "POST"),
        send(closed, "GET", "/v1/models", {"Origin": origin, "Authorization": f"Bearer {KEY}"}),
    ):
        assert (answer.status, answer.code) == (403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert words(answer.headers["Vary"]) >= {"origin"}


def test_answers__to_an_allowed_origin_can_be_read_by_its_page(closed: Server) -> None:
    """Whole answers, errors before and after the key was checked, streams, and answers without content."""
    page = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
    known = page | {"Authorization": f"Bearer {KEY}"}
    for answer, status in (
        (send(closed, "POST", "/v1/completions", known, BODY), 200),
        (send(closed, "POST", "/v1/completions", known, BODY | {"stream": True}), 200),
        (send(closed, "PUT", "/v1/sessions/cors", known, {"text": "ROMEO:"}), 201),
        (send(closed, "POST", "/v1/sessions/cors/generate", known, {"max_tokens": 5, "stream": True}), 200),
        (send(closed, "GET", "/v1/sessions/cors/generate", known | {"Last-Event-ID": "7"}), 200),
        (send(closed, "GET", "/v1/sessions", known), 200),
        (send(closed, "DELETE", "/v1/sessions/cors", known), 204),
        (send(closed, "POST", "/v1/completions", known, {"prompt": 7}), 400),
        (send(closed, "POST", "/v1/completions", page, BODY), 401),
        (send(closed, "GET", "/nope", known), 404),
        (send(closed, "GET", "/v1/completions", known), 405),
    ):
        assert answer.status == status, answer.data
        assert answer.headers["Access-Control-Allow-Origin"] == FRIEND
        assert words(answer.headers["Access-Control-Expose-Headers"]) >= {"retry-after", "x-request-id"}
        assert words(answer.headers["Vary"]) >= {"origin"}
    own = send(closed, "GET", "/v1/models", {"Authorization": f"Bearer {KEY}"})
    assert own.status == 200
    assert "Access-Control-Allow-Origin" not in own.headers
    assert words(own.headers["Vary"]) >= {"origin"}  # a cache must not give this answer to a page of another origin


def test_any_origin__can_be_allowed(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | {"GRU_SERVE_ALLOWED_ORIGINS": "*"}) as server:
        for origin in (FRIEND, "null"):
            answer = preflight(server, "/v1/completions", origin, "POST")
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, "*")
            answer = send(server, "POST", "/v1/completions", {"Origin": origin}, BODY)
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "*")
        rebound = send(server, "GET", "/v1/models", {"Origin": "http://rebound.example", "Host": "rebound.example"})
        assert (rebound.status, rebound.code) == (403, "host_not_allowed")


# Strangers without a key


def test_page__can_be_loaded_without_a_key(closed: Server) -> None:
    """A browser sends no key with a page or its parts. The page asks its user for one."""
    page = send(closed, "GET", "/")
    assert (page.status, page.headers.get_content_type()) == (200, "text/html")
    for part in ("page/page.js", "page/page.css"):
        assert f'"{part}"' in page.data.decode()
        assert send(closed, "GET", f"/{part}").status == 200
    assert send(closed, "GET", "/docs").status == 200
    for path in ("/v1/models", "/v1/sessions", "/openapi.json", "/metrics", "/nope"):
        assert send(closed, "GET", path).status == 401, path


@pytest.mark.parametrize(
    ("method", "path", "headers", "code"),
    [
        ("POST", "/v1/completions", {}, "invalid_api_key"),
        ("PUT", "/v1/sessions/a", {"Authorization": "Bearer wrong"}, "invalid_api_key"),
        ("POST", "/nope", {}, "invalid_api_key"),
        ("POST", "/v1/completions", {"Host": "rebound.example"}, "host_not_allowed"),
        ("POST", "/v1/completions", {"Origin": "http://foreign.example"}, "origin_not_allowed"),
        ("GET", "/healthz", {}, None),
        ("GET", "/", {}, None),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 100000000", "Transfer-Encoding: chunked"])
def test_body__of_a_stranger_is_not_waited_for(
    closed: Server, method: str, path: str, headers: dict[str, str], code: str | None, framing: str
) -> None:
    """The answer arrives although the body never does: a client may take 30 s to send one that is read."""
    head = {"Host": "localhost", "Content-Type": "application/json"} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with socket.create_connection(("127.0.0.1", closed.port), timeout=10) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\n{lines}{framing}\r\n\r\n".encode())
        with closing(http.client.HTTPResponse(connection, method=method)) as response:
            response.begin()
            data = response.read()
    assert (response.status, json.loads(data)["error"]["code"]) == (response.status, code) if code else data
    assert (response.status < 400) == (code is None)


def test_body__of_1_gb_without_a_key_is_not_read(closed: Server) -> None:
    """The answer arrives at once. The stranger then sends as fast as it can, until the server has had enough."""
    num_sent, began = 0, time.monotonic()
    with socket.create_connection(("127.0.0.1", closed.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 401")
        with contextlib.suppress(ConnectionError):  # until the server has closed the connection
            while num_sent < 1_000_000_000:
                num_sent += connection.send(b" " * 65_536)
    assert num_sent < 200_000_000  # the buffers of two sockets, and what the server discards
    assert time.monotonic() - began < 20
    assert send(closed, "GET", "/healthz").status == 200


def test_connection__survives_a_refused_request_with_a_small_body(closed: Server) -> None:
    with closing(closed.connect()) as connection:
        for status, key in ((401, "wrong"), (401, "wrong"), (200, KEY)):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request("POST", "/v1/completions", json.dumps(BODY), headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status
            assert response.headers["Connection"] == "keep-alive"


# Servers on other addresses, and clients of a proxy


def test_allowed_hosts__restrict_names_and_never_addresses(environment: dict[str, str]) -> None:
    """Kubernetes' probes, Prometheus and most balancers send the server's address, which no page can have as a name."""
    settings = {"GRU_SERVE_HOST": "0.0.0.0", "GRU_SERVE_ALLOWED_HOSTS": "api.example, *.gru.example"}
    with serving(SERVE, environment | settings) as server:
        for host in ("api.example", "API.example:8000", "eu.gru.example", "a.b.gru.example:1", "10.1.2.3:8000",
                     "[fd00::1]:8000", "localhost", "127.0.0.1"):  # fmt: skip
            for path in ("/metrics", "/v1/models", "/"):
                assert send(server, "GET", path, {"Host": host}).status == 200, (host, path)
        for host in ("rebound.example", "gru.example", "xgru.example", "api.example.rebound.example", "eu.api.example"):
            assert send(server, "GET", "/v1/models", {"Host": host}).code == "host_not_allowed", host
            assert send(server, "GET", "/healthz", {"Host": host}).status == 200


def test_server__on_another_address_answers_to_every_name_by_default(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | {"GRU_SERVE_HOST": "0.0.0.0"}) as server:
        for host in ("gru-serve", "my_app:8000", "rebound.example"):
            assert send(server, "GET", "/v1/models", {"Host": host}).status == 200
        foreign = {"Host": "gru-serve", "Origin": "http://foreign.example"}
        assert send(server, "POST", "/v1/completions", foreign, BODY).code == "origin_not_allowed"


def starts(server: Endpoint, source: str, headers: dict[str, str] | None = None, number: int = 3) -> list[int]:
    """Start work several times from an address; return the statuses."""
    return [send(server, "POST", "/v1/completions", headers, BODY, source).status for _ in range(number)]


@pytest.mark.parametrize("trusted", ["1", "127.0.0.1/32", "10.0.0.0/8,127.0.0.1"])
def test_trusted_proxy__limits_count_the_addresses_of_its_clients(environment: dict[str, str], trusted: str) -> None:
    """Through the shipped balancer, which drops what clients claim about their addresses."""
    settings = {
        "GRU_SERVE_TRUSTED_PROXIES": trusted,
        "GRU_SERVE_RATE_LIMIT": "2/day",
        "GRU_SERVE_ALLOWED_HOSTS": "a.example",
    }
    with serving(SERVE, environment | settings) as server, balancing([server.port]) as balancer:
        assert starts(balancer, "127.0.0.2") == [200, 200, 429]
        assert starts(balancer, "127.0.0.3", {"X-Forwarded-For": "127.0.0.2"}) == [200, 200, 429]
        for claim in ("198.51.100.7", "127.0.0.1", "198.51.100.7, 127.0.0.1", "unknown", ""):
            for name in ("X-Forwarded-For", "Forwarded", "X_Forwarded_For"):
                assert starts(balancer, "127.0.0.3", {name: claim}, 1) == [429], (name, claim)
        # The balancer passes on the client's Host, so a rebound name is refused behind it, too.
        assert send(balancer, "GET", "/v1/models", {"Host": "rebound.example"}).code == "host_not_allowed"
        assert send(balancer, "GET", "/v1/models", {"Host": "a.example"}).status == 200
        if trusted != "1":  # a number of proxies says nothing about who they are, but a network does
            assert starts(server, "127.0.0.4", {"X-Forwarded-For": "198.51.100.1"}) == [200, 200, 429]
            assert starts(server, "127.0.0.4", {"X-Forwarded-For": "198.51.100.2"}, 1) == [429]


def test_forwarded_addresses__count_for_nothing_by_default(environment: dict[str, str]) -> None:
    with serving(SERVE, environment | {"GRU_SERVE_RATE_LIMIT": "2/day"}) as server:
        claims: list[dict[str, Any]] = [{"X-Forwarded-For": f"198.51.100.{number}"} for number in range(3)]
        assert [starts(server, "127.0.0.1", claim, 1)[0] for claim in claims] == [200, 200, 429]

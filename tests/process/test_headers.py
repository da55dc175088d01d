"""What strangers on the web can do through headers and paths, against the real server without API keys.

tests/process/test_origins.py has pages of other origins, keys and proxies.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from service.store.model_store import ModelStore
from tests.harness.server import BODY, SERVE, Server, serving

STREAM = BODY | {"stream": True}


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    """A server on a loopback address with default settings, as on a developer's machine."""
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    with serving(SERVE, environment) as server:
        assert server.call("PUT", "/v1/sessions/mine", {"text": "ROMEO:"})[0] == 201
        yield server


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    status: int
    headers: http.client.HTTPMessage
    data: bytes

    @property
    def code(self) -> str | None:
        """The code of an error of the service; None for any other answer."""
        return self.error["code"] if self.status >= 400 else None

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has the shape of the service's errors."""
        assert self.headers["Content-Type"] == "application/json", self.data
        (error,) = json.loads(self.data).values()
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


def send(server: Server, method: str, path: str, headers: dict[str, str] | None = None, body: object = None) -> Answer:
    """Send one request with headers of its own on a new connection."""
    data = json.dumps(body) if body is not None else None
    with closing(server.connect()) as connection:
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


# Every kind of call that a page could make: reading, changing, administration, the page itself, an unknown path.
CALLS: list[tuple[str, str, object]] = [
    ("GET", "/v1/sessions/mine/text", None),
    ("DELETE", "/v1/sessions/mine", None),
    ("PUT", "/v1/sessions/other", {}),
    ("POST", "/v1/completions", BODY),
    ("POST", "/admin/reload", {}),
    ("OPTIONS", "/v1/completions", None),
    ("GET", "/metrics", None),
    ("GET", "/", None),
    ("GET", "/nope", None),
]


@pytest.mark.parametrize(
    "host",
    ["rebound.example", "rebound.example:8000", "localhost.rebound.example", "127.0.0.1.rebound.example", "10.0.0.1",
     "0.0.0.0", "[fd00::1]:80", "127.1", "localhost:80:90", "me@localhost", "localhost/", "[::1", "::1",
     "localhost\xb2"],
)  # fmt: skip
def test_host__on_a_loopback_address_has_to_be_a_loopback_name(server: Server, host: str) -> None:
    """A page whose name resolves to 127.0.0.1 sends its own name."""
    for method, path, body in CALLS:
        answer = send(server, method, path, {"Host": host}, body)
        assert (answer.status, answer.code) == (403, "host_not_allowed"), (method, path)
        assert "GRU_SERVE_ALLOWED_HOSTS" in answer.error["message"]
    # A proxy that replaces Host may send the client's in another header, possibly after one that the client sent.
    for others in (host, f"localhost, {host}", f"{host},localhost"):
        answer = send(server, "DELETE", "/v1/sessions/mine", {"X-Forwarded-Host": others})
        assert (answer.status, answer.code) == (403, "host_not_allowed")
    assert send(server, "GET", "/v1/sessions/mine").status == 200
    assert send(server, "GET", "/v1/sessions/other").status == 404


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:80", "127.0.0.1", "127.9.8.7:1", "[::1]", "[::1]:80", "[::FFFF:127.0.0.1]:80"]
)
def test_host__that_is_a_loopback_name_is_accepted(server: Server, host: str) -> None:
    assert send(server, "GET", "/v1/sessions/mine", {"Host": host}).status == 200


def test_host__may_be_missing_in_http_1_0_and_health_checks_may_send_any(server: Server) -> None:
    """HAProxy's checks are HTTP/1.0 without Host by default. Others send the address or a name of their own."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /v1/sessions/mine HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 200")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /v1/sessions/mine HTTP/1.1\r\n\r\n")  # RFC 9112 requires the refusal
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"HTTP/1.1 requires the header Host" in answer
    for host in ("replica", "10.1.2.3:8000", "[fd00::1]:8000"):
        for path in ("/healthz", "/readyz", "/readyz?unready=404"):
            assert send(server, "GET", path, {"Host": host}).status == 200


@pytest.mark.parametrize(
    "origin",
    ["http://foreign.example", "https://foreign.example", "http://localhost:1", "http://localhost", "null", "file://",
     "", "http://localhost:{port}.foreign.example", "http://a@localhost:{port}", "localhost:{port}",
     "http://127.0.0.1:{port}"],
)  # fmt: skip
def test_origin__that_is_foreign_is_refused(server: Server, origin: str) -> None:
    host = f"localhost:{server.port}"
    headers = {"Host": host, "Origin": origin.format(port=server.port)}
    for method, path, body in CALLS:
        answer = send(server, method, path, headers, body)
        assert (answer.status, answer.code) == (403, "origin_not_allowed"), (method, path)
        assert "GRU_SERVE_ALLOWED_ORIGINS" in answer.error["message"]
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert send(server, "GET", "/v1/sessions/mine").status == 200
    assert send(server, "GET", "/v1/sessions/other").status == 404


@pytest.mark.parametrize(
    ("host", "origin", "site"),
    [
        ("localhost:{port}", "http://localhost:{port}", None),
        ("LOCALHOST:{port}", "http://localhost:{port}", None),
        ("localhost", "https://localhost", None),  # a balancer that ends TLS
        ("localhost:443", "https://localhost", None),
        ("[::1]:{port}", "http://[::1]:{port}", "same-origin"),
        ("127.0.0.1:{port}", "https://gru.example", "same-origin"),  # a proxy that replaces Host
        ("127.0.0.1:{port}", None, "none"),
    ],
)
def test_origin__of_the_servers_own_page_is_accepted(
    server: Server, host: str, origin: str | None, site: str | None
) -> None:
    sent = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site}
    headers = {name: value.format(port=server.port) for name, value in sent.items() if value is not None}
    assert send(server, "POST", "/v1/completions", headers, BODY).status == 200
    assert send(server, "GET", "/v1/sessions/mine", headers).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "unheard-of"])
def test_request_of_another_site__without_an_origin_may_only_open_a_document(server: Server, site: str) -> None:
    """Browsers send no Origin for an image or a script of another site, nor for a link. A link to the page works."""
    image = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    for path in ("/v1/sessions/mine/generate", "/v1/models", "/"):
        assert send(server, "GET", path, image).code == "origin_not_allowed"
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert send(server, "GET", "/", link).status == 200
    assert send(server, "GET", "/docs", link).status == 200
    assert send(server, "POST", "/v1/completions", link, BODY).code == "origin_not_allowed"
    assert send(server, "GET", "/", link | {"Sec-Fetch-Dest": "iframe"}).code == "origin_not_allowed"


def test_cors__is_off_by_default(server: Server) -> None:
    headers = {"Origin": "http://foreign.example", "Access-Control-Request-Method": "POST"}
    for answer in (send(server, "OPTIONS", "/v1/completions", headers), send(server, "GET", "/v1/models")):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_list__without_keys_is_refused(server: Server) -> None:
    """It would show everybody's ids, and an id is all that protects a session."""
    for query in ("", "?limit=1000", "?after=a"):
        answer = send(server, "GET", f"/v1/sessions{query}")
        assert (answer.status, answer.code) == (403, "listing_needs_keys")
        assert "API keys" in answer.error["message"]
        assert b"mine" not in answer.data


@pytest.mark.parametrize("headers", [{}, {"X-Forwarded-For": "127.0.0.1"}, {"Host": "127.0.0.1"}])
def test_reload__without_keys_is_refused_even_from_this_machine(server: Server, headers: dict[str, str]) -> None:
    """Through a proxy on this machine that adds no header, every stranger's request looks like these."""
    answer = send(server, "POST", "/admin/reload", headers, {})
    assert (answer.status, answer.code) == (403, "forbidden")
    assert "GRU_SERVE_API_KEYS" in answer.error["message"]


@pytest.mark.parametrize("name", ["SCRIPT_NAME", "PATH_INFO", "X_FORWARDED_FOR", "REMOTE_ADDR"])
def test_header__can_not_replace_what_the_server_knows_of_a_request(server: Server, name: str) -> None:
    """A balancer refuses /admin by the path that it sees, so the path that the server sees has to be the same."""
    answer = send(server, "POST", "/a/admin/reload", {name: "/a"}, {})
    assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize(
    "name",
    ["abc%0A", "abc%0a%0a", "%0Aabc", "abc%0D", "abc%00", "%00", "abc%E2%80%A8", "abc%C2%85", "a%D9%A1", "%EF%BC%91",
     "%C3%A9", "abc%FF", "a%20", "%20a", "a%25", "-a", ".", "..", "~", "a" * 129],
)  # fmt: skip
def test_id__is_checked_whole(server: Server, name: str) -> None:
    for method, path, body in (
        ("PUT", f"/v1/sessions/{name}", {}),
        ("GET", f"/v1/sessions/{name}", None),
        ("POST", f"/v1/sessions/{name}/feed", {"text": "a"}),
    ):
        answer = send(server, method, path, body=body)
        assert (answer.status, answer.code, answer.error["param"]) == (400, "out_of_range", "id"), (method, path)


def test_fields__that_name_something_are_checked_whole(server: Server) -> None:
    for name in ("abc\n", "abc\x00", "\u0661", "a\u2028"):
        fork = send(server, "POST", "/v1/sessions/mine/fork", body={"id": name})
        assert (fork.status, fork.code, fork.error["param"]) == (400, "out_of_range", "id")
        inspected = send(server, "POST", "/v1/inspect", body={"session": name})
        assert (inspected.status, inspected.code, inspected.error["param"]) == (400, "out_of_range", "session")
        for model in (name, f"tiny@{name}", f"{name}@1", "tiny@1\n", "tiny\n"):
            answer = send(server, "POST", "/v1/completions", body=BODY | {"model": model})
            assert (answer.status, answer.code) == (404, "model_not_found"), model
    for path in ("/v1/models/tiny%0A", "/v1/models/tiny@1%0A", "/v1/models/tiny@%D9%A1", "/v1/models/tiny%00"):
        assert send(server, "GET", path).code == "model_not_found", path
    for number in ("%D9%A1", "1%0A", "1_0", "%2B1", "%EF%BC%91", "0x1"):
        answer = send(server, "GET", f"/v1/sessions/mine/text?from={number}")
        assert (answer.status, answer.error["param"]) == (400, "from"), number
    for choice in ("1", "True", "yes", "", "true%0A"):
        answer = send(server, "GET", f"/v1/sessions/mine/generate?take_over={choice}")
        assert (answer.status, answer.error["param"]) == (400, "take_over"), choice
    assert send(server, "GET", "/v1/sessions/mine/generate?take_over=false").code == "no_run"
    for number in ("\xb2", "1_0", "+1", "-1", "1.0", "0x1"):
        answer = send(server, "GET", "/v1/sessions/mine/generate", {"Last-Event-ID": number})
        assert (answer.status, answer.error["param"]) == (400, "Last-Event-ID"), number


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1//completions", 404, "not_found"),
        ("GET", "//v1/models", 404, "not_found"),
        ("POST", "//admin/reload", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("GET", "/v1/../v1/models", 404, "not_found"),
        ("GET", "/v1/./models", 404, "not_found"),
        ("GET", "/v1/%2e%2e/metrics", 404, "not_found"),
        ("GET", "/v1/models;a=b", 404, "not_found"),
        ("GET", "/V1/models", 404, "not_found"),
        ("GET", "/page/../page.html", 404, "not_found"),
        ("GET", "/page/%2e%2e/%2e%2e/app.py", 404, "not_found"),
        ("GET", "/page//page.css", 404, "not_found"),
        ("GET", "/docs/", 404, "not_found"),
        ("GET", "//foreign.example/..", 404, "not_found"),
        ("GET", "/%0A", 404, "not_found"),
        ("OPTIONS", "*", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PATCH", "/v1/sessions/mine", 405, "method_not_allowed"),
        ("BREW", "/v1/completions", 405, "method_not_allowed"),
        ("TRACE", "/", 405, "method_not_allowed"),
    ],
)
def test_path_and_method__without_a_route_get_an_error_of_our_shape(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    """Nothing redirects: a redirect of a POST would be repeated, in plain HTTP if the balancer ends TLS."""
    answer = send(server, method, path)
    assert (answer.status, answer.code) == (status, code)
    assert "Location" not in answer.headers
    assert ("Allow" in answer.headers) == (status == 405)
    assert answer.headers["X-Request-Id"]


def test_head_and_options__say_what_a_route_allows(server: Server) -> None:
    head = send(server, "HEAD", "/v1/models")
    assert (head.status, head.data) == (200, b"")
    for path in ("/v1/completions", "/v1/sessions/mine/generate"):
        assert (send(server, "HEAD", path).status, send(server, "HEAD", path).data) == (405, b"")
    options = send(server, "OPTIONS", "/v1/completions")
    assert (options.status, options.data) == (200, b"")
    assert set(options.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}


def test_stream__may_not_be_changed_by_a_proxy(server: Server) -> None:
    """A proxy that compresses a stream holds events back until it has enough of them."""
    run = {"max_tokens": 5, "stream": True}
    for method, path, body in (
        ("POST", "/v1/completions", STREAM),
        ("POST", "/v1/sessions/mine/generate", run),
        ("GET", "/v1/sessions/mine/generate", None),
    ):
        answer = send(server, method, path, body=body)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-cache, no-transform"

"""What pages of other sites can do in a real browser, whose names may even resolve to the server's address."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect

from service.api_keys import new_key
from tests.harness.browser import ENVIRONMENT, launched
from tests.harness.server import SERVE, Server, serving
from tests.harness.wait import wait_until

KEY, ENTRY = new_key("alice")
# What a page can send, and how much of the answer it can read.
FETCH = """async ([url, method, headers, body]) => {
  try {
    const response = await fetch(url, { method, headers, body });
    return [response.status, response.headers.get("X-Request-Id"), await response.text()];
  } catch (error) {
    return error.name;
  }
}"""
SEEN_IMAGE = "url => new Promise((resolve) => { const image = new Image(); image.onerror = resolve; image.src = url; })"


class _Blank(BaseHTTPRequestHandler):
    """Answers everything with an empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
        """Log nothing: requests would clutter the output of the tests."""


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """A browser for which every name below `example` is this machine's.

    Without the second flag it would not let the page of the test call this machine, which not every browser refuses.
    """
    flags = ["--host-resolver-rules=MAP *.example 127.0.0.1", "--disable-features=LocalNetworkAccessChecks"]
    with launched(playwright, *flags) as browser:
        yield browser


@pytest.fixture(scope="module")
def site_port() -> Iterator[int]:
    """The port of another server on this machine, which has an empty page under every name."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Blank) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.05,))
        thread.start()
        yield site.server_address[1]
        site.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(site_port: int) -> Iterator[Server]:
    settings = {"GRU_SERVE_API_KEYS": ENTRY, "GRU_SERVE_ALLOWED_ORIGINS": f"http://friend.example:{site_port}"}
    with serving(SERVE, ENVIRONMENT | settings) as server:
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def fetched(page: Page, server: Server, method: str, path: str, body: str | None = None, key: str | None = KEY) -> Any:
    """Let the page send a request; return status, request id and text of the answer, or the name of the exception."""
    headers = {"Content-Type": "application/json", "X-Request-Id": "mine"}
    headers |= {"Authorization": f"Bearer {key}"} if key is not None else {}
    return page.evaluate(FETCH, [f"http://127.0.0.1:{server.port}{path}", method, headers, body])


def test_page__whose_name_resolves_to_the_server_gets_nothing(page: Page, server: Server) -> None:
    for path in ("/", "/v1/models", "/page/page.js"):
        response = page.goto(f"http://rebound.example:{server.port}{path}")
        assert response is not None
        assert response.status == 403
        assert response.json()["error"]["code"] == "host_not_allowed"
    # The page comes from its own server. Then its name resolves to ours, so for the browser both are one origin.
    page.route("**/own", lambda route: route.fulfill(content_type="text/html", body="<title>own</title>"))
    page.goto(f"http://rebound.example:{server.port}/own")
    for method, path, body in (("GET", "/v1/models", None), ("PUT", "/v1/sessions/a", "{}"), ("POST", "/nope", "{}")):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        status, _, text = page.evaluate(FETCH, [path, method, headers, body])
        assert (status, "host_not_allowed" in text) == (403, True)


def test_page__of_a_foreign_origin_can_read_nothing_and_start_nothing(
    page: Page, server: Server, site_port: int
) -> None:
    page.goto(f"http://foreign.example:{site_port}/")
    assert fetched(page, server, "GET", "/v1/models") == "TypeError"
    assert fetched(page, server, "PUT", "/v1/sessions/a", "{}") == "TypeError"
    page.evaluate(
        FETCH, [f"http://127.0.0.1:{server.port}/v1/completions", "POST", {"Content-Type": "text/plain"}, "{}"]
    )
    page.evaluate(SEEN_IMAGE, f"http://127.0.0.1:{server.port}/page/icon.svg")

    def answers() -> list[tuple[str, str, int]]:
        return [(line["method"], line["path"], line["status"]) for line in server.logged("request")]

    wait_until(lambda: {("POST", "/v1/completions", 403), ("GET", "/page/<path:asset>", 403)} <= set(answers()))
    statuses = answers()
    assert not [line for line in statuses if line[1].startswith("/v1") and line[2] != 403]


def test_page__of_a_foreign_origin_may_link_to_the_page(page: Page, server: Server, site_port: int) -> None:
    page.goto(f"http://foreign.example:{site_port}/")
    page.evaluate("url => { location.href = url; }", f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#key")).to_be_visible()  # it runs, and asks for a key


def test_page__of_an_allowed_origin_can_use_the_server(page: Page, server: Server, site_port: int) -> None:
    page.goto(f"http://friend.example:{site_port}/")
    status, request_id, text = fetched(page, server, "PUT", "/v1/sessions/ours", '{"text": "ROMEO:"}')
    assert (status, request_id) == (201, "mine"), text
    body = '{"max_tokens": 20, "stream": true}'
    status, _, text = fetched(page, server, "POST", "/v1/sessions/ours/generate", body)
    assert status == 200
    assert text.count("event: done") == 1
    status, request_id, text = fetched(page, server, "POST", "/v1/completions", "{}", key=None)
    assert (status, request_id) == (401, "mine"), text
    assert fetched(page, server, "DELETE", "/v1/sessions/ours")[0] == 204

"""The page asks for an API key if the server requires one, and stores it only until the tab is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Browser, expect

from service.api_keys import new_key
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.server import SERVE, Server, serving

KEY, ENTRY = new_key("alice")
BLOCK_STORAGE = """for (const name of ["sessionStorage", "localStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("blocked", "SecurityError"); } });
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(SERVE, ENVIRONMENT | {"GRU_SERVE_API_KEYS": ENTRY}) as server:
        yield server


def test_key__is_asked_for_and_stored_for_the_tab_only(open_page: OpenPage, server: Server) -> None:
    screen = open_page(is_ready=False)
    dialog = screen.page.locator("#key")
    expect(dialog).to_be_visible()
    screen.page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    first_reason = screen.page.inner_text("#key-reason")
    assert first_reason
    screen.page.fill("#key input", "gru-wrong")
    screen.page.keyboard.press("Enter")
    expect(screen.page.locator("#key-reason")).not_to_have_text(first_reason)
    expect(screen.page.locator("#key-reason")).not_to_be_empty()
    expect(dialog).to_be_visible()
    screen.page.fill("#key input", KEY)
    screen.page.click("#key button")
    screen.wait_until_ready()
    expect(dialog).to_be_hidden()
    screen.type("ROMEO:")
    screen.generate(max_tokens=20, seed=1)
    assert len(screen.text) == 26
    assert screen.session_id
    screen.page.reload()
    screen.wait_until_ready()
    assert len(screen.text) == 26
    expect(dialog).to_be_hidden()
    assert screen.page.evaluate("() => sessionStorage.getItem('gru-serve.key')") == KEY
    assert screen.page.evaluate("() => localStorage.length") == 0
    assert screen.page.context.cookies() == []
    assert server.log
    assert KEY not in "".join(server.log)
    other_tab = screen.page.context.new_page()
    other_tab.goto(screen.url)
    expect(other_tab.locator("#key")).to_be_visible()


def test_page__works_where_the_browser_blocks_storage(open_page: OpenPage) -> None:
    """Every access throws then. The page has the key and the text until it is left."""
    screen = open_page(is_ready=False)
    screen.page.add_init_script(BLOCK_STORAGE)
    for _ in range(2):
        screen.page.reload()
        expect(screen.page.locator("#key")).to_be_visible()
        screen.page.fill("#key input", KEY)
        screen.page.keyboard.press("Enter")
        screen.wait_until_ready()
        expect(screen.page.locator("#key")).to_be_hidden()
        screen.type("ROMEO:")
        screen.generate(max_tokens=20, seed=1)
        assert len(screen.text) == 26
        screen.click_char(10)
        screen.page.click(".column.active .fork")
        expect(screen.page.locator(".column")).to_have_count(2)
        expect(screen.page.locator("#trouble")).to_have_text("")


@pytest.mark.parametrize("blocked", [False, True], ids=["stored", "storage blocked"])
def test_docs__asks_for_a_key_and_calls_routes_with_it(browser: Browser, server: Server, blocked: bool) -> None:
    url = f"http://127.0.0.1:{server.port}"
    with closing(browser.new_context()) as context:
        page = context.new_page()
        if blocked:
            page.add_init_script(BLOCK_STORAGE)
        page.goto(f"{url}/docs")
        expect(page.locator("#key p")).to_have_text("This server requires an API key.")
        for key, reason in (
            ("gru-wrong", "The server does not know this API key."),
            ("漢", "The server does not know"),
        ):
            page.fill("#key input", key)
            page.click("#key button")
            expect(page.locator("#key p")).to_contain_text(reason)
        page.fill("#key input", f" {KEY} ")
        page.click("#key button")
        expect(page.locator("#operations-models-models_index")).to_be_visible()
        expect(page.locator("#key")).to_be_hidden()
        page.click("#operations-models-models_index")
        page.click("#operations-models-models_index .try-out button")
        page.click("#operations-models-models_index .execute")
        answer = page.locator("#operations-models-models_index .live-responses-table .response-col_status")
        expect(answer.last).to_have_text("200")
        page.reload()
        expect(page.locator("#key" if blocked else "#operations-models-models_index")).to_be_visible()


def test_docs__uses_the_key_that_the_page_has(open_page: OpenPage) -> None:
    screen = open_page(is_ready=False)
    screen.page.fill("#key input", KEY)
    screen.page.click("#key button")
    screen.wait_until_ready()
    screen.page.click("header a")
    expect(screen.page.locator("#operations-models-models_index")).to_be_visible()
    expect(screen.page.locator("#key")).to_be_hidden()

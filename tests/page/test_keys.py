"""Where the server asks for a key, so does the page, and keeps it no longer than the tab."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from service.api_keys import new_key
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.server import SERVE, Server, serving

KEY, ENTRY = new_key("alice")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(SERVE, ENVIRONMENT | {"GRU_SERVE_API_KEYS": ENTRY}) as server:
        yield server


def test_the_page_asks_for_a_key_and_keeps_it_for_the_tab(open_page: OpenPage, server: Server) -> None:
    screen = open_page(is_ready=False)
    dialog = screen.page.locator("#key")
    expect(dialog).to_be_visible()
    screen.page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    screen.page.fill("#key input", "gru-wrong")
    screen.page.keyboard.press("Enter")
    expect(screen.page.locator("#key-said")).to_contain_text("not known here")
    expect(dialog).to_be_visible()
    screen.page.fill("#key input", KEY)
    screen.page.click("#key button")
    screen.is_ready()
    expect(dialog).to_be_hidden()
    screen.type("ROMEO:")
    screen.go_on(max_tokens=20, seed=1)
    assert len(screen.text) == 26
    assert screen.session_id
    screen.page.reload()
    screen.is_ready()
    assert len(screen.text) == 26
    expect(dialog).to_be_hidden()
    kept = screen.page.evaluate(
        "() => [sessionStorage, localStorage].map(place => JSON.stringify(place).includes('gru-'))"
    )
    assert kept == [True, False]
    assert screen.page.context.cookies() == []
    assert KEY not in "".join(server.log)
    other = screen.page.context.new_page()
    other.goto(screen.url)
    expect(other.locator("#key")).to_be_visible()

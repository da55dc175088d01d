"""The page says what to do where its program can't be loaded or run."""

from __future__ import annotations

import pytest
from playwright.sync_api import Route, expect

from tests.harness.browser import OpenPage


def test_page__that_is_loaded_shows_no_advice(open_page: OpenPage) -> None:
    screen = open_page()
    expect(screen.page.locator("#not-loaded")).to_have_count(0)


@pytest.mark.parametrize("fault", ["blocked", "missing", "not a module", "an old browser"])
def test_page__without_its_program_says_what_to_do(open_page: OpenPage, fault: str) -> None:
    screen = open_page(is_ready=False)

    def answer(route: Route) -> None:
        if fault == "blocked":
            route.abort()
        elif fault == "missing":
            route.fulfill(status=404, content_type="application/json", body="{}")
        else:
            route.fulfill(content_type="text/javascript", body="<!doctype html>")

    if fault == "an old browser":
        screen.page.add_init_script("delete window.Highlight")
    else:
        screen.page.route("**/page/column.js", answer)
    screen.page.reload()
    advice = screen.page.locator("#not-loaded")
    # It appears 5 s after the page, unless the program has removed it. Here these pass at once.
    advice.evaluate("advice => advice.getAnimations().forEach(animation => animation.finish())")
    expect(advice).to_be_visible()
    expect(advice).to_contain_text("Reload the page. If that doesn't help")
    expect(advice).to_contain_text("Firefox 140")
    assert screen.page.locator("body.ready").count() == 0
    screen.problems.clear()  # the faults themselves


def test_page__without_javascript_says_so_and_nothing_else(open_page: OpenPage) -> None:
    screen = open_page(is_ready=False, java_script_enabled=False)
    advice = screen.page.locator("noscript p")
    expect(advice).to_be_visible()
    expect(advice).to_contain_text("allow it for this address, and reload the page")
    expect(screen.page.locator("#not-loaded")).to_be_hidden()

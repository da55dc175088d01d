"""The page for those who see it badly, use no mouse, or have a phone."""

from __future__ import annotations

import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.harness.browser import PHONE, OpenPage
from tests.harness.screen import Screen


def findings(screen: Screen) -> str:
    """What axe calls serious or critical, and where."""
    response = Axe().run(screen.page).response
    assert response["passes"]
    serious = [found for found in response["violations"] if found["impact"] in ("serious", "critical")]
    return json.dumps([(found["id"], [node["html"] for node in found["nodes"]]) for found in serious], indent=1)


@pytest.mark.parametrize("options", [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE])
def test_axe_finds_nothing_serious(open_page: OpenPage, options: dict[str, object]) -> None:
    screen = open_page(**options)
    assert findings(screen) == "[]"
    screen.type("ROMEO:")
    screen.go_on(max_tokens=200, seed=7)
    screen.click_char(30)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.page.keyboard.insert_text("ß")
    screen.page.fill("#unit", "181")
    expect(screen.page.locator("#ranking td button").first).to_be_visible()
    assert findings(screen) == "[]"
    screen.page.evaluate("() => document.getElementById('key').showModal()")
    assert findings(screen) == "[]"


def test_everything_is_reached_by_keyboard(open_page: OpenPage) -> None:
    screen = open_page()
    screen.page.keyboard.type("ROMEO:")
    screen.shows("ROMEO:")
    names = set()
    for _ in range(80):
        screen.page.keyboard.press("Tab")
        names.add(screen.page.evaluate("() => document.activeElement.id || document.activeElement.className"))
    for wanted in ("model", "go", "save", "open", "new", "play", "back", "forth", "speed", "unit", "close", "fork"):
        assert wanted in names, (wanted, names)
    # Going back without a mouse: to a place with the arrow keys, then Tab and Enter.
    screen.page.locator(".column textarea").focus()
    for _ in range(3):
        screen.page.keyboard.press("ArrowLeft")
    expect(screen.page.locator(".rewind")).to_be_enabled()
    screen.page.locator(".rewind").focus()
    screen.page.keyboard.press("Enter")
    screen.shows("ROM")
    expect(screen.page.locator(".column textarea")).to_be_focused()


def test_a_phone_needs_no_scrolling_sideways(open_page: OpenPage) -> None:
    screen = open_page(**PHONE)
    screen.page.tap(".text")
    screen.page.keyboard.insert_text("ROMEO:")
    screen.go_on(max_tokens=300, seed=7)
    width = screen.page.evaluate("() => document.documentElement.scrollWidth")
    assert width == 390
    for name in ("#go", "#model", "#play", "#state", "#unit", "#save"):
        box = screen.page.locator(name).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390, name

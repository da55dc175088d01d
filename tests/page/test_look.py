"""Accessibility: contrast and names of elements, use by keyboard alone, and the width of a phone."""

from __future__ import annotations

import itertools
import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.harness.browser import PHONE, OpenPage
from tests.harness.screen import Screen


def serious_violations(screen: Screen) -> str:
    """The violations that axe rates serious or critical, with the elements that cause them, as JSON."""
    response = Axe().run(screen.page).response
    assert response["passes"]
    serious = [violation for violation in response["violations"] if violation["impact"] in ("serious", "critical")]
    return json.dumps([(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in serious], indent=1)


@pytest.mark.parametrize("options", [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE])
def test_axe__finds_no_serious_violation(open_page: OpenPage, options: dict[str, object]) -> None:
    screen = open_page(**options)
    assert serious_violations(screen) == "[]"
    screen.type("ROMEO:")
    screen.generate(max_tokens=200, seed=7)
    screen.click_char(30)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.page.keyboard.insert_text("ß")
    screen.page.fill("#unit", "181")
    expect(screen.page.locator("#ranking td button").first).to_be_visible()
    assert serious_violations(screen) == "[]"
    screen.page.evaluate("() => document.getElementById('key').showModal()")
    assert serious_violations(screen) == "[]"


def test_keyboard__reaches_every_control(open_page: OpenPage) -> None:
    screen = open_page()
    screen.page.keyboard.type("ROMEO:")
    screen.shows("ROMEO:")
    names = set()
    for _ in range(80):
        screen.page.keyboard.press("Tab")
        names.add(
            screen.page.evaluate(
                "() => document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
    for name in (
        "model",
        "go",
        "save",
        "open",
        "new",
        "play",
        "back",
        "forward",
        "speed",
        "unit",
        "close",
        "fork",
        "max_tokens",
        "stop",
    ):
        assert name in names, (name, names)
    # Rewind without a mouse: move the cursor with the arrow keys, then press the focused button.
    screen.page.locator(".column textarea").focus()
    for _ in range(3):
        screen.page.keyboard.press("ArrowLeft")
    expect(screen.page.locator(".rewind")).to_be_enabled()
    screen.page.locator(".rewind").focus()
    screen.page.keyboard.press("Enter")
    screen.shows("ROM")
    expect(screen.page.locator(".column textarea")).to_be_focused()


def test_phone__needs_no_horizontal_scrolling(open_page: OpenPage) -> None:
    screen = open_page(**PHONE)
    screen.page.tap(".text")
    screen.page.keyboard.insert_text("ROMEO:")
    screen.generate(max_tokens=300, seed=7)
    width = screen.page.evaluate("() => document.documentElement.scrollWidth")
    assert width == 390
    for name in ("#go", "#model", "#play", "#state", "#unit", "#save"):
        box = screen.page.locator(name).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390, name


@pytest.mark.parametrize(("width", "height"), [(1360, 800), (1000, 560)])
def test_text__stays_in_the_window_beside_the_longer_network(open_page: OpenPage, width: int, height: int) -> None:
    screen = open_page(viewport={"width": width, "height": height})
    screen.type("ROMEO:")
    screen.generate(max_tokens=300, seed=7)
    screen.page.locator(".column textarea").focus()
    screen.page.keyboard.insert_text("ß")
    expect(screen.page.locator("#ranking td button").first).to_be_visible()
    for scroll in (0, 400, 100_000):
        screen.page.evaluate("top => scrollTo(0, top)", scroll)
        boxes = {name: screen.page.locator(name).bounding_box() for name in ("#writing", "main")}
        writing, main = boxes["#writing"], boxes["main"]
        assert writing
        assert main
        assert main["height"] > height
        assert writing["y"] == pytest.approx(max(8, main["y"] - 3), abs=1)
        assert writing["y"] + writing["height"] <= max(height, main["y"] + height)
    # Nothing overlaps: each part of the column ends before the next one begins.
    parts = (".title", ".text", ".unknown", ".place")
    tops = [screen.page.locator(f".column {part}").bounding_box() for part in parts]
    tops.append(screen.page.locator("#settings").bounding_box())
    for above, below in itertools.pairwise(tops):
        assert above
        assert below
        assert above["height"] > 20
        assert above["y"] + above["height"] <= below["y"] + 1

"""Takes the screenshots of the page for the docs: `python -m tests.page.screenshots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser

from tests.harness.browser import ENVIRONMENT, PHONE, chromium
from tests.harness.screen import Screen
from tests.harness.server import SERVE, serving

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
DESKTOP = {"viewport": {"width": 1360, "height": 1010}}


def draw(browser: Browser, url: str, name: str, options: dict[str, Any]) -> None:
    """Take a screenshot of two branches of a text, coloured by a unit, with the cursor on a character."""
    with browser.new_context(**options) as context:
        screen = Screen(context.new_page(), url).load()
        screen.type("ROMEO:")
        screen.generate(max_tokens=300, seed=7)
        screen.page.fill("#unit", "181")
        if "is_mobile" not in options:
            screen.click_char(63)
            screen.page.click(".column.active .fork")
            screen.wait_for("() => document.querySelectorAll('.column').length === 2")
            screen.generate(max_tokens=180, seed=21)
            screen.page.fill("#settings [name=max_tokens]", "300")
        screen.click_char(30)
        screen.wait_for("() => document.querySelectorAll('#bars .drawn').length === 1")
        assert screen.levels
        screen.page.evaluate("() => scrollTo(0, 0)")
        screen.page.screenshot(path=IMAGES / name)


def main() -> None:
    """Take the screenshots in light colours, in dark colours and at the width of a phone."""
    with chromium() as browser, serving(SERVE, ENVIRONMENT) as server:
        url = f"http://127.0.0.1:{server.port}"
        draw(browser, url, "page.png", {"color_scheme": "light"} | DESKTOP)
        draw(browser, url, "page-dark.png", {"color_scheme": "dark"} | DESKTOP)
        draw(browser, url, "page-phone.png", PHONE)


if __name__ == "__main__":
    main()

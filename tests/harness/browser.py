"""A real browser, and what its tests and the benchmark of the page open in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

from tests.harness.programs import program
from tests.harness.screen import Screen

# Chromium has no sandbox when it runs as root. The other flags keep it from calling its maker.
_FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
_FLAGS += ["--disable-sync", "--no-first-run"]
_STORE = Path(__file__).parents[2] / "model_store"
# The settings of a server of the shipped model.
ENVIRONMENT = {"GRU_SERVE_MODEL_STORE": str(_STORE), "GRU_SERVE_MODEL": "shakespeare", "GRU_SERVE_ENGINE_THREADS": "1"}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

OpenPage = Callable[..., Screen]  # the type of the fixture `open_page`


@contextmanager
def chromium() -> Iterator[Browser]:
    """Launch Debian's Chromium, or the program that the variable CHROMIUM names; close it with the block."""
    with sync_playwright() as playwright, launched(playwright) as browser:
        yield browser


@contextmanager
def launched(playwright: Playwright, *flags: str) -> Iterator[Browser]:
    """Launch the same with more flags, and close it with the block. A thread can have only one Playwright."""
    path = program(os.environ.get("CHROMIUM", "chromium"))
    browser = playwright.chromium.launch(executable_path=path, args=[*_FLAGS, *flags])
    try:
        yield browser
    finally:
        browser.close()

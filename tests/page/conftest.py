"""A real browser, and a server of the shipped model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from service.client import Client
from tests.page.screen import Screen
from tests.parts import program
from tests.serving import SERVE, Server, serving

# As root the browser has no sandbox of its own; the rest keeps it from looking for its maker.
FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
STORE = Path(__file__).parent.parent.parent / "model_store"
ENVIRONMENT = {"GRU_SERVE_MODEL_STORE": str(STORE), "GRU_SERVE_MODEL": "shakespeare", "GRU_SERVE_ENGINE_THREADS": "1"}

OpenPage = Callable[..., Screen]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or another that is installed."""
    path = program(os.environ.get("CHROMIUM", "chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(SERVE, ENVIRONMENT) as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[OpenPage]:
    """Opens the page, in a context of its own; what it should never have done fails the test."""
    screens: list[Screen] = []

    def opened(at: str = url, is_ready: bool = True, **options: Any) -> Screen:
        context = browser.new_context(**({"viewport": {"width": 1440, "height": 1000}} | options))
        screen = Screen(context.new_page(), at)
        screens.append(screen)
        screen.listen()
        if is_ready:
            screen.load()
        else:
            screen.page.goto(at + "/")
        return screen

    yield opened
    for screen in screens:
        screen.page.context.close()
    assert [problem for screen in screens for problem in screen.problems] == []

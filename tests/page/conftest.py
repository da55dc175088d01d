"""Fixtures: a real browser, a server of the shipped model, and the page opened in both."""

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

# Chromium refuses to run as root with its sandbox. The other flags stop requests to its maker's servers.
FLAGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
STORE = Path(__file__).parent.parent.parent / "model_store"
ENVIRONMENT = {"GRU_SERVE_MODEL_STORE": str(STORE), "GRU_SERVE_MODEL": "shakespeare", "GRU_SERVE_ENGINE_THREADS": "1"}

OpenPage = Callable[..., Screen]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium that the CHROMIUM variable names; by default Debian's."""
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
    """Return a function that opens the page in a new browser context. The test fails if a page had any problem."""
    screens: list[Screen] = []

    def open_in_new_context(at: str = url, is_ready: bool = True, **options: Any) -> Screen:
        context = browser.new_context(**({"viewport": {"width": 1440, "height": 1000}} | options))
        screen = Screen(context.new_page(), at)
        screens.append(screen)
        screen.listen()
        if is_ready:
            screen.load()
        else:
            screen.page.goto(at + "/")
        return screen

    yield open_in_new_context
    for screen in screens:
        screen.page.context.close()
    assert [problem for screen in screens for problem in screen.problems] == []

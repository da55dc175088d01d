"""Fixtures: a real browser, a server of the shipped model, and the page opened in both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.browser import ENVIRONMENT, OpenPage, launched
from tests.harness.models import publish_tiny
from tests.harness.screen import Screen
from tests.harness.server import SERVE, Server, serving

expect.set_options(timeout=30_000)  # the default of 5 s is too short beside other work


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """One browser for all tests of the page; each opens contexts of its own."""
    with launched(playwright) as browser:
        yield browser


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store with models of several shapes: `deep` has three layers, `poor` few characters."""
    store = ModelStore(tmp_path_factory.mktemp("models"))
    publish_tiny(store)
    publish_tiny(store, "deep", num_layers=3, num_units=24)
    publish_tiny(store, "poor", charset="ab c")
    return store


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """One server for all tests that don't bring their own."""
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
        context.set_default_timeout(60_000)
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

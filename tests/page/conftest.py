"""A real browser, and a server of the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from service.client import Client
from tests.harness.browser import ENVIRONMENT, OpenPage, chromium
from tests.harness.screen import Screen
from tests.harness.server import SERVE, Server, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a module."""
    with chromium() as browser:
        yield browser


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

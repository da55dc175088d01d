"""Failures of tests that use the compose file's containers say what these did."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, object, object]:
    """Add the containers' logs to the failure. Failures of `project` itself have them from `Containers.up`."""
    if "project" not in item.fixturenames:
        return (yield)
    with item.funcargs["containers"].explaining():
        return (yield)

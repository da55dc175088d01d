"""Failures of tests that use the compose file's containers say what these did."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.deploy.containers import Containers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, object, object]:
    """Add the containers' logs to the failure. Failures of `project` itself have them from `Containers.up`."""
    if "project" not in item.fixturenames:
        return (yield)
    containers = item.funcargs["containers"]
    assert isinstance(containers, Containers)
    with containers.explaining():
        return (yield)

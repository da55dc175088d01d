"""A clock that tests set by hand."""

from __future__ import annotations

import pytest

from tests.harness.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()

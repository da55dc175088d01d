"""A clock that tests set by hand."""

from __future__ import annotations

import pytest


class Clock:
    """Returns `now`, seconds since 1970, which changes only when a test changes it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()

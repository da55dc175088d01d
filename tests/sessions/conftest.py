"""A clock that tests set."""

from __future__ import annotations

import pytest


class Clock:
    """Seconds since 1970, as long as nobody changes them."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()

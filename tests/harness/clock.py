"""A clock that a test sets."""

from __future__ import annotations


class Clock:
    """Seconds since 1970. Time passes only when a test changes `now`."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

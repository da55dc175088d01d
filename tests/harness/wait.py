"""Waiting for something that another thread, process or machine does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Return as soon as the condition holds; fail if it does not hold within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.02)

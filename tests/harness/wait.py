"""Waiting for something that another thread, process or machine does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Return as soon as the condition holds; fail if it does not hold within `timeout_s`.

    The default is for a machine that stalls: a test that passes waits no longer because of it, and Sentinels, for
    example, do nothing for 30 s after a stall of 2 s.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.02)

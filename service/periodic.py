"""A thread that does something every few seconds.

May not: know what it does; it gets a function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class PeriodicThread:
    """Calls `work` every `interval_s` seconds on a daemon thread of its own, until it is closed.

    If `work` returns something true, there is more to do, and it is called again at once. It has to handle its own
    errors, because an exception that leaves it ends the thread.
    """

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._interval_s, self._work = interval_s, work
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. A call of `work` that has begun is finished first."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        has_more: object = False
        while not self._closing.wait(0 if has_more else self._interval_s):
            has_more = self._work()

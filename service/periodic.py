"""A thread that calls a function every few seconds.

This module may import nothing of this project: its users pass in the function that it calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_CLOSING_S = 3.0  # `work` may hang, for example in a network file system, and the process has to exit in time


class PeriodicThread:
    """Calls `work` every `interval_s` seconds on its own daemon thread, until it is closed.

    If `work` returns something true, it has more to do and is called again at once. It must handle its own errors: an
    exception that it raises ends the thread.
    """

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._interval_s, self._work = interval_s, work
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the current call of `work` if there is one. Waits for that, unless it hangs."""
        self._closing.set()
        self._thread.join(_CLOSING_S)

    def _run(self) -> None:
        has_more: object = False
        while not self._closing.wait(0 if has_more else self._interval_s):
            has_more = self._work()

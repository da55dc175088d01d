"""How much memory all open texts together may take: a budget that the engines of a process share."""

from __future__ import annotations

import threading


class MemoryBudget:
    """Counts bytes that are in use. Any number of threads may use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return self._num_bytes

    def take(self, num_bytes: int, *, regardless: bool = False) -> bool:
        """Count bytes as used; return False, and count nothing, if they are too many.

        What is larger than the whole budget is accepted while nothing else is in use, because waiting would not help.
        With `regardless`, everything is accepted.
        """
        with self._lock:
            if not regardless and self._num_bytes and self._num_bytes + num_bytes > self._max_bytes:
                return False
            self._num_bytes += num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """Count bytes as no longer used."""
        with self._lock:
            self._num_bytes -= num_bytes

"""What is due at which second."""

from __future__ import annotations

import math


class DueTimes:
    """Keys by the second at which they are due: each operation takes the same time however many there are.

    Not safe for several threads. Times are seconds since any moment.
    """

    def __init__(self, now: float) -> None:
        self._seconds: dict[int, set[str]] = {}
        self._next = math.floor(now)

    def add(self, key: str, at: float) -> None:
        """Note a key that is due at this time."""
        self._seconds.setdefault(self._second(at), set()).add(key)

    def remove(self, key: str, at: float) -> None:
        """Forget a key that was noted for this time."""
        keys = self._seconds[self._second(at)]
        keys.remove(key)
        if not keys:
            del self._seconds[self._second(at)]

    def due(self, now: float, limit: int) -> list[str]:
        """Up to `limit` keys whose second is over. They stay noted."""
        found: list[str] = []
        while self._next <= math.floor(now) and not found:
            found = [key for key, _ in zip(self._seconds.get(self._next, ()), range(limit), strict=False)]
            self._next += not found
        return found

    def _second(self, at: float) -> int:
        return max(self._next, math.ceil(at))

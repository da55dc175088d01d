"""How long this process knows that keys of Redis live which several sessions need."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

# A key is made to live this much longer than a session needs it. So while sessions are in use, the key's life is
# prolonged every five minutes, and not at every use.
_SPARE_S = 600.0
_MAX_KEYS = 200_000


class Lifetimes:
    """Remembers until when keys live at least, by this process's monotonic clock. Any number of threads may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_cleared = 0
        self._ends: OrderedDict[str, float] = OrderedDict()  # the latest noted last

    def extended_ms(self, ttl_s: float) -> int:
        """Return how long to let a key live, in milliseconds, that a session needs for `ttl_s`."""
        return round((ttl_s + _SPARE_S) * 1000)

    def suffices(self, key: str, ttl_s: float) -> bool:
        """Whether a key certainly lives as long as a session that was just used."""
        return self._ends.get(key, 0.0) >= time.monotonic() + ttl_s + _SPARE_S / 2

    def now(self) -> tuple[float, int]:
        """Return the moment before a key is made to live on, for `note`."""
        return time.monotonic(), self._num_cleared

    def note(self, key: str, ms: int, since: tuple[float, int]) -> None:
        """Note that a key was made to live this many milliseconds, unless `clear` was called since."""
        end = since[0] + ms / 1000
        with self._lock:
            if since[1] != self._num_cleared:
                return
            self._ends[key] = max(end, self._ends.pop(key, 0.0))
            if len(self._ends) > _MAX_KEYS:
                self._ends.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: another server may have lost what this one did."""
        with self._lock:
            self._ends.clear()
            self._num_cleared += 1

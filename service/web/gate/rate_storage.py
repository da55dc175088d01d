"""Counts the starts of clients in this process, for the rate limit."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from limits.storage import SlidingWindowCounterSupport, Storage

_MAX_KEYS = 100_000  # 20 MB


class ProcessStorage(Storage, SlidingWindowCounterSupport):
    """The storage of the library `limits` for a sliding window in the memory of one process.

    The library's own one has no limit on its keys, which strangers' addresses are part of, starts a thread that looks
    at all of them up to a hundred times a second, and follows steps of the wall clock. When this one is full, it
    forgets the key that was used least recently. Any number of threads may call.
    """

    STORAGE_SCHEME = ["process"]  # noqa: RUF012 - the base class has it so

    def __init__(
        self,
        uri: str | None = None,
        wrap_exceptions: bool = False,
        clock: Callable[[], float] = time.monotonic,
        **options: str,
    ) -> None:
        """`clock` returns monotonic seconds; the other arguments are those of every storage."""
        super().__init__(uri, wrap_exceptions=wrap_exceptions, **options)
        self._clock = clock
        self._lock = threading.Lock()
        # By key: the number of the last window with a count, that count, and that of the window before it.
        self._counts: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count `amount` if not more than `limit` are counted then in the last `expiry` seconds."""
        with self._lock:
            now = self._clock()
            current, previous = self._read(key, now, expiry)
            if int(previous * (1 - now / expiry % 1)) + current + amount > limit:
                return False
            self._counts[key] = int(now // expiry), current + amount, previous
            self._counts.move_to_end(key)
            if len(self._counts) > _MAX_KEYS:
                self._counts.popitem(last=False)
            return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return the count of the window before this one, its seconds left, and the same of this window."""
        with self._lock:
            now = self._clock()
            current, previous = self._read(key, now, expiry)
        left_s = (1 - now / expiry % 1) * expiry
        return previous, left_s if previous else 0.0, current, left_s + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:  # noqa: ARG002 - the library's signature
        """Forget a key."""
        self.clear(key)

    def clear(self, key: str) -> None:
        """Forget a key."""
        with self._lock:
            self._counts.pop(key, None)

    def reset(self) -> int:
        """Forget everything, and return how many keys there were."""
        with self._lock:
            num_keys = len(self._counts)
            self._counts.clear()
        return num_keys

    def check(self) -> bool:
        """Return that the storage works."""
        return True

    @property
    def base_exceptions(self) -> type[Exception]:
        """What this storage raises: nothing."""
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Other strategies need this."""
        raise NotImplementedError

    def get(self, key: str) -> int:
        """Other strategies need this."""
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        """Other strategies need this."""
        raise NotImplementedError

    def _read(self, key: str, now: float, expiry: int) -> tuple[int, int]:
        """Return the counts of this window and of the one before it. Needs the lock."""
        number, current, previous = self._counts.get(key, (0, 0, 0))
        age = int(now // expiry) - number
        return (current, previous) if age == 0 else (0, current) if age == 1 else (0, 0)

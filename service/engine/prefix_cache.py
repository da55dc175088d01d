"""A cache of states after texts. A prompt that begins with a cached text is only stepped from the end of that text."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict

from service.arrays import Float32

_MAX_PROBES = 64  # texts compared in one search: limits the cost of prompts made to slow it down


class PrefixCache:
    """Maps a text to the state after it, and evicts the least recently used. Safe for any number of threads.

    A state is a function of its text, so a hit changes nothing but the time.

    Args:
        max_bytes: limit of texts and states together. 0 turns the cache off.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_queried = 0  # characters of texts that were looked up
        self.num_hits = 0  # those of them that were part of a cached text
        self._states: OrderedDict[str, Float32] = OrderedDict()
        self._sorted: list[str] = []
        self._lock = threading.Lock()

    def longest(self, text: str) -> tuple[int, Float32 | None]:
        """Return the length of the longest cached beginning of a text, and the (L, H) state after it.

        Returns 0 and None if there is none. The caller must not write to the state.
        """
        with self._lock:
            prefix = self._longest_prefix(text)
            self.num_queried += len(text)
            if prefix is None:
                return 0, None
            self.num_hits += len(prefix)
            self._states.move_to_end(prefix)
            return len(prefix), self._states[prefix]

    def put(self, text: str, hidden: Float32) -> None:
        """Store the (L, H) state after a text. The array is not copied, so nobody may write to it afterwards."""
        size = _num_bytes(text, hidden)
        if not text or size > self._max_bytes:
            return
        with self._lock:
            if text in self._states:
                self._states.move_to_end(text)
                return
            self._states[text] = hidden
            bisect.insort(self._sorted, text)
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                oldest, state = self._states.popitem(last=False)
                del self._sorted[bisect.bisect_left(self._sorted, oldest)]
                self._num_bytes -= _num_bytes(oldest, state)

    @property
    def num_bytes(self) -> int:
        """Size of the cached texts and states."""
        return self._num_bytes

    def _longest_prefix(self, text: str) -> str | None:
        # A prefix of a text sorts before the text. So the last key that is not after the text either is a prefix of it,
        # or shares some first characters with it; in that case every cached prefix is a prefix of those characters too.
        for _ in range(_MAX_PROBES):
            index = bisect.bisect_right(self._sorted, text)
            if index == 0:
                return None
            candidate = self._sorted[index - 1]
            shared = _num_shared(candidate, text)
            if shared == len(candidate):
                return candidate
            text = text[:shared]
        return None


def _num_shared(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _num_bytes(text: str, hidden: Float32) -> int:
    return 2 * len(text) + hidden.nbytes + 200  # text: usually one byte a character; 200: overhead of the objects

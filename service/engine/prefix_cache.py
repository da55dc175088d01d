"""States after texts that were read before: a prompt that begins with one of them is stepped from there on."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict

from service.arrays import Float32

_MAX_PROBES = 64  # texts looked at in one search: a bound on what a hostile set of prompts can cost


class PrefixCache:
    """Text -> the state after it, the least recently used forgotten first. Safe for any number of threads.

    A state is a function of its text, so whether it comes from here or is stepped again changes no bit of anything.
    max_bytes: of texts and states together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_asked = self.num_known = 0  # characters that were looked up, and of them those that were known
        self._states: OrderedDict[str, Float32] = OrderedDict()
        self._sorted: list[str] = []
        self._lock = threading.Lock()

    def longest(self, text: str) -> tuple[int, Float32 | None]:
        """How many of a text's first characters are known, and the (L, H) state after them, not to be written to."""
        with self._lock:
            prefix = self._longest_prefix(text)
            self.num_asked += len(text)
            if prefix is None:
                return 0, None
            self.num_known += len(prefix)
            self._states.move_to_end(prefix)
            return len(prefix), self._states[prefix]

    def put(self, text: str, hidden: Float32) -> None:
        """Remember the (L, H) state after a text. It is kept as it is: nobody may write to it any more."""
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
        """Size of what is kept."""
        return self._num_bytes

    def _longest_prefix(self, text: str) -> str | None:
        # Every prefix of a text sorts before it, and so does everything between them. The last key up to the text is
        # a prefix, or shares only its first characters with it; then any prefix is one of those characters too.
        for _ in range(_MAX_PROBES):
            place = bisect.bisect_right(self._sorted, text)
            if place == 0:
                return None
            candidate = self._sorted[place - 1]
            shared = _num_shared(candidate, text)
            if shared == len(candidate):
                return candidate
            text = text[:shared]
        return None


def _num_shared(one: str, other: str) -> int:
    """How many first characters are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _num_bytes(text: str, hidden: Float32) -> int:
    return 2 * len(text) + hidden.nbytes + 200  # text: one byte a character, rarely more; 200: what holds it together

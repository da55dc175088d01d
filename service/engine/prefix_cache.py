"""A cache of states after texts. A prompt that begins with a cached text is only stepped from the end of that text."""

from __future__ import annotations

import bisect
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from service.arrays import Float32

_MAX_PROBES = 64  # texts compared in one search: limits the cost of prompts made to slow it down
_OBJECT_BYTES = 240  # of the array and the containers that an entry needs besides its numbers and its text


@dataclass(frozen=True, slots=True)
class CacheScope:
    """Whose texts these are. A search finds only texts of the same scope, so nobody learns what others have sent."""

    owner: str = ""  # the name of an API key
    salt: str = ""  # what the owner chose to separate its own texts further


NOBODY = CacheScope()


class PrefixCache:
    """Maps a text to the state after it, for each scope. Safe for any number of threads.

    A state is a function of its text, so a hit changes nothing but the time. When the cache is full, the owner with the
    most bytes loses the state that it used least recently: others can't push out an owner that has less than its share.

    Args:
        max_bytes: limit of texts and states together. 0 turns the cache off.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_queried = 0  # characters of texts that were looked up
        self.num_hits = 0  # those of them that were part of a cached text
        self._owners: dict[str, _OwnersStates] = {}
        self._lock = threading.Lock()

    def longest(self, scope: CacheScope, text: str) -> tuple[int, Float32 | None]:
        """Return the length of the longest cached beginning of a text, and the (L, H) state after it.

        Returns 0 and None if there is none. The caller must not write to the state.
        """
        with self._lock:
            self.num_queried += len(text)
            states = self._owners.get(scope.owner)
            prefix = _longest_prefix(states.sorted.get(scope.salt, []), text) if states is not None else None
            if states is None or prefix is None:
                return 0, None
            self.num_hits += len(prefix)
            states.by_use.move_to_end((scope.salt, prefix))
            return len(prefix), states.by_use[scope.salt, prefix]

    def put(self, scope: CacheScope, text: str, hidden: Float32) -> None:
        """Store the (L, H) state after a text. The array is not copied, so nobody may write to it afterwards."""
        size = _size(scope.salt, text, hidden)
        if not text or size > self._max_bytes:
            return
        with self._lock:
            states = self._owners.setdefault(scope.owner, _OwnersStates())
            key = scope.salt, text
            if key in states.by_use:
                states.by_use.move_to_end(key)
                return
            states.by_use[key] = hidden
            bisect.insort(states.sorted.setdefault(scope.salt, []), text)
            states.num_bytes += size
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                self._evict()

    @property
    def num_bytes(self) -> int:
        """Memory of the cached texts and states."""
        return self._num_bytes

    def _evict(self) -> None:
        owner, states = max(self._owners.items(), key=lambda item: item[1].num_bytes)
        (salt, text), hidden = states.by_use.popitem(last=False)
        texts = states.sorted[salt]
        del texts[bisect.bisect_left(texts, text)]
        if not texts:
            del states.sorted[salt]
        size = _size(salt, text, hidden)
        states.num_bytes -= size
        self._num_bytes -= size
        if not states.by_use:
            del self._owners[owner]


class _OwnersStates:
    """The cached states of one owner."""

    def __init__(self) -> None:
        self.by_use: OrderedDict[tuple[str, str], Float32] = OrderedDict()  # by salt and text, the last used last
        self.sorted: dict[str, list[str]] = {}  # the texts of each salt
        self.num_bytes = 0


def _longest_prefix(texts: list[str], text: str) -> str | None:
    # A prefix of a text sorts before the text. So the last one that is not after the text either is a prefix of it, or
    # shares some first characters with it; in that case every cached prefix is a prefix of those characters too.
    for _ in range(_MAX_PROBES):
        index = bisect.bisect_right(texts, text)
        if index == 0:
            return None
        candidate = texts[index - 1]
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


def _size(salt: str, text: str, hidden: Float32) -> int:
    """Return the memory of an entry. A text takes 1, 2 or 4 bytes a character, whatever its widest character needs."""
    return sys.getsizeof(text) + sys.getsizeof(salt) + hidden.nbytes + _OBJECT_BYTES

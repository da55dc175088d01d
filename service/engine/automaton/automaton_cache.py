"""A cache of automata, and of the errors of those that can't be made."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from service.engine.automaton.automaton import Automaton
from service.errors import InvalidValue

_ENTRY_BYTES = 1024  # of an entry besides its key and its tables, about


class AutomatonCache:
    """Automata by what they are made from, and errors in place of those that can't be made. Any thread may use it.

    When it is full, it discards the least recently used ones. It makes one automaton at a time, so that a burst of new
    ones takes at most one core from the engine, and the same one for many requests is made once.

    Args:
        max_bytes: limit of all entries together; a single larger one is stored too.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Automaton | InvalidValue, int]] = OrderedDict()
        self._entries_lock = threading.Lock()
        self._making = threading.Lock()

    def get(self, key: Hashable, key_bytes: int, make: Callable[[], Automaton]) -> Automaton:
        """Return the automaton of a key. Raises InvalidValue: a new error each time.

        Args:
            key: what the automaton is made from.
            key_bytes: memory of the key.
            make: makes the automaton, or raises InvalidValue; called if the key is not stored.
        """
        found = self._find(key)
        if found is None:
            with self._making:
                found = self._find(key)
                if found is None:
                    found = _made(make)
                    self._add(key, key_bytes, found)
        if isinstance(found, Automaton):
            return found
        raise _copied(found)

    @property
    def num_bytes(self) -> int:
        """The memory of all entries, about."""
        return self._num_bytes

    def _find(self, key: Hashable) -> Automaton | InvalidValue | None:
        with self._entries_lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def _add(self, key: Hashable, key_bytes: int, found: Automaton | InvalidValue) -> None:
        num_bytes = _ENTRY_BYTES + key_bytes
        num_bytes += found.num_bytes if isinstance(found, Automaton) else 4 * len(found.message)
        with self._entries_lock:
            self._entries[key] = (found, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                self._num_bytes -= self._entries.popitem(last=False)[1][1]


def _made(make: Callable[[], Automaton]) -> Automaton | InvalidValue:
    try:
        return make()
    except InvalidValue as error:
        return _copied(error)


def _copied(error: InvalidValue) -> InvalidValue:
    """Return a new error with the same message: one that is raised twice would collect the tracebacks of both."""
    copy = InvalidValue.__new__(type(error))
    copy.__dict__ |= error.__dict__
    copy.args = error.args
    return copy

"""A cache of automata, and of the errors of those that can't be made."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from service.engine.automaton.automaton import Automaton
from service.engine.turns import Turns
from service.errors import InvalidValue

_ENTRY_BYTES = 1024  # of an entry besides its key and its tables, about


_MAX_WAITING = 64  # automata of one client that are made or wait for it
_WAIT_S = 30.0  # a request waits no longer than this for its turn
# All caches share it, so that a burst of new forms and stop strings takes at most one core from the engine.
_turns = Turns(_MAX_WAITING, _WAIT_S, "the server has as many new forms to compile as it can, or as it can for you")


class AutomatonCache:
    """Automata by what they are made from, and errors in place of those that can't be made. Any thread may use it.

    When it is full, it discards the least recently used ones. In a process one automaton is made at a time, in turns
    between the clients that wait for one, and the same one for many requests is made once.

    Args:
        max_bytes: limit of all entries together; a single larger one is stored too.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Automaton | InvalidValue, int]] = OrderedDict()
        self._lock = threading.Lock()  # guards the fields above

    def get(self, key: Hashable, key_bytes: int, make: Callable[[], Automaton]) -> Automaton:
        """Return the automaton of a key.

        Args:
            key: what the automaton is made from.
            key_bytes: memory of the key.
            make: makes the automaton, or raises InvalidValue; called if the key is not stored.

        Raises InvalidValue: a new error each time; and Overloaded: too many automata wait to be made.
        """

        def found_or_made() -> Automaton | InvalidValue:
            found = self._find(key)
            if found is None:
                found = _made(make)
                self._add(key, key_bytes, found)
            return found

        found = self._find(key)
        if found is None:
            found = _turns.once((id(self), key), found_or_made)
        if isinstance(found, Automaton):
            return found
        raise found.copy()

    @property
    def num_bytes(self) -> int:
        """The memory of all entries, about."""
        return self._num_bytes

    def _find(self, key: Hashable) -> Automaton | InvalidValue | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def _add(self, key: Hashable, key_bytes: int, found: Automaton | InvalidValue) -> None:
        num_bytes = _ENTRY_BYTES + key_bytes
        num_bytes += found.num_bytes if isinstance(found, Automaton) else 4 * len(found.message)
        with self._lock:
            self._entries[key] = (found, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                self._num_bytes -= self._entries.popitem(last=False)[1][1]


def _made(make: Callable[[], Automaton]) -> Automaton | InvalidValue:
    try:
        return make()
    except InvalidValue as error:
        return error.copy()

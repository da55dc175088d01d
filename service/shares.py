"""Shares: for which client a thread works, and how clients share what is limited.

A client is what limits count: an API key's name or, without keys, an address. This module may import nothing of this
project.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextvars import ContextVar

_client: ContextVar[str] = ContextVar("client", default="")


def work_for(client: str) -> None:
    """Let everything that the current thread submits from now on count against this client's share."""
    _client.set(client)


def current_client() -> str:
    """Return the client that the current thread works for: empty for threads that serve no request."""
    return _client.get()


class SharedCapacity:
    """A number of places that clients share. Not safe for several threads.

    The first `size` places are given in the order of the requests, so a client that is alone can have them all.
    `reserve` more places are for the others: a client gets one of them only while it holds no more places than are
    free. So each further client can have half of what is free, as with the dynamic thresholds of network switches.
    """

    def __init__(self, size: int, reserve: int) -> None:
        self._size, self._reserve = size, reserve
        self._held: Counter[str] = Counter()  # only clients that hold places
        self.num_taken = 0

    def has_room(self, client: str, num_places: int = 1) -> bool:
        """Return whether the client may take this many places now."""
        held, taken = self._held[client] + num_places, self.num_taken + num_places
        return taken <= self._size or held <= self._size + self._reserve - taken

    def take(self, client: str, num_places: int = 1) -> None:
        """Take places, also more than there are: ask `has_room` before."""
        self._held[client] += num_places
        self.num_taken += num_places

    def give_back(self, client: str, num_places: int = 1) -> None:
        """Make places free again that the client has taken."""
        self.num_taken -= num_places
        self._held[client] -= num_places
        if not self._held[client]:
            del self._held[client]

    def held_by(self, client: str) -> int:
        """Return the number of places that a client holds."""
        return self._held[client]

    @property
    def num_clients(self) -> int:
        """Number of clients that hold places."""
        return len(self._held)


class SharedBudget:
    """An amount, such as bytes of memory, that clients share. Any number of threads may use it.

    Half of it is the size of a `SharedCapacity`, and half is its reserve. So a client that is alone can have half, and
    never all of it. The second one can then have half of the rest.
    """

    def __init__(self, max_amount: int) -> None:
        self.max_amount = max_amount
        self.max_per_client = max_amount // 2
        self._capacity = SharedCapacity(self.max_per_client, reserve=max_amount - self.max_per_client)
        self._changed = threading.Condition(threading.Lock())

    @property
    def num_taken(self) -> int:
        """What all clients have taken."""
        return self._capacity.num_taken

    def take(self, client: str, amount: int, *, regardless: bool = False, wait_s: float = 0.0) -> bool:
        """Take an amount; return False, and take nothing, if the client may not have it now.

        With `regardless`, everything is accepted. With `wait_s`, wait that many seconds until the client may have it:
        only for a caller that has taken nothing so far, so that no two wait for each other.
        """
        with self._changed:
            if not regardless and not self._changed.wait_for(lambda: self._capacity.has_room(client, amount), wait_s):
                return False
            self._capacity.take(client, amount)
            return True

    def give_back(self, client: str, amount: int) -> None:
        """Give back what the client has taken."""
        with self._changed:
            self._capacity.give_back(client, amount)
            self._changed.notify_all()

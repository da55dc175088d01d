"""Sessions that were in use lately, up to so many bytes."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from service.sessions.session import Session

_SESSION_BYTES = 1024  # what a session takes beside its states, its text and its run


@dataclass(frozen=True, slots=True)
class Seen:
    """A session as it was at one save. birth: of which creation it is, the younger the greater. nonce: of that save, by
    which it is told from another of the same revision.
    """

    session: Session
    birth: bytes
    nonce: bytes


class SessionCache:
    """The least recently used go first. Safe for any number of threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_evicted = 0
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Seen | None:
        """What is known of a session."""
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
            return self._seen.get(key)

    def put(self, key: str, seen: Seen) -> None:
        """Remember it, in place of what was known."""
        with self._lock:
            self._forget(key)
            self._seen[key] = seen
            self._num_bytes += _num_bytes(seen.session)
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._seen)))
                self.num_evicted += 1

    def forget(self, key: str) -> None:
        """Harmless if nothing is known."""
        with self._lock:
            self._forget(key)

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        return self._num_bytes

    def _forget(self, key: str) -> None:
        seen = self._seen.pop(key, None)
        if seen is not None:
            self._num_bytes -= _num_bytes(seen.session)


def _num_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    blocks = session.transcript.blocks
    text_bytes = sys.getsizeof(session.transcript.tail) + sum(sys.getsizeof(block.text) for block in blocks)
    return _SESSION_BYTES + (1 + len(blocks)) * session.hidden.nbytes + text_bytes + run_bytes

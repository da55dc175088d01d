"""Sessions that were in use lately, up to so many bytes."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from service.sessions.session import Session

_SESSION_BYTES = 1024  # what a session takes beside its states, its text and its run


@dataclass(frozen=True, slots=True)
class CachedSession:
    """A session as it was at one save. incarnation: of which creation it is, the younger the greater. nonce: of that save, by
    which it is told from another of the same revision.
    """

    session: Session
    incarnation: bytes
    nonce: bytes


class SessionCache:
    """The least recently used go first. Safe for any number of threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_evicted = 0
        self._sessions: OrderedDict[str, CachedSession] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> CachedSession | None:
        """What is known of a session."""
        with self._lock:
            if key in self._sessions:
                self._sessions.move_to_end(key)
            return self._sessions.get(key)

    def put(self, key: str, cached: CachedSession) -> None:
        """Remember it, in place of what was known."""
        with self._lock:
            self._forget(key)
            self._sessions[key] = cached
            self._num_bytes += _num_bytes(cached.session)
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._sessions)))
                self.num_evicted += 1

    def forget(self, key: str) -> None:
        """Harmless if nothing is known."""
        with self._lock:
            self._forget(key)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        return self._num_bytes

    def _forget(self, key: str) -> None:
        cached = self._sessions.pop(key, None)
        if cached is not None:
            self._num_bytes -= _num_bytes(cached.session)


def _num_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    segments = session.transcript.segments
    text_bytes = sys.getsizeof(session.transcript.tail) + sum(sys.getsizeof(segment.text) for segment in segments)
    return _SESSION_BYTES + (1 + len(segments)) * session.hidden.nbytes + text_bytes + run_bytes

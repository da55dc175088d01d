"""A cache of recently used sessions, limited by memory."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from service.sessions.session import Session

_SESSION_BYTES = 1024  # memory of a session without its states, its text and its run


@dataclass(frozen=True, slots=True)
class CachedSession:
    """A session as it was at one save."""

    session: Session
    incarnation: bytes  # identifies the creation of the session; that of a later creation is greater
    nonce: bytes  # identifies the save: a store that lost data may assign a revision twice


class SessionCache:
    """Evicts the least recently used sessions when they exceed `max_bytes`. Safe for any number of threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_evicted = 0
        self._sessions: OrderedDict[str, CachedSession] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> CachedSession | None:
        """Return the cached session, which may be stale, or None."""
        with self._lock:
            if key in self._sessions:
                self._sessions.move_to_end(key)
            return self._sessions.get(key)

    def put(self, key: str, cached: CachedSession) -> None:
        """Cache a session, replacing an earlier copy."""
        with self._lock:
            self._forget(key)
            self._sessions[key] = cached
            self._num_bytes += _num_bytes(cached.session)
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._sessions)))
                self.num_evicted += 1

    def forget(self, key: str) -> None:
        """Remove a session if it is cached."""
        with self._lock:
            self._forget(key)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """Approximate memory of all cached sessions, in bytes."""
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

"""A bounded cache of sessions: what this process saved or loaded last."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from service.sessions.session import Session, SessionKey

_SESSION_BYTES = 1024  # what a session takes beside its states, its text and its run
_NONCE_BYTES = 28  # 16 digits of the epoch, 12 random bytes
_NO_EPOCH = b"0" * 16  # of saves by versions of the service that had no epochs


@dataclass(frozen=True, slots=True)
class SaveId:
    """Identifies one save of a session: all three parts are compared, always."""

    incarnation: bytes  # of which creation it is; a later creation's is greater
    revision: int  # how often the session had been saved
    nonce: bytes  # the epoch and random bytes; tells saves apart whose histories parted at equal revisions

    @property
    def creation(self) -> bytes:
        """The nonce of the save that created the session, with which the incarnation ends."""
        return self.incarnation[16:]

    @property
    def epoch(self) -> bytes:
        """The epoch of the server in which it was made (see session.lua): 16 digits."""
        return self.nonce[:16] if len(self.nonce) == _NONCE_BYTES else _NO_EPOCH

    def is_later_than(self, other: SaveId) -> bool:
        """Whether it was made after another save of the session, in the server's time."""
        return (self.epoch, self.incarnation, self.revision) > (other.epoch, other.incarnation, other.revision)


@dataclass(frozen=True, slots=True)
class CachedSession:
    """A session as it was at one save."""

    session: Session
    save_id: SaveId
    settled_hash: bytes | None = None  # of the settled text that this save has in Redis; None if not known
    is_own: bool = False  # whether this process made the save, and did not only read it


class SessionCache:
    """Drops the least recently used sessions. Never goes back to an older save. Any number of threads may call."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self.num_evicted = 0
        self.num_expired = 0  # sessions that this process saved last
        self._sessions: OrderedDict[SessionKey, CachedSession] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: SessionKey) -> CachedSession | None:
        """Return the latest save of a session that this process has seen, if it is still here."""
        with self._lock:
            if key in self._sessions:
                self._sessions.move_to_end(key)
            return self._sessions.get(key)

    def put(self, key: SessionKey, cached: CachedSession) -> None:
        """Store a save, unless a later one is here: an answer to an earlier question may arrive late."""
        with self._lock:
            before = self._sessions.get(key)
            if before is not None and before.save_id.is_later_than(cached.save_id):
                return
            self._drop(key)
            self._sessions[key] = cached
            self._num_bytes += _num_bytes(cached.session)
            while self._num_bytes > self._max_bytes:
                self._drop(next(iter(self._sessions)))
                self.num_evicted += 1

    def drop(self, key: SessionKey, save_id: SaveId | None = None) -> None:
        """Forget a session, or only this save of it. Harmless if it isn't here."""
        with self._lock:
            if save_id is None or (key in self._sessions and self._sessions[key].save_id == save_id):
                self._drop(key)

    def expire(self, key: SessionKey, save_id: SaveId) -> None:
        """Forget a save of a session that has expired. Counts it if this process made it, so that one process does."""
        with self._lock:
            cached = self._sessions.get(key)
            if cached is not None and cached.save_id == save_id:
                self.num_expired += cached.is_own
                self._drop(key)

    def save_ids(self) -> list[tuple[SessionKey, SaveId]]:
        """Return which saves are here, those of the least recently used sessions first."""
        with self._lock:
            return [(key, cached.save_id) for key, cached in self._sessions.items()]

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """About how much memory the sessions take."""
        return self._num_bytes

    def _drop(self, key: SessionKey) -> None:
        cached = self._sessions.pop(key, None)
        if cached is not None:
            self._num_bytes -= _num_bytes(cached.session)


def _num_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    text = session.text
    text_bytes = sys.getsizeof(text.tail) + sum(sys.getsizeof(segment.text) for segment in text.segments)
    return _SESSION_BYTES + (1 + len(text.segments)) * session.hidden.nbytes + text_bytes + run_bytes

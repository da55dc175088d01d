"""The session store in the process's own memory."""

from __future__ import annotations

import heapq
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from service.arrays import Float32, read_state, write_state
from service.errors import Overloaded, RevisionConflict, SessionBusy, SessionExists, SessionGone, SessionNotFound
from service.sessions.due import DueTimes
from service.sessions.session import Session
from service.sessions.session_store import Lease
from service.sessions.shared_segments import SharedSegments
from service.sessions.slab import Slab

_SESSION_BYTES = 1024  # what a session takes beside its state and its text
_SWEPT_SESSIONS = 256  # deleted under one hold of the lock: about a millisecond
_MAX_GONE = 100_000  # ids remembered of sessions that expired or were evicted


@dataclass(slots=True, eq=False)
class _Entry:
    """session: its hidden is a view of the slab's slot, its expires_at not kept up. lease: None while it is idle."""

    session: Session
    slot: int
    expires_at: float
    lease: Lease | None = None


class MemoryStore:
    """Implements `SessionStore`; what it keeps lives as long as the process.

    max_sessions, max_bytes: where the least recently used idle ones are evicted. A session that grows while it is
    leased may exceed max_bytes until there are idle ones again. clock: seconds since 1970.
    """

    def __init__(self, max_sessions: int, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._max_sessions, self._max_bytes, self._clock = max_sessions, max_bytes, clock
        self._lock = threading.Lock()  # guards all that follows; held for microseconds
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._due = DueTimes(clock())  # of idle ones
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._slabs: dict[tuple[int, ...], Slab] = {}
        self._segments = SharedSegments()
        self._own_bytes = 0  # without segments
        self.num_expired = self.num_evicted = 0  # so far

    def create(self, session: Session) -> Session:
        """See SessionStore."""
        key, now = _key(session.owner, session.id), self._clock()
        session = replace(session, revision=1, created_at=now, expires_at=now + session.ttl_s)
        with self._lock:
            if self._find(key) is not None:
                raise SessionExists(f"there is a session {session.id} already")
            self._make_room_for(session)
            slab = self._slab(session)
            slot = slab.put(session.hidden)
            self._entries[key] = _Entry(replace(session, hidden=slab.view(slot)), slot, session.expires_at)
            self._gone.pop(key, None)
            self._own_bytes += _own_bytes(session)
            self._segments.hold(session.transcript)
            self._due.add(key, session.expires_at)
        return session

    def load(self, owner: str, session_id: str) -> Session:
        """See SessionStore."""
        with self._lock:
            return _copy(self._get(owner, session_id))

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:  # noqa: ARG002 - no other process has it
        """See SessionStore."""
        with self._lock:
            entry = self._get(owner, session_id)
            if entry.lease is not None:
                raise SessionBusy("another operation on this session is under way: try again when it is over")
            self._due.remove(_key(owner, session_id), entry.expires_at)
            entry.lease = Lease(_copy(entry))
            return entry.lease

    def cached_copy(self, owner: str, session_id: str) -> Session | None:  # noqa: ARG002 - see SessionStore
        """See SessionStore: asking takes no time."""
        return None

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:  # noqa: ARG002
        """See SessionStore: nobody has been given what it needs."""
        return None

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """See SessionStore."""
        with self._lock:
            entry = self._leased(lease)
            old = entry.session
            if session.revision != old.revision or (session.owner, session.id) != (old.owner, old.id):
                raise RevisionConflict("the session was changed meanwhile")
            if session.transcript.segments is not old.transcript.segments:
                self._segments.hold(session.transcript)
                self._segments.let_go(old.transcript)
            self._own_bytes += _own_bytes(session) - _own_bytes(old)
            entry.slot, view = self._put(entry, session)
            entry.session = replace(session, hidden=view, revision=old.revision + 1)
            if release:
                self._free(entry)
            self._make_room()
            return entry.session.revision

    def release(self, lease: Lease) -> None:
        """See SessionStore."""
        with self._lock:
            entry = self._entries.get(_key(lease.session.owner, lease.session.id))
            if entry is not None and entry.lease is lease:
                self._free(entry)
                self._make_room()

    def delete(self, lease: Lease) -> None:
        """See SessionStore."""
        with self._lock:
            self._drop(_key(lease.session.owner, lease.session.id), self._leased(lease))

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """See SessionStore. Takes 0.2 s beside a million sessions, so that nothing else takes longer for it."""
        with self._lock:
            keys = list(self._entries)
        own = _key(owner, "")
        ids = [key[len(own) :] for key in keys if key.startswith(own) and (owner or "/" not in key)]
        sessions: list[Session] = []
        while found := heapq.nsmallest(limit - len(sessions), (one for one in ids if one > after)):
            for session_id in found:
                with suppress(SessionNotFound, SessionGone):
                    sessions.append(self.load(owner, session_id))
            after = found[-1]
        return sessions

    def check(self) -> None:
        """See SessionStore: they can always be had."""

    def close(self) -> None:
        """See SessionStore: there is nothing to end."""

    def sweep(self, limit: int = _SWEPT_SESSIONS) -> int:
        """Delete up to `limit` idle sessions that have expired, and return how many were deleted.

        An expired session is never answered with, swept or not: sweeping only frees its memory.
        """
        with self._lock:
            keys = self._due.due(self._clock(), limit)
            self.num_expired += len(keys)
            for key in keys:
                self._expire(key, self._entries[key])
            return len(keys)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """About how much memory all sessions take. What forks share counts once."""
        return self._own_bytes + self._segments.num_bytes

    # What follows needs the lock.

    def _find(self, key: str) -> _Entry | None:
        """None: not there, or no longer."""
        entry = self._entries.get(key)
        if entry is not None and entry.lease is None and entry.expires_at <= self._clock():
            self.num_expired += 1
            self._expire(key, entry)
            return None
        return entry

    def _get(self, owner: str, session_id: str) -> _Entry:
        key = _key(owner, session_id)
        entry = self._find(key)
        if entry is None and key in self._gone:
            raise SessionGone("this session has expired, or was evicted to make room: create it again")
        if entry is None:
            raise SessionNotFound("there is no such session")
        return entry

    def _leased(self, lease: Lease) -> _Entry:
        entry = self._entries.get(_key(lease.session.owner, lease.session.id))
        if entry is None or entry.lease is not lease:
            raise RevisionConflict("the session is no longer reserved for this operation")
        return entry

    def _free(self, entry: _Entry) -> None:
        key = _key(entry.session.owner, entry.session.id)
        entry.lease = None
        entry.expires_at = self._clock() + entry.session.ttl_s
        self._entries.move_to_end(key)
        self._due.add(key, entry.expires_at)

    def _make_room_for(self, session: Session) -> None:
        size = _own_bytes(session) + self._segments.would_add(session.transcript)
        if size > self._max_bytes:
            raise Overloaded("the session is larger than all sessions together may be")
        self._make_room(num_sessions=1, num_bytes=size)
        if len(self._entries) >= self._max_sessions or self.num_bytes + size > self._max_bytes:
            raise Overloaded("there is no room for another session, because all are in use: try again in a second")

    def _make_room(self, num_sessions: int = 0, num_bytes: int = 0) -> None:
        """Evict idle ones until so much fits beside the rest."""

        def is_full() -> bool:
            too_many = len(self._entries) + num_sessions > self._max_sessions
            return too_many or self.num_bytes + num_bytes > self._max_bytes

        while is_full() and (idle := next((key for key, one in self._entries.items() if one.lease is None), None)):
            self.num_evicted += 1
            self._expire(idle, self._entries[idle])

    def _expire(self, key: str, entry: _Entry) -> None:
        """Forget an idle session, but not that it was there."""
        self._due.remove(key, entry.expires_at)
        self._drop(key, entry)
        self._gone[key] = None
        if len(self._gone) > _MAX_GONE:
            self._gone.popitem(last=False)

    def _drop(self, key: str, entry: _Entry) -> None:
        session = entry.session
        del self._entries[key]
        self._segments.let_go(session.transcript)
        self._own_bytes -= _own_bytes(session)
        self._slab(session).free(entry.slot)

    def _slab(self, session: Session) -> Slab:
        shape = session.hidden.shape
        if shape not in self._slabs:
            self._slabs[shape] = Slab(shape)
        return self._slabs[shape]

    def _put(self, entry: _Entry, session: Session) -> tuple[int, Float32]:
        """Where the entry's state is from now on. A session that changes its model may need another slab."""
        if session.hidden.shape == entry.session.hidden.shape:
            write_state(entry.session.hidden, session.hidden)
            return entry.slot, entry.session.hidden
        self._slab(entry.session).free(entry.slot)
        slot = self._slab(session).put(session.hidden)
        return slot, self._slab(session).view(slot)


def _key(owner: str, session_id: str) -> str:
    return f"{owner}/{session_id}" if owner else session_id


def _copy(entry: _Entry) -> Session:
    """A session whose state nobody writes to."""
    return replace(entry.session, hidden=read_state(entry.session.hidden), expires_at=entry.expires_at)


def _own_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    return _SESSION_BYTES + session.hidden.nbytes + sys.getsizeof(session.transcript.tail) + run_bytes

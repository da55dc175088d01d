"""The session store in the process's own memory."""

from __future__ import annotations

import heapq
import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from service.arrays import Float32, read_state, write_state
from service.errors import Overloaded, RevisionConflict, SessionBusy, SessionExists, SessionGone, SessionNotFound
from service.sessions.session import Session
from service.sessions.session_store import Lease
from service.sessions.transcript import Segment, Transcript

_SESSION_BYTES = 1024  # memory of a session without its state and its text
_SEGMENT_BYTES = 256  # memory of a segment without its state and its text
_SLAB_BLOCK_BYTES = 2**24
_SWEPT_SESSIONS = 256  # deleted during one hold of the lock: about a millisecond
_MAX_GONE = 100_000  # ids of expired and evicted sessions that are remembered


@dataclass(slots=True, eq=False)
class _Entry:
    session: Session  # `hidden` is a view of the slab's slot; `expires_at` is not updated
    slot: int
    expires_at: float
    lease: Lease | None = None  # None while the session is idle


class MemoryStore:
    """Implements `SessionStore`. Sessions live until the process ends.

    If there are more than `max_sessions`, or if they take more than `max_bytes`, the least recently used idle sessions
    are evicted. Sessions that grow while they are leased may exceed `max_bytes` until others are idle.
    """

    def __init__(self, max_sessions: int, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """clock: returns seconds since 1970."""
        self._max_sessions, self._max_bytes, self._clock = max_sessions, max_bytes, clock
        self._lock = threading.Lock()  # guards all of the following; held for microseconds
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the least recently used first
        self._expiries = _ExpiryTimes(clock())  # of idle sessions
        self._gone: OrderedDict[str, None] = OrderedDict()  # keys of expired and evicted sessions, the oldest first
        self._slabs: dict[tuple[int, ...], _Slab] = {}
        self._segments = _SharedSegments()
        self._own_bytes = 0  # memory of all sessions without their segments
        self.num_expired = self.num_evicted = 0  # since the store was made

    def create(self, session: Session) -> Session:
        """See SessionStore."""
        key, now = _key(session.owner, session.id), self._clock()
        session = replace(session, revision=1, created_at=now, expires_at=now + session.ttl_s)
        with self._lock:
            if self._find(key) is not None:
                raise SessionExists(f"there is already a session {session.id}")
            self._make_room_for(session)
            slab = self._slab(session)
            slot = slab.put(session.hidden)
            self._entries[key] = _Entry(replace(session, hidden=slab.view(slot)), slot, session.expires_at)
            self._gone.pop(key, None)
            self._own_bytes += _own_bytes(session)
            self._segments.add(session.transcript)
            self._expiries.add(key, session.expires_at)
        return session

    def load(self, owner: str, session_id: str) -> Session:
        """See SessionStore."""
        with self._lock:
            return _copy(self._get(owner, session_id))

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:  # noqa: ARG002 - there is no other process
        """See SessionStore."""
        with self._lock:
            entry = self._get(owner, session_id)
            if entry.lease is not None:
                raise SessionBusy("another operation on this session is in progress: try again when it is finished")
            self._expiries.remove(_key(owner, session_id), entry.expires_at)
            entry.lease = Lease(_copy(entry))
            return entry.lease

    def cached_copy(self, owner: str, session_id: str) -> Session | None:  # noqa: ARG002 - see SessionStore
        """See SessionStore. Always None: loading is cheap."""
        return None

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:  # noqa: ARG002
        """See SessionStore. Always None: no caller has a `cached_copy`."""
        return None

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """See SessionStore."""
        with self._lock:
            entry = self._leased_entry(lease)
            old = entry.session
            if session.revision != old.revision or (session.owner, session.id) != (old.owner, old.id):
                raise RevisionConflict("another operation has changed the session in the meantime")
            if session.transcript.segments is not old.transcript.segments:
                self._segments.add(session.transcript)
                self._segments.remove(old.transcript)
            self._own_bytes += _own_bytes(session) - _own_bytes(old)
            entry.slot, view = self._put(entry, session)
            entry.session = replace(session, hidden=view, revision=old.revision + 1)
            if release:
                self._release(entry)
            self._make_room()
            return entry.session.revision

    def release(self, lease: Lease) -> None:
        """See SessionStore."""
        with self._lock:
            entry = self._entries.get(_key(lease.session.owner, lease.session.id))
            if entry is not None and entry.lease is lease:
                self._release(entry)
                self._make_room()

    def delete(self, lease: Lease) -> None:
        """See SessionStore."""
        with self._lock:
            self._drop(_key(lease.session.owner, lease.session.id), self._leased_entry(lease))

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """See SessionStore. With a million sessions it takes 0.2 s, but holds the lock only to copy the keys."""
        with self._lock:
            keys = list(self._entries)
        prefix = _key(owner, "")
        ids = [key[len(prefix) :] for key in keys if key.startswith(prefix) and (owner or "/" not in key)]
        sessions: list[Session] = []
        while found := heapq.nsmallest(limit - len(sessions), (one for one in ids if one > after)):
            for session_id in found:
                with suppress(SessionNotFound, SessionGone):
                    sessions.append(self.load(owner, session_id))
            after = found[-1]
        return sessions

    def check(self) -> None:
        """See SessionStore. Never raises."""

    def close(self) -> None:
        """See SessionStore. Does nothing: there are no threads and no connections."""

    def sweep(self, limit: int = _SWEPT_SESSIONS) -> int:
        """Delete up to `limit` idle sessions that have expired, and return how many were deleted.

        No method returns an expired session, swept or not: sweeping only frees its memory.
        """
        with self._lock:
            keys = self._expiries.due(self._clock(), limit)
            self.num_expired += len(keys)
            for key in keys:
                self._expire(key, self._entries[key])
            return len(keys)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Approximate memory of all sessions, in bytes. Segments that forks share count once."""
        return self._own_bytes + self._segments.num_bytes

    # The following methods must be called with the lock held.

    def _find(self, key: str) -> _Entry | None:
        """Return the entry, or None if there is none or if it has expired."""
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

    def _leased_entry(self, lease: Lease) -> _Entry:
        entry = self._entries.get(_key(lease.session.owner, lease.session.id))
        if entry is None or entry.lease is not lease:
            raise RevisionConflict("this operation no longer has the session's lease")
        return entry

    def _release(self, entry: _Entry) -> None:
        key = _key(entry.session.owner, entry.session.id)
        entry.lease = None
        entry.expires_at = self._clock() + entry.session.ttl_s
        self._entries.move_to_end(key)
        self._expiries.add(key, entry.expires_at)

    def _make_room_for(self, session: Session) -> None:
        size = _own_bytes(session) + self._segments.num_new_bytes(session.transcript)
        if size > self._max_bytes:
            raise Overloaded("the session is larger than the memory limit of all sessions together")
        self._make_room(num_sessions=1, num_bytes=size)
        if len(self._entries) >= self._max_sessions or self.num_bytes + size > self._max_bytes:
            raise Overloaded("there is no room for another session, because all are in use: try again in a second")

    def _make_room(self, num_sessions: int = 0, num_bytes: int = 0) -> None:
        """Evict idle sessions until this many more sessions and bytes fit, or until no session is idle."""

        def is_full() -> bool:
            too_many = len(self._entries) + num_sessions > self._max_sessions
            return too_many or self.num_bytes + num_bytes > self._max_bytes

        while is_full() and (idle := next((key for key, one in self._entries.items() if one.lease is None), None)):
            self.num_evicted += 1
            self._expire(idle, self._entries[idle])

    def _expire(self, key: str, entry: _Entry) -> None:
        """Drop an idle session, and remember its key in order to raise SessionGone for it."""
        self._expiries.remove(key, entry.expires_at)
        self._drop(key, entry)
        self._gone[key] = None
        if len(self._gone) > _MAX_GONE:
            self._gone.popitem(last=False)

    def _drop(self, key: str, entry: _Entry) -> None:
        session = entry.session
        del self._entries[key]
        self._segments.remove(session.transcript)
        self._own_bytes -= _own_bytes(session)
        self._slab(session).free(entry.slot)

    def _slab(self, session: Session) -> _Slab:
        shape = session.hidden.shape
        if shape not in self._slabs:
            self._slabs[shape] = _Slab(shape)
        return self._slabs[shape]

    def _put(self, entry: _Entry, session: Session) -> tuple[int, Float32]:
        """Store the state and return its slot and its view. A session that changes its model may need another slab."""
        if session.hidden.shape == entry.session.hidden.shape:
            write_state(entry.session.hidden, session.hidden)
            return entry.slot, entry.session.hidden
        self._slab(entry.session).free(entry.slot)
        slot = self._slab(session).put(session.hidden)
        return slot, self._slab(session).view(slot)


class _ExpiryTimes:
    """Keys by the second at which they expire. Each operation takes constant time. Not safe for several threads."""

    def __init__(self, now: float) -> None:
        self._keys: dict[int, set[str]] = {}  # by second
        self._next = math.floor(now)  # the second that `due` looks at next

    def add(self, key: str, at: float) -> None:
        """Add a key that expires at this time."""
        self._keys.setdefault(self._second(at), set()).add(key)

    def remove(self, key: str, at: float) -> None:
        """Remove a key that was added with this time."""
        keys = self._keys[self._second(at)]
        keys.remove(key)
        if not keys:
            del self._keys[self._second(at)]

    def due(self, now: float, limit: int) -> list[str]:
        """Return up to `limit` keys whose second is over, without removing them."""
        found: list[str] = []
        while self._next <= math.floor(now) and not found:
            found = [key for key, _ in zip(self._keys.get(self._next, ()), range(limit), strict=False)]
            self._next += not found
        return found

    def _second(self, at: float) -> int:
        return max(self._next, math.ceil(at))


class _Slab:
    """Memory for many (L, H) float32 states, allocated in blocks that never move. Not safe for several threads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._block_slots = max(1, _SLAB_BLOCK_BYTES // (4 * int(np.prod(shape))))
        self._blocks: list[Float32] = []
        self._num_used = 0  # the first slots, which have been in use at some time
        self._free: list[int] = []  # those of them that are free again

    def put(self, hidden: Float32) -> int:
        """Copy a state into a free slot and return the slot's number."""
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._num_used = self._num_used, self._num_used + 1
            if slot == len(self._blocks) * self._block_slots:
                # The operating system provides the memory page by page, when it is first written to.
                self._blocks.append(np.empty((self._block_slots, *self._shape), np.float32))
        write_state(self.view(slot), hidden)
        return slot

    def view(self, slot: int) -> Float32:
        """Return a view of a slot, (L, H) float32."""
        block, place = divmod(slot, self._block_slots)
        view: Float32 = self._blocks[block][place]
        return view

    def free(self, slot: int) -> None:
        """Make a slot available again."""
        self._free.append(slot)


class _SharedSegments:
    """Counts the sessions that have each segment, and the memory of all segments. Not safe for several threads."""

    def __init__(self) -> None:
        self.num_bytes = 0  # each segment counts once
        self._num_sessions: dict[Segment, int] = {}

    def add(self, transcript: Transcript) -> None:
        """Count the segments of a session's transcript."""
        for segment in transcript.segments:
            num_sessions = self._num_sessions.get(segment, 0)
            self._num_sessions[segment] = num_sessions + 1
            self.num_bytes += 0 if num_sessions else _segment_bytes(segment)

    def remove(self, transcript: Transcript) -> None:
        """Stop counting the segments of a session's transcript."""
        for segment in transcript.segments:
            self._num_sessions[segment] -= 1
            if not self._num_sessions[segment]:
                del self._num_sessions[segment]
                self.num_bytes -= _segment_bytes(segment)

    def num_new_bytes(self, transcript: Transcript) -> int:
        """Return the memory of those segments of a transcript that no session has yet."""
        return sum(_segment_bytes(segment) for segment in transcript.segments if segment not in self._num_sessions)


def _key(owner: str, session_id: str) -> str:
    return f"{owner}/{session_id}" if owner else session_id


def _copy(entry: _Entry) -> Session:
    """Return the session with a copy of its state, which the store will not overwrite."""
    return replace(entry.session, hidden=read_state(entry.session.hidden), expires_at=entry.expires_at)


def _own_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    return _SESSION_BYTES + session.hidden.nbytes + sys.getsizeof(session.transcript.tail) + run_bytes


def _segment_bytes(segment: Segment) -> int:
    return _SEGMENT_BYTES + segment.hidden.nbytes + sys.getsizeof(segment.text)

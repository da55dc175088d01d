"""The session store in the process's own memory."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from sortedcontainers import SortedDict, SortedList

from service.arrays import Float32, read_state, write_state
from service.errors import Overloaded, RevisionConflict, SessionBusy, SessionExists, SessionGone, SessionNotFound
from service.sessions.session import Session, SessionKey, SessionSummary
from service.sessions.session_store import Answer, Change, Lease
from service.sessions.text import Segment, Text
from service.shares import current_client

_SESSION_BYTES = 1024  # memory of a session without its state and its text
_SEGMENT_BYTES = 256  # memory of a segment without its state and its text
_SLAB_BLOCK_BYTES = 2**24
_SWEPT_SESSIONS = 256  # deleted under one hold of the lock: about a millisecond
_PAGE_SESSIONS = 100  # listed under one hold of the lock: about half a millisecond
_MAX_GONE = 100_000  # ids remembered of sessions that expired, or were evicted or deleted


@dataclass(slots=True, eq=False)
class _Entry:
    session: Session  # its hidden is a view of the slab's slot; its expires_at is not kept up to date
    slot: int
    client: str  # which client created it, and has used its memory since
    ends_at: float  # end of its life, monotonic
    expires_at: float  # the same in seconds since 1970, as the wall clock was at its last use
    lease: _MemoryLease | None = None  # None while the session is idle


class _MemoryLease:
    """Implements `Lease`."""

    def __init__(self, store: MemoryStore, session: Session) -> None:
        self._store = store
        self.session = session
        self.on_takeover: Callable[[], None] | None = None  # never called: no other process has these sessions

    def save(self, session: Session, *, release: bool = False) -> None:
        """See Lease."""
        self.session = self._store._save(self, session, release)

    def release(self) -> None:
        """See Lease."""
        self._store._release(self)


class MemoryStore:
    """Implements `SessionStore`. Its sessions live as long as the process.

    When it is full, the client that holds most loses its least recently used idle session: the one that creates
    another session, if it would hold most then. So a client can't push out the sessions of those that hold less.

    Args:
        max_sessions: A session is evicted to make room for one more than this.
        max_bytes: The same for the memory of all sessions. A session that grows while it is leased may exceed it until
            others are idle again.
        clock: Monotonic seconds. A step of the wall clock must not end sessions.
        wall_clock: Seconds since 1970, only to be shown.
    """

    outlives_process = False

    def __init__(
        self,
        max_sessions: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_sessions, self._max_bytes, self._clock, self._wall_clock = max_sessions, max_bytes, clock, wall_clock
        self._lock = threading.Lock()  # guards everything below; held for microseconds
        self._entries: dict[SessionKey, _Entry] = {}
        self._ids: dict[str, SortedList[str]] = {}  # owner -> ids of its sessions
        self._clients: dict[str, _Holdings] = {}  # only clients that have sessions
        self._by_sessions, self._by_bytes = _Ranking(), _Ranking()  # clients by what they hold
        self._num_bytes = 0
        self._expiries = _ExpiryTimes()  # of idle sessions
        self._gone: OrderedDict[SessionKey, bool] = OrderedDict()  # the value: whether it was deleted
        self._slabs: dict[tuple[int, ...], _Slab] = {}
        self.num_expired = self.num_evicted = 0  # so far

    def create(self, session: Session) -> Session:
        """See SessionStore."""
        key, client, now = session.key, current_client(), self._wall_clock()
        session = replace(session, revision=1, created_at=now, expires_at=now + session.ttl_s)
        with self._lock:
            if self._find(key) is not None:
                raise SessionExists(f"there is already a session {session.id}")
            self._make_room_for(session, client)
            slab = self._slab(session)
            slot = slab.put(session.hidden)
            stored = replace(session, text=session.text.with_hidden(slab.view(slot)))
            entry = _Entry(stored, slot, client, self._clock() + session.ttl_s, session.expires_at)
            self._entries[key] = entry
            self._ids.setdefault(key.owner, SortedList()).add(key.id)
            self._gone.pop(key, None)
            self._clients.setdefault(client, _Holdings()).add(session)
            self._count(client)
            self._expiries.add(key, entry.ends_at)
        return session

    def load(self, key: SessionKey) -> Session:
        """See SessionStore."""
        with self._lock:
            return _copy(self._get(key))

    def update(self, key: SessionKey, change: Change[Answer], *, idempotent: bool = False) -> Answer:  # noqa: ARG002 - every outcome is known
        """See SessionStore. The session is leased while `change` runs; no lock is held."""
        lease = self._lease(key)
        try:
            changed, answer = change(lease.session)
            if changed is not lease.session:
                lease.save(changed, release=True)
        finally:
            lease.release()
        return answer

    def begin(
        self,
        key: SessionKey,
        change: Change[Answer],
        *,
        take_over: bool = False,  # noqa: ARG002 - no other process has it
    ) -> tuple[Lease | None, Answer]:
        """See SessionStore."""
        lease = self._lease(key)
        try:
            changed, answer = change(lease.session)
            if changed is not lease.session:
                lease.save(changed)
                return lease, answer
        except BaseException:
            lease.release()
            raise
        lease.release()
        return None, answer

    def delete(self, key: SessionKey) -> None:
        """See SessionStore."""
        with self._lock:
            if key not in self._entries and self._gone.get(key):
                return  # the answer to the deletion may have been lost
        lease = self._lease(key)
        with self._lock:
            self._drop(key, self._leased(lease))
            self._remember(key, was_deleted=True)

    def page(self, owner: str, after: str, limit: int) -> list[SessionSummary]:
        """See SessionStore."""
        sessions: list[SessionSummary] = []
        while len(sessions) < limit:
            with self._lock:
                ids = self._ids.get(owner, SortedList()).irange(after, inclusive=(False, True))
                found = list(islice(ids, min(_PAGE_SESSIONS, limit - len(sessions))))
                entries = [self._find(SessionKey(owner, session_id)) for session_id in found]
                sessions += [
                    replace(entry.session.summary, expires_at=entry.expires_at)
                    for entry in entries
                    if entry is not None
                ]
            if not found:
                break
            after = found[-1]
        return sessions

    def check(self) -> None:
        """See SessionStore: these sessions can always be served."""

    def close(self) -> None:
        """See SessionStore: there is nothing to end."""

    def sweep(self, limit: int = _SWEPT_SESSIONS) -> int:
        """Delete up to `limit` idle sessions that have expired, and return how many were deleted.

        An expired session is never answered with, swept or not: sweeping only frees its memory.
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
        """About how much memory all sessions take. What forks share counts once."""
        return self._num_bytes

    @property
    def num_clients(self) -> int:
        """Number of clients that have sessions."""
        return len(self._clients)

    def _lease(self, key: SessionKey) -> _MemoryLease:
        with self._lock:
            entry = self._get(key)
            if entry.lease is not None:
                raise SessionBusy("another operation on this session is in progress: try again when it is finished")
            self._expiries.remove(key, entry.ends_at)
            del self._clients[entry.client].idle[key]
            entry.lease = _MemoryLease(self, _copy(entry))
            return entry.lease

    def _save(self, lease: _MemoryLease, session: Session, release: bool) -> Session:
        with self._lock:
            entry = self._leased(lease)
            old = entry.session
            if session.revision != old.revision or session.key != old.key:
                raise RevisionConflict("another operation has changed the session in the meantime")
            self._clients[entry.client].replace(old, session)
            self._count(entry.client)
            entry.slot, view = self._put(entry, session)
            saved = replace(session, revision=old.revision + 1)
            entry.session = replace(saved, text=session.text.with_hidden(view))
            if release:
                self._free(entry)
            self._make_room(entry.client, besides=session.key)
            return saved

    def _release(self, lease: _MemoryLease) -> None:
        with self._lock:
            entry = self._entries.get(lease.session.key)
            if entry is not None and entry.lease is lease:
                self._free(entry)
                self._make_room(entry.client, besides=entry.session.key)

    # The methods below need the lock.

    def _find(self, key: SessionKey) -> _Entry | None:
        """Return the session's entry; None if it isn't there, or has expired."""
        entry = self._entries.get(key)
        if entry is not None and entry.lease is None and entry.ends_at <= self._clock():
            self.num_expired += 1
            self._expire(key, entry)
            return None
        return entry

    def _get(self, key: SessionKey) -> _Entry:
        entry = self._find(key)
        if entry is None and self._gone.get(key) is False:
            raise SessionGone("this session has expired, or was evicted to make room: create it again")
        if entry is None:
            raise SessionNotFound("there is no such session: create it first")
        return entry

    def _leased(self, lease: _MemoryLease) -> _Entry:
        entry = self._entries.get(lease.session.key)
        if entry is None or entry.lease is not lease:
            raise RevisionConflict("this operation no longer has the session's lease")
        return entry

    def _free(self, entry: _Entry) -> None:
        key = entry.session.key
        entry.lease = None
        entry.ends_at = self._clock() + entry.session.ttl_s
        entry.expires_at = self._wall_clock() + entry.session.ttl_s
        self._clients[entry.client].idle[key] = None
        self._expiries.add(key, entry.ends_at)

    def _count(self, client: str) -> None:
        """Rank a client again whose holdings have changed."""
        holdings = self._clients[client]
        self._num_bytes += holdings.num_bytes - self._by_bytes.amount(client)
        self._by_bytes.set(client, holdings.num_bytes)
        self._by_sessions.set(client, holdings.num_sessions)
        if not holdings.num_sessions:
            del self._clients[client]

    def _make_room_for(self, session: Session, client: str) -> None:
        size = self._clients.get(client, _Holdings()).num_new_bytes(session)
        if size > self._max_bytes:
            raise Overloaded("the session is larger than the memory limit of all sessions together")
        self._make_room(client, num_sessions=1, num_bytes=size)
        if len(self._entries) >= self._max_sessions or self.num_bytes + size > self._max_bytes:
            raise Overloaded("there is no room for another session, because all are in use: try again in a second")

    def _make_room(
        self, client: str, num_sessions: int = 0, num_bytes: int = 0, besides: SessionKey | None = None
    ) -> None:
        """Evict idle sessions until this much more of a client fits beside the rest, but not the session `besides`."""
        while True:
            if len(self._entries) + num_sessions > self._max_sessions:
                clients = self._by_sessions.descending(client, num_sessions)
            elif self.num_bytes + num_bytes > self._max_bytes:
                clients = self._by_bytes.descending(client, num_bytes)
            else:
                return
            idle = (key for name in clients for key in self._clients[name].idle if key != besides)
            evicted = next(idle, None)
            if evicted is None:
                return
            self.num_evicted += 1
            self._expire(evicted, self._entries[evicted])

    def _expire(self, key: SessionKey, entry: _Entry) -> None:
        """Delete an idle session, but remember that it was there."""
        self._expiries.remove(key, entry.ends_at)
        self._drop(key, entry)
        self._remember(key, was_deleted=False)

    def _remember(self, key: SessionKey, was_deleted: bool) -> None:
        self._gone[key] = was_deleted
        if len(self._gone) > _MAX_GONE:
            self._gone.popitem(last=False)

    def _drop(self, key: SessionKey, entry: _Entry) -> None:
        session = entry.session
        del self._entries[key]
        ids = self._ids[key.owner]
        ids.remove(key.id)
        if not ids:
            del self._ids[key.owner]
        self._clients[entry.client].remove(session)
        self._count(entry.client)
        self._slab(session).free(entry.slot)

    def _slab(self, session: Session) -> _Slab:
        shape = session.hidden.shape
        if shape not in self._slabs:
            self._slabs[shape] = _Slab(shape)
        return self._slabs[shape]

    def _put(self, entry: _Entry, session: Session) -> tuple[int, Float32]:
        """Store the state: the slot, and its view. A session that changes its model may need another slab."""
        if session.hidden.shape == entry.session.hidden.shape:
            write_state(entry.session.hidden, session.hidden)
            return entry.slot, entry.session.hidden
        self._slab(entry.session).free(entry.slot)
        slot = self._slab(session).put(session.hidden)
        return slot, self._slab(session).view(slot)


class _Holdings:
    """The sessions of one client, and their memory. Not safe for several threads."""

    def __init__(self) -> None:
        self.idle: OrderedDict[SessionKey, None] = OrderedDict()  # the least recently used first
        self.num_sessions = 0
        self._own_bytes = 0  # without segments
        self._segments = _SharedSegments()

    @property
    def num_bytes(self) -> int:
        """The memory of all its sessions."""
        return self._own_bytes + self._segments.num_bytes

    def num_new_bytes(self, session: Session) -> int:
        """Return how much memory another session takes."""
        return _own_bytes(session) + self._segments.num_new_bytes(session.text)

    def add(self, session: Session) -> None:
        """Count a session, which is idle."""
        self.idle[session.key] = None
        self.num_sessions += 1
        self._own_bytes += _own_bytes(session)
        self._segments.add(session.text)

    def replace(self, old: Session, new: Session) -> None:
        """Count what has changed of a session."""
        self._own_bytes += _own_bytes(new) - _own_bytes(old)
        if new.text.segments is not old.text.segments:
            self._segments.add(new.text)
            self._segments.remove(old.text)

    def remove(self, session: Session) -> None:
        """Count a session no longer, idle or not."""
        self.idle.pop(session.key, None)
        self.num_sessions -= 1
        self._own_bytes -= _own_bytes(session)
        self._segments.remove(session.text)


class _Ranking:
    """Clients by an amount that they hold. Not safe for several threads."""

    def __init__(self) -> None:
        self._amounts: dict[str, int] = {}
        self._sorted: SortedList[tuple[int, str]] = SortedList()

    def amount(self, client: str) -> int:
        """Return how much a client holds."""
        return self._amounts.get(client, 0)

    def set(self, client: str, amount: int) -> None:
        """Note how much a client holds now. One that holds nothing is forgotten."""
        before = self._amounts.pop(client, None)
        if before is not None:
            self._sorted.remove((before, client))
        if amount:
            self._amounts[client] = amount
            self._sorted.add((amount, client))

    def descending(self, client: str, more: int) -> Iterator[str]:
        """Yield the clients that hold something, those with most first: this client as if it held that much more."""
        own, has_come = self.amount(client) + more, client not in self._amounts
        for amount, other in reversed(self._sorted):
            if not has_come and own > amount:
                has_come = True
                yield client
            if other != client:
                yield other
        if not has_come:
            yield client


class _ExpiryTimes:
    """Keys by the second at which they expire. Not safe for several threads."""

    def __init__(self) -> None:
        self._keys: SortedDict[int, set[SessionKey]] = SortedDict()  # by second

    def add(self, key: SessionKey, at: float) -> None:
        """Add a key that expires at this time."""
        self._keys.setdefault(math.ceil(at), set()).add(key)

    def remove(self, key: SessionKey, at: float) -> None:
        """Remove a key that was added with this time."""
        keys = self._keys[math.ceil(at)]
        keys.remove(key)
        if not keys:
            del self._keys[math.ceil(at)]

    def due(self, now: float, limit: int) -> list[SessionKey]:
        """Return up to `limit` keys of one second that is over, without removing them."""
        second, keys = self._keys.peekitem(0) if self._keys else (math.inf, set())
        return list(islice(keys, limit)) if second <= now else []


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

    def add(self, text: Text) -> None:
        """Count the segments of a session's text."""
        for segment in text.segments:
            num_sessions = self._num_sessions.get(segment, 0)
            self._num_sessions[segment] = num_sessions + 1
            self.num_bytes += 0 if num_sessions else _segment_bytes(segment)

    def remove(self, text: Text) -> None:
        """Stop counting the segments of a session's text."""
        for segment in text.segments:
            self._num_sessions[segment] -= 1
            if not self._num_sessions[segment]:
                del self._num_sessions[segment]
                self.num_bytes -= _segment_bytes(segment)

    def num_new_bytes(self, text: Text) -> int:
        """Return the memory of those segments of a text that no session has yet."""
        return sum(_segment_bytes(segment) for segment in text.segments if segment not in self._num_sessions)


def _copy(entry: _Entry) -> Session:
    """Return the session with a state that nobody writes to."""
    session = entry.session
    text = session.text.with_hidden(read_state(session.hidden))
    return replace(session, text=text, expires_at=entry.expires_at)


def _own_bytes(session: Session) -> int:
    run_bytes = session.run.num_bytes if session.run is not None else 0
    return _SESSION_BYTES + session.hidden.nbytes + sys.getsizeof(session.text.tail) + run_bytes


def _segment_bytes(segment: Segment) -> int:
    return _SEGMENT_BYTES + segment.hidden.nbytes + sys.getsizeof(segment.text)

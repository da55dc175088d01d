"""Renews this process's leases in Redis, and restores its last writes after a restart of Redis lost them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from service.errors import RevisionConflict, StoreUnavailable
from service.sessions.cache import SessionCache
from service.sessions.redis_server import RedisServer
from service.sessions.session import Session
from service.sessions.session_store import Lease

log = structlog.get_logger(__name__)
Item = TypeVar("Item")

_JOURNAL_S = 10.0  # a Redis that syncs to disk every second loses no writes that are older than this
_MAX_JOURNAL_ENTRIES = 100_000


@dataclass(slots=True)
class ActiveLease:
    """A lease that this process has, and that the renewer's thread renews."""

    lease: Lease
    key: str
    token: bytes  # proves the ownership of the lease to Redis
    incarnation: bytes  # of the session, see `CachedSession`
    revision: int  # of the last save
    renew_at: float  # monotonic time of the next renewal
    is_being_released: bool = False  # a save that releases the lease is in progress: don't renew it


@dataclass(frozen=True, slots=True)
class _JournalEntry:
    """The last write of this process to one session."""

    at: float  # monotonic time
    incarnation: bytes
    revision: int
    nonce: bytes | None  # None if the session was deleted


class LeaseRenewer:
    """Runs a thread until it is closed. Safe for any number of threads.

    It has a journal of the writes of the last seconds. After a restart of Redis the thread writes them again from the
    cache where Redis has lost them, before `RedisServer` allows other calls.
    """

    def __init__(
        self,
        server: RedisServer,
        cache: SessionCache,
        encode: Callable[[Session], bytes],
        lease_s: float,
        now_ms: Callable[[], int | str],
    ) -> None:
        """Start the thread.

        Args:
            server: the server, which is not closed with the renewer.
            cache: has the sessions that are restored.
            encode: makes a session's record.
            lease_s: length of a lease in seconds, from its last renewal.
            now_ms: the time as session.lua takes it: milliseconds since 1970, or "" for the server's clock.
        """
        self._server, self._cache, self._encode, self._now_ms = server, cache, encode, now_ms
        self.lease_ms = round(lease_s * 1000)
        self._lock = threading.Lock()  # guards the following
        self._active: dict[int, ActiveLease] = {}  # by id() of the lease
        self._journal: OrderedDict[str, _JournalEntry] = OrderedDict()  # by the session's key, the oldest write first
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    def start_renewing(self, lease: Lease, key: str, token: bytes, incarnation: bytes) -> None:
        """Renew a lease that was just taken, until `stop_renewing`."""
        active = ActiveLease(lease, key, token, incarnation, lease.session.revision, self.next_renewal())
        with self._lock:
            self._active[id(lease)] = active

    def active_lease(self, lease: Lease) -> ActiveLease:
        """Return the record of a lease. Raises RevisionConflict if the lease was released or lost."""
        active = self._active.get(id(lease))
        if active is None:
            raise RevisionConflict("this operation no longer has the session's lease")
        return active

    def is_leased_here(self, key: str) -> bool:
        """Whether this process has a lease of the session with this key."""
        with self._lock:
            return any(active.key == key for active in self._active.values())

    def stop_renewing(self, lease: Lease) -> ActiveLease | None:
        """Stop renewing a lease and return its record, or None if it was not being renewed."""
        with self._lock:
            return self._active.pop(id(lease), None)

    def record_write(self, key: str, incarnation: bytes, revision: int, nonce: bytes | None) -> None:
        """Add a write to the journal. nonce: of the save, or None if the session was deleted."""
        now = time.monotonic()
        with self._lock:
            self._journal[key] = _JournalEntry(now, incarnation, revision, nonce)
            self._journal.move_to_end(key)
            while len(self._journal) > _MAX_JOURNAL_ENTRIES or now - next(iter(self._journal.values())).at > _JOURNAL_S:
                self._journal.popitem(last=False)

    def next_renewal(self) -> float:
        """Monotonic time of the next renewal of a lease that is taken or renewed now: after a third of its length."""
        return time.monotonic() + self.lease_ms / 3000

    def close(self) -> None:
        """End the thread. Leases that are still active end by themselves in Redis."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self.lease_ms / 6000):
            try:
                after_restart = self._server.ping()
                if after_restart:
                    self._restore_lost_writes()
                self._renew(after_restart)
            except StoreUnavailable:
                continue  # RedisServer has logged it; the next ping tries again
            except Exception as error:
                log.error("renewing the leases in the session store failed", exc_info=error)

    def _renew(self, after_restart: bool) -> None:
        """Renew the leases whose time it is. after_restart: renew all, also those that Redis has lost."""
        now = time.monotonic()
        with self._lock:
            due = [
                active
                for active in self._active.values()
                if (active.renew_at <= now or after_restart) and not active.is_being_released
            ]
        for batch in _batches(due):
            calls = [
                ("renew", active.key, self._now_ms(), active.token, active.revision, self.lease_ms, int(after_restart))
                for active in batch
            ]
            for active, answer in zip(batch, self._server.call_all(calls), strict=True):
                active.renew_at = self.next_renewal()
                on_takeover = active.lease.on_takeover
                if answer[0] != b"ok" and not active.is_being_released and on_takeover is not None:
                    # On a thread of its own, because it saves the session, and other leases must be renewed meanwhile.
                    threading.Thread(target=on_takeover, name="take-over", daemon=True).start()

    def _restore_lost_writes(self) -> None:
        with self._lock:
            entries = list(self._journal.items())
        num_lost = 0
        for batch in _batches(entries):
            answers = self._server.call_all([self._restore_call(key, entry) for key, entry in batch])
            num_lost += sum(answer[0] == b"ok" for answer in answers)
        log.warning(
            "restored the writes that the session store had lost", num_writes=num_lost, num_checked=len(entries)
        )
        self._server.mark_restored()

    def _restore_call(self, key: str, entry: _JournalEntry) -> tuple[Any, ...]:
        cached = self._cache.get(key)
        if entry.nonce is None or cached is None or cached.nonce != entry.nonce:
            return "drop", key, self._now_ms(), entry.incarnation, entry.revision
        record, ttl_ms = self._encode(cached.session), round(cached.session.ttl_s * 1000)
        return "restore", key, self._now_ms(), entry.incarnation, entry.revision, entry.nonce, record, ttl_ms


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Split into batches of a hundred: the record of a large session has some 100 KB."""
    for start in range(0, len(items), 100):
        yield items[start : start + 100]

"""What a process owes a Redis server: to renew its leases, and to put back what it wrote before a restart lost it."""

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

_AT_RISK_S = 10.0  # what a server that writes to disk every second may lose lies not further back than this
_MAX_AT_RISK = 100_000


@dataclass(slots=True)
class ActiveLease:
    """A lease of this process. incarnation, revision: of the session now. due: when it has to be renewed (monotonic).
    is_ending: the save that gives it back is under way.
    """

    lease: Lease
    key: str
    token: bytes
    incarnation: bytes
    revision: int
    due: float
    is_ending: bool = False


@dataclass(frozen=True, slots=True)
class _Written:
    """The last write to a session. nonce: None if it was deleted."""

    at: float
    incarnation: bytes
    revision: int
    nonce: bytes | None


class LeaseRenewer:
    """RunRegistry a thread until it is closed. Safe for any number of threads.

    lease_s: how long a lease is good for that is not renewed. now_ms: for the script. cache: what was written lately is
    put back from there. encode: a session as its record.
    """

    def __init__(
        self,
        server: RedisServer,
        cache: SessionCache,
        encode: Callable[[Session], bytes],
        lease_s: float,
        now_ms: Callable[[], int | str],
    ) -> None:
        self._server, self._cache, self._encode, self._now_ms = server, cache, encode, now_ms
        self.lease_ms = round(lease_s * 1000)
        self._lock = threading.Lock()  # guards what follows
        self._held: dict[int, ActiveLease] = {}  # by the lease's identity
        self._at_risk: OrderedDict[str, _Written] = OrderedDict()  # the latest last
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    def hold(self, lease: Lease, key: str, token: bytes, incarnation: bytes) -> None:
        """Renew a lease from now on."""
        with self._lock:
            self._held[id(lease)] = ActiveLease(lease, key, token, incarnation, lease.session.revision, self.next_due())

    def holding(self, lease: Lease) -> ActiveLease:
        """What is known of a lease. Raises RevisionConflict if it was given back."""
        held = self._held.get(id(lease))
        if held is None:
            raise RevisionConflict("the session is no longer reserved for this operation")
        return held

    def holds(self, key: str) -> bool:
        """Whether this process has it leased."""
        with self._lock:
            return any(held.key == key for held in self._held.values())

    def let_go(self, lease: Lease) -> ActiveLease | None:
        """Renew it no longer; None: that was done."""
        with self._lock:
            return self._held.pop(id(lease), None)

    def wrote(self, key: str, incarnation: bytes, revision: int, nonce: bytes | None) -> None:
        """Remember a write for a while. nonce: None if the session was deleted."""
        now = time.monotonic()
        with self._lock:
            self._at_risk[key] = _Written(now, incarnation, revision, nonce)
            self._at_risk.move_to_end(key)
            while len(self._at_risk) > _MAX_AT_RISK or now - next(iter(self._at_risk.values())).at > _AT_RISK_S:
                self._at_risk.popitem(last=False)

    def next_due(self) -> float:
        """When a lease that was taken or renewed now has to be renewed."""
        return time.monotonic() + self.lease_ms / 3000

    def close(self) -> None:
        """End the thread. Leases that are held run out."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self.lease_ms / 6000):
            try:
                has_changed = self._server.look()
                if has_changed:
                    self._put_back()
                self._renew(again=has_changed)
            except StoreUnavailable:
                continue  # it was logged, and is asked again
            except Exception as error:
                log.error("looking after the session store failed", exc_info=error)

    def _renew(self, again: bool) -> None:
        """Prolong what has been held for a while. again: also what the server doesn't know of any more."""
        now = time.monotonic()
        with self._lock:
            due = [held for held in self._held.values() if (held.due <= now or again) and not held.is_ending]
        for batch in _batches(due):
            calls = [
                ("renew", held.key, self._now_ms(), held.token, held.revision, self.lease_ms, int(again))
                for held in batch
            ]
            for held, answer in zip(batch, self._server.call_all(calls), strict=True):
                held.due = self.next_due()
                if answer[0] != b"ok" and not held.is_ending and held.lease.on_takeover is not None:
                    # On a thread of its own: the run is saved before it ends, and others have to be renewed meanwhile.
                    threading.Thread(target=held.lease.on_takeover, name="give up", daemon=True).start()

    def _put_back(self) -> None:
        with self._lock:
            written = list(self._at_risk.items())
        num_lost = 0
        for batch in _batches(written):
            answers = self._server.call_all([self._putting_back(key, write) for key, write in batch])
            num_lost += sum(answer[0] == b"ok" for answer in answers)
        log.warning("put back what the session store had lost", num_writes=num_lost, num_checked=len(written))
        self._server.put_back()

    def _putting_back(self, key: str, write: _Written) -> tuple[Any, ...]:
        cached = self._cache.get(key)
        if write.nonce is None or cached is None or cached.nonce != write.nonce:
            return "drop", key, self._now_ms(), write.incarnation, write.revision
        record, ttl_ms = self._encode(cached.session), round(cached.session.ttl_s * 1000)
        return "restore", key, self._now_ms(), write.incarnation, write.revision, write.nonce, record, ttl_ms


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """A hundred at a time: records of large sessions are some 100 KB each."""
    for start in range(0, len(items), 100):
        yield items[start : start + 100]

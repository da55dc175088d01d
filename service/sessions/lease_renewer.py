"""What a process owes a Redis server: it renews its leases, and restores what it wrote before a restart lost it."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import structlog

from service.errors import Overloaded, RevisionConflict, StoreUnavailable
from service.sessions.cache import CachedSession, SaveId, SessionCache
from service.sessions.record import Record
from service.sessions.redis_server import RedisServer
from service.sessions.segment_store import SegmentStore
from service.sessions.session import Session, SessionKey
from service.sessions.session_index import SessionIndex

log = structlog.get_logger(__name__)
Item = TypeVar("Item")

_AT_RISK_S = 10.0  # a server that writes to disk every second loses nothing that is older than this
_MAX_AT_RISK = 100_000
_REMEMBERED_S = 300.0  # half as long as session.lua remembers deletions
_PROLONGED_S = 60.0  # shorter than what Lifetimes has to spare
_BATCH = 100  # sessions in one exchange: records of large ones have some 100 KB each
_SWEEP_S = 60.0  # between two looks at all cached copies


class RenewedLease(Protocol):
    """What the renewer reads and writes of a lease."""

    session: Session
    save_id: SaveId
    saved: CachedSession
    token: bytes
    due: float
    is_ending: bool
    on_takeover: Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class _Write:
    """The last save of a session that this process has made or read."""

    made_at: float  # monotonic
    save_id: SaveId
    is_deletion: bool
    stored_at: float  # when the server got it, or got it again; monotonic


class LeaseRenewer:
    """Renews leases and keeps a journal of the last writes, on a thread that runs until it is closed.

    Any number of threads may call.

    Args:
        server: Where the sessions are stored.
        cache: Lost writes are restored from it.
        index: Lists the sessions.
        segments: What sessions share.
        encode: Makes a session's record.
        redis_key: Gives a session's key in Redis.
        lease_s: How long a lease is valid that is not renewed.
        now_ms: The time for the script; see RedisStore.
    """

    def __init__(
        self,
        server: RedisServer,
        cache: SessionCache,
        index: SessionIndex,
        segments: SegmentStore,
        encode: Callable[[Session], Record],
        redis_key: Callable[[SessionKey], str],
        lease_s: float,
        now_ms: Callable[[], int | str],
    ) -> None:
        self._server, self._cache, self._index, self._segments, self._encode = server, cache, index, segments, encode
        self._redis_key, self._now_ms = redis_key, now_ms
        self.lease_ms = round(lease_s * 1000)
        self._lock = threading.Lock()  # guards the leases and the journal
        self._leases: dict[int, RenewedLease] = {}  # by the object's id
        self._leased: dict[SessionKey, int] = {}  # how many leases there are of each session
        self._journal: OrderedDict[SessionKey, _Write] = OrderedDict()  # the latest last
        self._parted: OrderedDict[SessionKey, SaveId] = OrderedDict()
        # When the server was heard of last before a change: what it got long before then is on its disk.
        self._last_contact = time.monotonic()
        self._next_prolong = time.monotonic() + _PROLONGED_S
        self._next_sweep = time.monotonic() + _SWEEP_S
        self._unswept: Iterator[tuple[SessionKey, SaveId]] = iter(())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    def start_renewing(self, lease: RenewedLease) -> None:
        """Renew a lease from now on."""
        lease.due = self.next_due()
        key = lease.session.key
        with self._lock:
            self._leases[id(lease)] = lease
            self._leased[key] = self._leased.get(key, 0) + 1

    def stop_renewing(self, lease: RenewedLease) -> bool:
        """Renew a lease no longer. Returns False if that was done before."""
        key = lease.session.key
        with self._lock:
            if self._leases.pop(id(lease), None) is None:
                return False
            self._leased[key] -= 1
            if not self._leased[key]:
                del self._leased[key]
            return True

    def require_lease(self, lease: RenewedLease) -> None:
        """Raise RevisionConflict if the lease was given back."""
        if id(lease) not in self._leases:
            raise RevisionConflict("this operation no longer has the session's lease")

    def is_leased_here(self, key: SessionKey) -> bool:
        """Whether this process holds a lease of the session."""
        return key in self._leased

    def record_save(self, key: SessionKey, save_id: SaveId) -> None:
        """Note a save in the journal, from which it is restored if a restart of the server loses it.

        Saves that were read are noted too: a client has seen them, and the process that made them may be dead.
        """
        self._record(key, save_id, is_deletion=False)

    def record_deletion(self, key: SessionKey, save_id: SaveId) -> None:
        """Note that the session was deleted by this save: an older copy must not come back."""
        self._record(key, save_id, is_deletion=True)

    def parted(self, key: SessionKey) -> SaveId | None:
        """Return a save that clients have seen, and without which others continued when the server had lost it.

        These clients must get to know that.
        """
        return self._parted.get(key)

    def next_due(self) -> float:
        """When a lease that is taken or renewed now has to be renewed (monotonic)."""
        return time.monotonic() + self.lease_ms / 3000

    def close(self) -> None:
        """End the thread. Leases that are held end by themselves."""
        self._closing.set()
        self._thread.join()

    def _record(self, key: SessionKey, save_id: SaveId, is_deletion: bool) -> None:
        now = time.monotonic()
        with self._lock:
            before = self._journal.get(key)
            if before is not None and before.save_id.is_later_than(save_id):
                return  # an answer that arrived late
            self._parted.pop(key, None)
            self._journal[key] = _Write(now, save_id, is_deletion, now)
            self._journal.move_to_end(key)
            while len(self._journal) > _MAX_AT_RISK or now - next(iter(self._journal.values())).stored_at > _AT_RISK_S:
                self._journal.popitem(last=False)

    def _run(self) -> None:
        while not self._closing.wait(self.lease_ms / 6000):
            try:
                if self._server.ping():
                    self._restore()
                self._last_contact = time.monotonic()
                self._renew()
                self._prolong()
                self._sweep()
            except StoreUnavailable:
                continue  # it was logged, and the server is asked again
            except Exception as error:
                log.error("looking after the session store failed", exc_info=error)

    def _renew(self, again: bool = False) -> None:
        """Renew the leases that are due. again: all of them, also those that the server no longer knows."""
        now = time.monotonic()
        with self._lock:
            due = [lease for lease in self._leases.values() if (lease.due <= now or again) and not lease.is_ending]
        for batch in _batches(due):
            calls = [
                self._command(
                    "renew", lease.session.key, lease.token, *_parts(lease.save_id), self.lease_ms, int(again)
                )
                for lease in batch
            ]
            for lease, answer in zip(batch, self._server.call_all(calls, one_by_one=True), strict=True):
                lease.due = self.next_due()
                if answer[0] == b"ok":
                    continue
                if answer[0] == b"none":
                    self._server.require_intact(self._redis_key(lease.session.key), in_recovery=True)
                if not lease.is_ending and lease.on_takeover is not None:
                    # On a thread of its own: the run is saved before it ends, and other leases are due meanwhile.
                    threading.Thread(target=lease.on_takeover, name="hand over", daemon=True).start()

    def _prolong(self) -> None:
        """Once a minute, let what leased sessions need live as long as they do: a renewal is life without a save."""
        if time.monotonic() < self._next_prolong:
            return
        self._next_prolong = time.monotonic() + _PROLONGED_S
        with self._lock:
            leased = [lease.saved for lease in self._leases.values()]
        for saved in leased:
            self._index.prolong(saved.session.key, saved.session.ttl_s)
            self._segments.prolong(saved)

    def _sweep(self) -> None:
        """Once a minute, begin to look at all cached copies, and drop those of sessions that are no longer there."""
        batch = [*islice(self._unswept, _BATCH)]
        if not batch and time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP_S
            self._unswept = iter(self._cache.save_ids())
        answers = (
            self._server.call_all([self._command("exists", key) for key, _ in batch], one_by_one=True) if batch else []
        )
        for (key, save_id), answer in zip(batch, answers, strict=True):
            if answer[0] == b"gone" and answer[1] == save_id.nonce:  # else another process has saved since
                self._cache.expire(key, save_id)
            elif answer[0] != b"ok":
                self._cache.drop(key, save_id)

    def _restore(self) -> None:
        """Store again what the server has lost of the journal, and remember as lost what can't be stored again.

        Until this is done, every process waits for it: each batch tells them that it is under way.
        """
        with self._lock:
            since = self._last_contact - _AT_RISK_S
            at_risk = [(key, write) for key, write in self._journal.items() if write.stored_at >= since]
        self._segments.forget()
        counts = Counter(num_checked=len(at_risk))
        for batch in _batches(at_risk):
            self._restore_batch(batch, counts)
            self._server.attend()
        self._renew(again=True)
        log.warning("restored what the session store had lost", **counts)
        sessions = [key for key, write in at_risk if not write.is_deletion]
        cached = [saved for saved in map(self._cache.get, sessions) if saved is not None]
        with suppress(Overloaded):  # lists lack these sessions until they are used again
            self._index.restore(sessions, max((saved.session.ttl_s for saved in cached), default=0))
        with self._lock:  # the next restart may lose all this again
            now = time.monotonic()
            for key, write in at_risk:
                if self._journal.get(key) is write:
                    self._journal[key] = replace(write, stored_at=now)
                    self._journal.move_to_end(key)
        self._server.mark_restored()

    def _restore_batch(self, batch: Sequence[tuple[SessionKey, _Write]], counts: Counter[str]) -> None:
        cached = [self._cache.get(key) for key, write in batch if not write.is_deletion]
        self._segments.restore([saved for saved in cached if saved is not None])  # before the records that need them
        # Records are sent only for what the server lacks: after a clean restart that is nothing.
        questions = [self._command("lacks", key, *_parts(write.save_id)) for key, write in batch]
        answers = dict(
            zip(batch, (answer[0] for answer in self._server.call_all(questions, one_by_one=True)), strict=True)
        )
        with self._lock:
            for (key, write), answer in answers.items():
                if answer == b"parted":
                    counts["num_parted"] += 1
                    self._parted[key] = write.save_id
            while len(self._parted) > _MAX_AT_RISK:
                self._parted.popitem(last=False)
        commands = [self._restoring(*item) for item, answer in answers.items() if answer == b"yes"]
        for command, answer in zip(commands, self._server.call_all(commands, one_by_one=True), strict=True):
            counts["num_restored"] += command[0] == "restore" and answer[0] == b"ok"
            counts["num_lost"] += command[0] == "bury" and b"lost" in command and answer[0] == b"ok"

    def _restoring(self, key: SessionKey, write: _Write) -> tuple[Any, ...]:
        age_s = time.monotonic() - write.made_at
        # A session that isn't there at all may have been deleted, and the server has forgotten it since.
        known, only_over = _parts(write.save_id), int(age_s > _REMEMBERED_S)
        if write.is_deletion:
            return self._command("bury", key, *known, b"deleted", only_over)
        cached = self._cache.get(key)
        if cached is None or cached.save_id != write.save_id:
            return self._command("bury", key, *known, b"lost", only_over)
        session = cached.session
        ttl_ms = round(session.ttl_s * 1000)
        left_ms = max(1, ttl_ms - round(age_s * 1000))
        record = self._encode(session)
        return self._command("restore", key, *known, record.data, ttl_ms, left_ms, record.settled, only_over)

    def _command(self, operation: str, key: SessionKey, *arguments: Any) -> tuple[Any, ...]:
        return operation, self._redis_key(key), self._now_ms(), self.lease_ms, *arguments


def _parts(save_id: SaveId) -> tuple[bytes, int, bytes]:
    return save_id.incarnation, save_id.revision, save_id.nonce


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]

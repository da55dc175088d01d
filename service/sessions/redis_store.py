"""The session store in Redis: sessions outlive the process, and any of several replicas may continue them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from service.arrays import read_state
from service.errors import (
    GruServeError,
    OutcomeUnknown,
    Overloaded,
    RevisionConflict,
    SessionBusy,
    SessionExists,
    SessionGone,
    SessionLost,
    SessionNotFound,
)
from service.sessions.cache import CachedSession, SaveId, SessionCache
from service.sessions.lease_renewer import LeaseRenewer
from service.sessions.record import Record, decode, decode_summary, encode
from service.sessions.redis_server import KeyOccupied, RedisServer
from service.sessions.segment_store import SegmentStore
from service.sessions.session import Session, SessionKey, SessionSummary
from service.sessions.session_index import SessionIndex, batches
from service.sessions.session_store import Answer, Change, Lease, Operation, safe_to_retry

_POLL_S = 0.03  # between two attempts to get a lease that another process holds
_LISTED = 200  # sessions in one exchange
_CHANGED = "another server has changed the session in the meantime"


@contextmanager
def _session_lost() -> Iterator[None]:
    """Map an answer that concerns this session's key alone: no repetition helps."""
    try:
        yield
    except KeyOccupied:
        raise SessionLost(
            "the session's record is damaged, or the session store has something else in its place: continue under "
            "another id"
        ) from None


class _SessionDeleted(SessionNotFound):
    """The session was deleted lately."""


class RedisLease:
    """Implements `Lease`. A thread of the store renews it; the lease of a process that dies ends soon by itself.

    It is fenced: a holder that lost it can't save.
    """

    def __init__(self, store: RedisStore, saved: CachedSession, token: bytes) -> None:
        self._store = store
        self.token = token  # random; names this lease in Redis
        self.set_saved(saved)
        self.due = 0.0  # when it has to be renewed; monotonic
        self.is_ending = False  # the save or release that gives it back is under way
        # The last save and its nonce, if the server didn't say whether it was done.
        self.unanswered: tuple[Session, bytes] | None = None
        self.on_takeover: Callable[[], None] | None = None

    def set_saved(self, saved: CachedSession) -> None:
        """Note the last save of the session."""
        self.saved, self.session, self.save_id = saved, saved.session, saved.save_id

    def save(self, session: Session, *, release: bool = False) -> None:
        """See Lease."""
        self._store._save(self, session, release)

    def release(self) -> None:
        """See Lease. If the server can't be reached, the lease ends by itself."""
        self._store._release(self)


class RedisStore:
    """Implements `SessionStore`. A write-through cache avoids re-reading records; Redis still validates every use.

    Args:
        server: Closed with the store.
        segment_chars: See Retention.
        cache_bytes: Memory for sessions that were in use lately.
        prefix: Of every key in Redis.
        lease_s: How long a lease is valid that is not renewed.
        clock: Seconds since 1970; None for the server's clock, which is the same for all replicas.
    """

    outlives_process = True

    def __init__(
        self,
        server: RedisServer,
        segment_chars: int,
        cache_bytes: int = 2**26,
        prefix: str = "gru-serve:",
        lease_s: float = 1.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._server, self._prefix, self._clock = server, prefix, clock
        # For tokens and nonces, which have to be distinct, not secret. The operating system seeds it, and is not asked
        # again: that would release the interpreter's lock, and a busy server waits long to get it back.
        self._random = random.Random()  # noqa: S311
        self._cache = SessionCache(cache_bytes)
        self._encode = partial(encode, segment_chars=segment_chars)
        self._segments = SegmentStore(server, prefix, segment_chars)
        self._index = SessionIndex(server, prefix, self._summaries)
        self._renewer = LeaseRenewer(
            server, self._cache, self._index, self._segments, self._encode, self._redis_key, lease_s, self._now_ms
        )

    def create(self, session: Session) -> Session:
        """See SessionStore. Takes one exchange with the server, and one or two for texts with stored segments."""
        session = replace(session, created_at=self._now())
        nonce = self._new_nonce()
        record = self._encode(session)
        self._segments.write(record.segments, nonce, session.ttl_s)
        indexing = self._index.adding(session.key, session.ttl_s)
        try:
            answer = self._call_create(session.key, indexing, nonce, record.data, _ms(session.ttl_s), record.settled)
        except Overloaded:
            self._segments.release(record.segments, nonce)
            raise
        if answer[0] == b"exists":
            self._segments.release(record.segments, nonce)
            raise SessionExists(f"there is already a session {session.id}")
        session = self._saved(session, record, answer).session
        self._index.check_some(session.owner)
        return session

    def load(self, key: SessionKey) -> Session:
        """See SessionStore."""
        cached = self._cache.get(key)
        return self._loaded(key, cached, self._call("load", key, *self._seen(key, cached))).session

    def update(self, key: SessionKey, change: Change[Answer], *, idempotent: bool = False) -> Answer:
        """See SessionStore. Takes one exchange with the server if the cached copy is current, else two or three."""
        with safe_to_retry(idempotent):
            return self._apply(key, change, keep=False)[1]

    def begin(self, key: SessionKey, change: Change[Answer], *, take_over: bool = False) -> tuple[Lease | None, Answer]:
        """See SessionStore. Beginning is always safe to retry: it changes no text."""
        with safe_to_retry():
            return self._apply(key, change, keep=True, take_over=take_over)

    def delete(self, key: SessionKey) -> None:
        """See SessionStore. Deleting is always safe to retry."""
        with safe_to_retry():
            try:
                lease = self._lease(key, take_over=False)
            except _SessionDeleted:
                return  # the answer to this may have been lost
            try:
                answer = self._call("delete", key, lease.token, self._new_nonce())
                if answer[0] == b"conflict":
                    raise RevisionConflict(_CHANGED)
                before = lease.save_id
                self._cache.drop(key)
                self._renewer.record_deletion(key, SaveId(before.incarnation, before.revision + 1, answer[1]))
                self._index.discard(key.owner, [key.id])
                self._segments.release(self._segments.of(lease.session), before.creation)
            finally:
                self._renewer.stop_renewing(lease)

    def page(self, owner: str, after: str, limit: int) -> list[SessionSummary]:
        """See SessionStore. Takes two exchanges for each 200 sessions, and two at the end of the list."""
        found: list[SessionSummary] = []
        while len(found) < limit and (ids := self._index.ids(owner, after, min(limit - len(found), _LISTED))):
            summaries = self._summaries(owner, ids)
            found += [summary for summary in summaries.values() if summary is not None]
            self._index.discard(owner, [session_id for session_id in ids if session_id not in summaries])
            after = ids[-1]
        return found

    def __len__(self) -> int:
        """The number of sessions in this process's cache."""
        return len(self._cache)

    @property
    def num_bytes(self) -> int:
        """About how much memory the cache takes."""
        return self._cache.num_bytes

    @property
    def num_evicted(self) -> int:
        """How many sessions the cache has dropped to make room. They are still in Redis."""
        return self._cache.num_evicted

    @property
    def num_expired(self) -> int:
        """How many sessions have expired that this process saved last. It notices that within about a minute.

        Those are missing that the cache had evicted by then, or whose process has died.
        """
        return self._cache.num_expired

    def check(self) -> None:
        """See SessionStore."""
        self._server.check(explain=True)

    def close(self) -> None:
        """See SessionStore."""
        self._renewer.close()
        self._server.close()

    def _summaries(self, owner: str, ids: Sequence[str]) -> dict[str, SessionSummary | None]:
        """Return those ids that have a session, in the same order, with its summary: None if it can't be read.

        Takes one exchange for each 200.
        """
        self._server.check()
        summaries: dict[str, SessionSummary | None] = {}
        for batch in batches(ids, _LISTED):
            keys = [SessionKey(owner, session_id) for session_id in batch]
            calls = [("summarize", self._redis_key(key), self._now_ms(), self._renewer.lease_ms) for key in keys]
            for key, answer in zip(keys, self._server.call_all(calls, one_by_one=True), strict=True):
                if answer[0] == b"refused":
                    summaries[key.id] = None
                if answer[0] == b"ok":
                    summaries[key.id] = None
                    with suppress(SessionLost):  # perhaps another version of the service wrote the record
                        summaries[key.id] = decode_summary(answer[2], key.id, int(answer[1]) / 1000)
        return summaries

    def _apply(
        self, key: SessionKey, change: Change[Answer], keep: bool, take_over: bool = False
    ) -> tuple[RedisLease | None, Answer]:
        """Change and save the cached copy in one exchange if it is current; else lease the session, change and save it.

        Returns the lease if `keep` and if there was something to save.
        """
        cached = None if take_over or self._renewer.is_leased_here(key) else self._cache.get(key)
        if cached is not None:
            try:
                changed, answer = change(cached.session)
            except GruServeError:
                cached = None  # perhaps only because the copy is stale: the current session decides
            else:
                if changed is not cached.session:
                    is_saved, lease = self._compare_and_save(cached, changed, keep)
                    if is_saved:
                        return lease, answer
                    cached = None
        lease = self._lease(key, take_over)
        try:
            # A change that had nothing to save in a copy that is current need not run again.
            if cached is None or cached.save_id != lease.save_id:
                changed, answer = change(lease.session)
                if changed is not lease.session:
                    lease.save(changed, release=not keep)
                    return lease if keep else None, answer
        except BaseException:
            lease.release()
            raise
        lease.release()
        return None, answer

    def _compare_and_save(self, cached: CachedSession, changed: Session, keep: bool) -> tuple[bool, RedisLease | None]:
        """Save a change of the cached copy in one exchange, if the copy is current and not leased.

        Returns whether it was saved, and the lease if `keep`.
        """
        token, nonce = self._new_token(), self._new_nonce()
        lease_ms = self._renewer.lease_ms if keep else ""
        record, ttl_ms = self._encode(changed), _ms(changed.ttl_s)
        self._segments.write(record.segments, cached.save_id.creation, changed.ttl_s)
        settled = _changed_settled(record, cached)
        saving = nonce, record.data, ttl_ms, lease_ms, settled
        answer = self._call("claim", changed.key, *_parts(cached.save_id), token, *saving)
        if answer[0] == b"conflict":
            return False, None
        saved = self._saved(changed, record, answer)
        if not keep:
            return True, None
        lease = RedisLease(self, saved, token)
        self._renewer.start_renewing(lease)
        return True, lease

    def _lease(self, key: SessionKey, take_over: bool) -> RedisLease:
        token, lease_ms = self._new_token(), self._renewer.lease_ms
        deadline = time.monotonic() + 2 * lease_ms / 1000
        while True:
            cached = self._cache.get(key)
            answer = self._call("lease", key, *self._seen(key, cached), token, lease_ms, int(take_over))
            if answer[0] != b"busy":
                break
            if not take_over or self._renewer.is_leased_here(key) or time.monotonic() > deadline:
                raise SessionBusy("another operation on this session is in progress: try again when it is finished")
            time.sleep(_POLL_S)
        try:
            loaded = self._loaded(key, cached, answer)
        except GruServeError:
            self._free(key, token)
            raise
        lease = RedisLease(self, loaded, token)
        self._renewer.start_renewing(lease)
        self._prolong(loaded)
        return lease

    def _save(self, lease: RedisLease, session: Session, release: bool) -> None:
        self._renewer.require_lease(lease)
        if session.revision != lease.session.revision or session.key != lease.session.key:
            raise RevisionConflict("another operation has changed the session in the meantime")
        lease.is_ending = release
        try:
            if lease.unanswered is not None:
                self._settle(lease, *lease.unanswered)  # this save has to follow it
            self._save_once(lease, session, self._new_nonce(), release)
        except OutcomeUnknown:
            if release:
                self._renewer.stop_renewing(lease)  # it ends by itself
            raise
        except RevisionConflict:
            self._renewer.stop_renewing(lease)
            raise
        if release:
            self._renewer.stop_renewing(lease)

    def _settle(self, lease: RedisLease, session: Session, nonce: bytes) -> None:
        """Find out whether the last save was done, and do it if it may still be done."""
        if SaveId(b"", 0, nonce).epoch == self._server.epoch:
            self._save_once(lease, session, nonce, release=False)
            return
        # The server has changed since. Either it has that save, or it never will.
        answer = self._call("load", session.key, *_parts(lease.save_id))
        lease.unanswered = None
        if answer[0] == b"ok" and answer[3] == nonce:
            lease.set_saved(self._saved(session, self._encode(session), [*answer[:3], answer[4], nonce]))

    def _save_once(self, lease: RedisLease, session: Session, nonce: bytes, release: bool) -> None:
        """Save. If a save with this nonce was done before, nothing changes."""
        record, saved = self._encode(session), lease.saved
        self._segments.write(record.segments, lease.save_id.creation, session.ttl_s)
        lease_ms, ttl_ms = "" if release else self._renewer.lease_ms, _ms(session.ttl_s)
        settled = _changed_settled(record, saved)
        try:
            answer = self._call(
                "save", session.key, lease.token, *_parts(saved.save_id), nonce, record.data, ttl_ms, lease_ms, settled
            )
        except OutcomeUnknown:
            lease.unanswered = session, nonce
            raise
        lease.unanswered = None
        if answer[0] == b"none":
            self._server.require_intact(self._redis_key(session.key))
            raise SessionLost("the session store has lost this session: create it again")
        if answer[0] == b"conflict":
            raise RevisionConflict(_CHANGED)
        lease.set_saved(self._saved(session, record, answer))
        # A lease that another process requests is renewed at once, and then handed over: its saves may be so frequent
        # that no renewal would ever be due.
        lease.due = self._renewer.next_due() if answer[0] != b"takeover" else 0.0

    def _release(self, lease: RedisLease) -> None:
        if self._renewer.stop_renewing(lease):
            self._free(lease.session.key, lease.token)

    def _call(self, operation: Operation, key: SessionKey, *arguments: Any) -> list[Any]:
        with _session_lost():
            times = self._now_ms(), self._renewer.lease_ms
            return self._server.call(operation, self._redis_key(key), *times, *arguments)

    def _call_create(self, key: SessionKey, indexing: tuple[Any, ...], *arguments: Any) -> list[Any]:
        times = self._now_ms(), self._renewer.lease_ms
        with _session_lost():
            return self._server.call_between(indexing, "create", self._redis_key(key), *times, *arguments)

    def _now(self) -> float:
        """Seconds since 1970, for what only this process sees."""
        return self._clock() if self._clock is not None else time.time()

    def _new_nonce(self) -> bytes:
        return self._server.epoch + self._new_token()

    def _new_token(self) -> bytes:
        return self._random.getrandbits(96).to_bytes(12, "big")

    def _now_ms(self) -> int | str:
        """Milliseconds since 1970 for the script; "" makes it use the server's clock."""
        return round(self._clock() * 1000) if self._clock is not None else ""

    def _loaded(self, key: SessionKey, cached: CachedSession | None, answer: list[Any]) -> CachedSession:
        """Read an answer to `load` or `lease`. cached: the copy whose save the call named."""
        word = answer[0]
        if word == b"lost":
            raise SessionLost("the session store has lost the last save of this session: continue under another id")
        if word == b"gone":
            raise SessionGone("this session has expired: create it again")
        if word == b"none":
            self._server.require_intact(self._redis_key(key))
            raise SessionNotFound("there is no such session: create it first")
        if word == b"deleted":
            self._cache.drop(key)
            self._renewer.record_deletion(key, SaveId(answer[1], int(answer[2]), answer[3]))
            raise _SessionDeleted("there is no such session: create it first")
        save_id, expires_at = SaveId(answer[1], int(answer[2]), answer[3]), int(answer[4]) / 1000
        if len(answer) > 5:
            record = Record(answer[5] or b"", answer[6] if len(answer) > 6 else b"")
            read = partial(self._segments.read, cached=cached.session.text if cached is not None else None)
            session = decode(record, read, key, save_id.revision, expires_at)
            loaded = CachedSession(session, save_id, record.settled_hash)
            self._cache.put(key, loaded)
            self._renewer.record_save(key, save_id)
            if loaded.settled_hash is None:  # a version of the service that has no index wrote it
                with suppress(GruServeError):
                    self._index.add(key, session.ttl_s)
            return loaded
        if cached is None:  # the script leaves the record out only for a caller that has it
            raise SessionLost("the session's record is incomplete: create the session again under another id")
        if cached.session.expires_at == expires_at:
            return cached
        return replace(cached, session=replace(cached.session, expires_at=expires_at))

    def _saved(self, session: Session, record: Record, answer: list[Any]) -> CachedSession:
        """Read an answer to an operation that saved; the session as it is stored now."""
        save_id, expires_at = SaveId(answer[1], int(answer[2]), answer[4]), int(answer[3]) / 1000
        text = session.text.with_hidden(read_state(session.hidden))
        session = replace(session, text=text, revision=save_id.revision, expires_at=expires_at)
        saved = CachedSession(session, save_id, record.settled_hash, is_own=True)
        self._cache.put(session.key, saved)
        self._renewer.record_save(session.key, save_id)
        self._prolong(saved)
        return saved

    def _seen(self, key: SessionKey, cached: CachedSession | None) -> tuple[bytes, int, bytes]:
        """Return the last save that this process knows. The script leaves out a record that is the same."""
        save_id = cached.save_id if cached is not None else self._renewer.parted(key)
        return _parts(save_id) if save_id is not None else (b"", 0, b"")

    def _prolong(self, saved: CachedSession) -> None:
        """Let everything that a session needs live as long as it does, now that it was used.

        After a save that sends commands only if the server has changed meanwhile, and may have lost the segments.
        """
        self._index.prolong(saved.session.key, saved.session.ttl_s)
        self._segments.prolong(saved)

    def _free(self, key: SessionKey, token: bytes) -> None:
        with suppress(GruServeError):
            self._call("release", key, token)

    def _redis_key(self, key: SessionKey) -> str:
        return f"{self._prefix}{key.owner}/{key.id}"


def _parts(save_id: SaveId) -> tuple[bytes, int, bytes]:
    return save_id.incarnation, save_id.revision, save_id.nonce


def _changed_settled(record: Record, saved: CachedSession) -> bytes:
    """Return the settled text for the script: "=" if it is the same as in the save before."""
    return b"=" if saved.settled_hash == record.settled_hash else record.settled


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

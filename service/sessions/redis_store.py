"""The session store in Redis: sessions outlive the process, and all replicas share them."""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from service.arrays import read_state
from service.errors import (
    GruServeError,
    OutcomeUnknown,
    RevisionConflict,
    SessionBusy,
    SessionExists,
    SessionGone,
    SessionLost,
    SessionNotFound,
)
from service.sessions.cache import CachedSession, SessionCache
from service.sessions.lease_renewer import LeaseRenewer
from service.sessions.record import decode, encode
from service.sessions.redis_server import RedisServer
from service.sessions.session import Session
from service.sessions.session_store import Lease, Operation

_POLL_S = 0.03  # between two attempts to take over a lease
_GLOB = str.maketrans({char: f"\\{char}" for char in "*?[]\\"})


class RedisStore:
    """Implements `SessionStore`. A write-through cache avoids re-reading records; Redis still validates every use.

    A lease lasts `lease_s` seconds and is renewed by a thread, so a session that a dead process has leased is soon
    available again. Leases are fenced: a process that has lost its lease can't save.
    """

    def __init__(
        self,
        server: RedisServer,
        segment_chars: int,
        cache_bytes: int = 2**26,
        prefix: str = "gru-serve:",
        lease_s: float = 1.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Start the renewer's thread.

        Args:
            server: the server, which is closed with the store.
            segment_chars: see `Retention`.
            cache_bytes: memory for recently used sessions.
            prefix: of all keys. Stores with the same prefix share their sessions.
            lease_s: length of a lease.
            clock: returns seconds since 1970; None for the server's clock.
        """
        self._server, self._prefix, self._clock = server, prefix, clock
        self._cache = SessionCache(cache_bytes)
        self._encode = partial(encode, segment_chars=segment_chars)
        self._renewer = LeaseRenewer(server, self._cache, self._encode, lease_s, self._now_ms)

    def create(self, session: Session) -> Session:
        """See SessionStore."""
        session = replace(session, created_at=self._now())
        key, nonce = self._key(session.owner, session.id), _new_nonce()
        answer = self._call("create", key, nonce, self._encode(session), _ms(session.ttl_s))
        if answer[0] == b"exists":
            raise SessionExists(f"there is already a session {session.id}")
        return self._saved(key, session, nonce, answer)

    def load(self, owner: str, session_id: str) -> Session:
        """See SessionStore."""
        key = self._key(owner, session_id)
        cached = self._cache.get(key)
        return self._loaded(owner, session_id, cached, self._call("load", key, *_known_save(cached)))

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:
        """See SessionStore. Waits for a takeover for at most twice the length of a lease."""
        key, token = self._key(owner, session_id), _new_nonce()
        deadline = time.monotonic() + 2 * self._renewer.lease_ms / 1000
        while True:
            cached = self._cache.get(key)
            answer = self._call("lease", key, *_known_save(cached), token, self._renewer.lease_ms, int(take_over))
            if answer[0] != b"busy":
                break
            if not take_over or self._renewer.is_leased_here(key) or time.monotonic() > deadline:
                raise SessionBusy("another operation on this session is in progress: try again when it is finished")
            time.sleep(_POLL_S)
        try:
            lease = Lease(self._loaded(owner, session_id, cached, answer))
        except SessionLost:
            self._release(key, token)
            raise
        self._renewer.start_renewing(lease, key, token, answer[1])
        return lease

    def cached_copy(self, owner: str, session_id: str) -> Session | None:
        """See SessionStore."""
        cached = self._cache.get(self._key(owner, session_id))
        return cached.session if cached is not None else None

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:
        """See SessionStore."""
        key, token, nonce = self._key(session.owner, session.id), _new_nonce(), _new_nonce()
        cached = self._cache.get(key)
        if cached is None or cached.session is not session:
            return None
        record, lease_ms = self._encode(changed), "" if release else self._renewer.lease_ms
        answer = self._call("claim", key, *_known_save(cached), token, nonce, record, _ms(changed.ttl_s), lease_ms)
        if answer[0] == b"conflict":
            return None
        lease = Lease(self._saved(key, changed, nonce, answer))
        if not release:
            self._renewer.start_renewing(lease, key, token, answer[1])
        return lease

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """See SessionStore."""
        old, active = lease.session, self._renewer.active_lease(lease)
        if session.revision != active.revision or (session.owner, session.id) != (old.owner, old.id):
            raise RevisionConflict("another operation has changed the session in the meantime")
        key, nonce = self._key(session.owner, session.id), _new_nonce()
        lease_ms = "" if release else self._renewer.lease_ms
        active.is_being_released = release
        try:
            answer = self._call(
                "save", key, active.token, active.revision, nonce, self._encode(session), _ms(session.ttl_s), lease_ms
            )
        except OutcomeUnknown:
            self._renewer.stop_renewing(lease)  # the lease ends by itself
            raise
        if answer[0] == b"conflict":
            self._renewer.stop_renewing(lease)
            raise RevisionConflict("another server has changed the session in the meantime")
        saved = self._saved(key, session, nonce, answer)
        active.revision, active.renew_at = saved.revision, self._renewer.next_renewal()
        if release:
            self._renewer.stop_renewing(lease)
        return saved.revision

    def release(self, lease: Lease) -> None:
        """See SessionStore. If the server can't be reached, the lease ends by itself."""
        active = self._renewer.stop_renewing(lease)
        if active is not None:
            self._release(self._key(lease.session.owner, lease.session.id), active.token)

    def delete(self, lease: Lease) -> None:
        """See SessionStore."""
        active, key = self._renewer.active_lease(lease), self._key(lease.session.owner, lease.session.id)
        answer = self._call("delete", key, active.token)
        self._renewer.stop_renewing(lease)
        if answer[0] == b"conflict":
            raise RevisionConflict("another server has changed the session in the meantime")
        self._cache.forget(key)
        self._renewer.record_write(key, active.incarnation, active.revision, None)

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """See SessionStore. Scans all keys of the server."""
        prefix = self._key(owner, "")
        keys = self._server.keys(prefix.translate(_GLOB) + "*")
        ids = {key[len(prefix) :] for key in keys if "/" not in key[len(prefix) :]}
        sessions: list[Session] = []
        while found := heapq.nsmallest(limit - len(sessions), (one for one in ids if one > after)):
            for session_id in found:
                with suppress(SessionNotFound, SessionGone, SessionLost):
                    sessions.append(self.load(owner, session_id))
            after = found[-1]
        return sessions

    def __len__(self) -> int:
        """Number of sessions in this process's cache."""
        return len(self._cache)

    @property
    def num_bytes(self) -> int:
        """Approximate memory of this process's cache, in bytes."""
        return self._cache.num_bytes

    @property
    def num_evicted(self) -> int:
        """Number of sessions that were evicted from this process's cache. They are still in Redis."""
        return self._cache.num_evicted

    @property
    def num_expired(self) -> int:
        """Always 0: Redis expires sessions by itself."""
        return 0

    def check(self) -> None:
        """See SessionStore."""
        self._server.check()

    def close(self) -> None:
        """See SessionStore."""
        self._renewer.close()
        self._server.close()

    def _call(self, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        return self._server.call(operation, key, self._now_ms(), *arguments)

    def _now(self) -> float:
        """Seconds since 1970, for `created_at`."""
        return self._clock() if self._clock is not None else time.time()

    def _now_ms(self) -> int | str:
        """The time as session.lua takes it: milliseconds, or "" for the server's clock, which all replicas share."""
        return round(self._clock() * 1000) if self._clock is not None else ""

    def _loaded(self, owner: str, session_id: str, cached: CachedSession | None, answer: list[Any]) -> Session:
        """Return the session of an answer to `load` or `lease`, or raise the error that it stands for.

        cached: the cached copy that the call named.
        """
        key, word = self._key(owner, session_id), answer[0]
        if word == b"lost":
            raise SessionLost("the session store has lost the last save of this session: continue under another id")
        if word == b"expired":
            raise SessionGone("this session has expired: create it again")
        if word == b"missing":
            raise SessionNotFound("there is no such session")
        incarnation, revision, nonce, expires_at = answer[1], int(answer[2]), answer[3], int(answer[4]) / 1000
        if len(answer) > 5:
            session = decode(answer[5], owner, session_id, revision, expires_at)
            self._cache.put(key, CachedSession(session, incarnation, nonce))
            return session
        if cached is None:  # the script leaves the record out only if the cached copy has the same nonce
            raise SessionLost("the session's record is incomplete: create the session again under another id")
        if cached.session.expires_at == expires_at:
            return cached.session
        return replace(cached.session, expires_at=expires_at)

    def _saved(self, key: str, session: Session, nonce: bytes, answer: list[Any]) -> Session:
        """Cache, journal and return the session that an answer to `create`, `claim` or `save` says is saved."""
        incarnation, revision, expires_at = answer[1], int(answer[2]), int(answer[3]) / 1000
        session = replace(session, hidden=read_state(session.hidden), revision=revision, expires_at=expires_at)
        self._cache.put(key, CachedSession(session, incarnation, nonce))
        self._renewer.record_write(key, incarnation, revision, nonce)
        return session

    def _release(self, key: str, token: bytes) -> None:
        with suppress(GruServeError):
            self._call("release", key, token)

    def _key(self, owner: str, session_id: str) -> str:
        return f"{self._prefix}{owner}/{session_id}"


def _known_save(cached: CachedSession | None) -> tuple[bytes, int, bytes]:
    """Name the save that this process has cached. The script leaves out the record if it is still the last one."""
    return (cached.incarnation, cached.session.revision, cached.nonce) if cached is not None else (b"", 0, b"")


def _new_nonce() -> bytes:
    return secrets.token_bytes(12)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

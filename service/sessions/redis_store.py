"""The session store in Redis: sessions outlive the process, and any of several replicas may go on with them."""

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
from service.sessions.session_store import Lease
from service.sessions.watch import Operation

_POLL_S = 0.03  # of one who waits for a lease that another process has
_GLOB = str.maketrans({char: f"\\{char}" for char in "*?[]\\"})


class RedisStore:
    """Implements `SessionStore`. A cache in front saves reading what this process wrote last, and no question whether
    that is still the last word.

    A lease is good for `lease_s`, and a thread renews it: that of a process which dies is soon free. It is fenced: who
    lost it can't save. server: is closed with the store. segment_chars: see Retention. cache_bytes: for sessions that
    were in use lately. clock: seconds since 1970; None: the server's.
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
        self._server, self._prefix, self._clock = server, prefix, clock
        self._cache = SessionCache(cache_bytes)
        self._encode = partial(encode, segment_chars=segment_chars)
        self._renewer = LeaseRenewer(server, self._cache, self._encode, lease_s, self._now_ms)

    def create(self, session: Session) -> Session:
        """See SessionStore."""
        session = replace(session, created_at=self._now())
        key, nonce = self._key(session.owner, session.id), _nonce()
        answer = self._ask("create", key, nonce, self._encode(session), _ms(session.ttl_s))
        if answer[0] == b"exists":
            raise SessionExists(f"there is a session {session.id} already")
        return self._saved(key, session, nonce, answer)

    def load(self, owner: str, session_id: str) -> Session:
        """See SessionStore."""
        key = self._key(owner, session_id)
        cached = self._cache.get(key)
        return self._session(owner, session_id, cached, self._ask("load", key, *_known(cached)))

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:
        """See SessionStore."""
        key, token = self._key(owner, session_id), _nonce()
        deadline = time.monotonic() + 2 * self._renewer.lease_ms / 1000
        while True:
            cached = self._cache.get(key)
            answer = self._ask("lease", key, *_known(cached), token, self._renewer.lease_ms, int(take_over))
            if answer[0] != b"busy":
                break
            if not take_over or self._renewer.holds(key) or time.monotonic() > deadline:
                raise SessionBusy("another operation on this session is under way: try again when it is over")
            time.sleep(_POLL_S)
        try:
            lease = Lease(self._session(owner, session_id, cached, answer))
        except SessionLost:
            self._free(key, token)
            raise
        self._renewer.hold(lease, key, token, answer[1])
        return lease

    def cached_copy(self, owner: str, session_id: str) -> Session | None:
        """See SessionStore."""
        cached = self._cache.get(self._key(owner, session_id))
        return cached.session if cached is not None else None

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:
        """See SessionStore. Raises OutcomeUnknown if the server didn't answer."""
        key, token, nonce = self._key(session.owner, session.id), _nonce(), _nonce()
        cached = self._cache.get(key)
        if cached is None or cached.session is not session:
            return None
        record, lease_ms = self._encode(changed), "" if release else self._renewer.lease_ms
        answer = self._ask("claim", key, *_known(cached), token, nonce, record, _ms(changed.ttl_s), lease_ms)
        if answer[0] == b"conflict":
            return None
        lease = Lease(self._saved(key, changed, nonce, answer))
        if not release:
            self._renewer.hold(lease, key, token, answer[1])
        return lease

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """See SessionStore. Raises OutcomeUnknown if the server didn't answer."""
        old, held = lease.session, self._renewer.holding(lease)
        if session.revision != held.revision or (session.owner, session.id) != (old.owner, old.id):
            raise RevisionConflict("the session was changed meanwhile")
        key, nonce = self._key(session.owner, session.id), _nonce()
        lease_ms = "" if release else self._renewer.lease_ms
        held.is_ending = release
        try:
            answer = self._ask(
                "save", key, held.token, held.revision, nonce, self._encode(session), _ms(session.ttl_s), lease_ms
            )
        except OutcomeUnknown:
            self._renewer.let_go(lease)  # it runs out by itself
            raise
        if answer[0] == b"conflict":
            self._renewer.let_go(lease)
            raise RevisionConflict("another server has gone on with this session meanwhile")
        saved = self._saved(key, session, nonce, answer)
        held.revision, held.due = saved.revision, self._renewer.next_due()
        if release:
            self._renewer.let_go(lease)
        return saved.revision

    def release(self, lease: Lease) -> None:
        """See SessionStore. If the server can't be reached, it runs out by itself."""
        held = self._renewer.let_go(lease)
        if held is not None:
            self._free(self._key(lease.session.owner, lease.session.id), held.token)

    def delete(self, lease: Lease) -> None:
        """See SessionStore."""
        held, key = self._renewer.holding(lease), self._key(lease.session.owner, lease.session.id)
        answer = self._ask("delete", key, held.token)
        self._renewer.let_go(lease)
        if answer[0] == b"conflict":
            raise RevisionConflict("another server has gone on with this session meanwhile")
        self._cache.forget(key)
        self._renewer.wrote(key, held.incarnation, held.revision, None)

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """See SessionStore. Looks at every key that the server has."""
        own = self._key(owner, "")
        keys = self._server.keys(own.translate(_GLOB) + "*")
        ids = {key[len(own) :] for key in keys if "/" not in key[len(own) :]}
        sessions: list[Session] = []
        while found := heapq.nsmallest(limit - len(sessions), (one for one in ids if one > after)):
            for session_id in found:
                with suppress(SessionNotFound, SessionGone, SessionLost):
                    sessions.append(self.load(owner, session_id))
            after = found[-1]
        return sessions

    def __len__(self) -> int:
        """Sessions that this process has at hand."""
        return len(self._cache)

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        return self._cache.num_bytes

    @property
    def num_evicted(self) -> int:
        """How many had to make room for others in this process. In Redis they are still there."""
        return self._cache.num_evicted

    @property
    def num_expired(self) -> int:
        """Nobody knows: Redis forgets them."""
        return 0

    def check(self) -> None:
        """See SessionStore."""
        self._server.check()

    def close(self) -> None:
        """See SessionStore."""
        self._renewer.close()
        self._server.close()

    def _ask(self, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        return self._server.call(operation, key, self._now_ms(), *arguments)

    def _now(self) -> float:
        """For what only this process sees; seconds since 1970."""
        return self._clock() if self._clock is not None else time.time()

    def _now_ms(self) -> int | str:
        """For the script, which looks at the server's clock if there is none: it is the same for all replicas."""
        return round(self._clock() * 1000) if self._clock is not None else ""

    def _session(self, owner: str, session_id: str, cached: CachedSession | None, answer: list[Any]) -> Session:
        """What an answer to `load` or `lease` says. cached: what was known when it was asked."""
        key, word = self._key(owner, session_id), answer[0]
        if word == b"lost":
            raise SessionLost("the session store has lost what was last saved of this session: go on under another id")
        if word == b"gone":
            raise SessionGone("this session has expired: create it again")
        if word == b"none":
            raise SessionNotFound("there is no such session")
        incarnation, revision, nonce, expires_at = answer[1], int(answer[2]), answer[3], int(answer[4]) / 1000
        if len(answer) > 5:
            session = decode(answer[5], owner, session_id, revision, expires_at)
            self._cache.put(key, CachedSession(session, incarnation, nonce))
            return session
        if cached is None:  # only to those who have it the script leaves the record out
            raise SessionLost("the session's record is incomplete")
        if cached.session.expires_at == expires_at:
            return cached.session
        return replace(cached.session, expires_at=expires_at)

    def _saved(self, key: str, session: Session, nonce: bytes, answer: list[Any]) -> Session:
        """What an answer to `create` or `save` says."""
        incarnation, revision, expires_at = answer[1], int(answer[2]), int(answer[3]) / 1000
        session = replace(session, hidden=read_state(session.hidden), revision=revision, expires_at=expires_at)
        self._cache.put(key, CachedSession(session, incarnation, nonce))
        self._renewer.wrote(key, incarnation, revision, nonce)
        return session

    def _free(self, key: str, token: bytes) -> None:
        with suppress(GruServeError):
            self._ask("release", key, token)

    def _key(self, owner: str, session_id: str) -> str:
        return f"{self._prefix}{owner}/{session_id}"


def _known(cached: CachedSession | None) -> tuple[bytes, int, bytes]:
    """What the script is told of what we have: it leaves out a record that is the same."""
    return (cached.incarnation, cached.session.revision, cached.nonce) if cached is not None else (b"", 0, b"")


def _nonce() -> bytes:
    return secrets.token_bytes(12)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

"""The ids of each owner's sessions in Redis, in order, so that a list need not look at other owners' sessions.

An index is a sorted set whose scores are equal, so Redis orders it by member. It is a key of its own, because in a
Redis Cluster it is on another node than most of its sessions. It may therefore be wrong for a while, in one direction:
an id is added before its session is created, and removed after its session is deleted. An id without a session is
removed when a list meets it, and creations check some at random.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from service.errors import GruServeError, Overloaded
from service.sessions.lifetimes import Lifetimes
from service.sessions.redis_server import KeyOccupied, RedisServer
from service.sessions.session import SessionKey

Item = TypeVar("Item")

# One creation in 8 checks 24 ids. In the long run at most one id in three is then without a session, and most
# creations don't wait for the check.
_NUM_CHECKED, _CREATIONS_PER_CHECK = 24, 8
_LONGEST_LIFE_MS = 30 * 24 * 3600 * 1000  # no session can ask for more
_RETRY_S = 60.0
_GLOB = str.maketrans({char: f"\\{char}" for char in "*?[]\\"})


class SessionIndex:
    """Adds, finds and removes ids. Any number of threads may call.

    Args:
        server: Where the sessions are stored.
        prefix: Of every key in Redis.
        alive: Returns those of an owner's ids that have a session.
    """

    def __init__(self, server: RedisServer, prefix: str, alive: Callable[[str, Sequence[str]], Iterable[str]]) -> None:
        self._server, self._prefix, self._alive = server, prefix, alive
        self._lifetimes = Lifetimes()
        self._importing = threading.Lock()
        self._next_import = 0.0

    def add(self, key: SessionKey, ttl_s: float) -> None:
        """Add a session, and let the index live as long. Raises StoreUnavailable, Overloaded."""
        index, ms, since = self._key(key.owner), self._lifetimes.extended_ms(ttl_s), self._lifetimes.now()
        self._server.execute([("ZADD", index, 0, key.id), *_living(index, ms)])
        self._lifetimes.note(index, ms, since)

    def adding(self, key: SessionKey, ttl_s: float) -> tuple[Any, ...]:
        """Return the command that adds a session. It has to be done before and after the session's creation.

        Before, so that no session is missing if this process dies; after, in case a list has removed the id in between.
        If the index's key has something else, the session is created, and lists lack it. Raises StoreUnavailable,
        Overloaded.
        """
        if not self._lifetimes.suffices(self._key(key.owner), ttl_s):
            with suppress(KeyOccupied):
                self.add(key, ttl_s)
        return "ZADD", self._key(key.owner), 0, key.id

    def check_some(self, owner: str) -> None:
        """After one creation in several, check some of the owner's ids. Never fails."""
        if not secrets.randbelow(_CREATIONS_PER_CHECK):
            with suppress(GruServeError):
                (ids,) = self._server.execute([("ZRANDMEMBER", self._key(owner), _NUM_CHECKED)])
                self._clean(owner, [session_id.decode() for session_id in ids])

    def prolong(self, key: SessionKey, ttl_s: float) -> None:
        """Let the index live as long as a session that was just used. Normally asks nothing of Redis. Never fails."""
        if not self._lifetimes.suffices(self._key(key.owner), ttl_s):
            with suppress(GruServeError):
                self.add(key, ttl_s)

    def restore(self, keys: Sequence[SessionKey], ttl_s: float) -> None:
        """Add sessions again after a restart of Redis, also during the recovery window. Raises StoreUnavailable.

        ttl_s: The longest life of these sessions.
        """
        self._lifetimes.clear()
        ids: dict[str, list[str]] = {}
        for key in keys:
            ids.setdefault(self._key(key.owner), []).append(key.id)
        ms = self._lifetimes.extended_ms(ttl_s)
        for index, members in ids.items():
            with suppress(KeyOccupied):  # it must not keep the other sessions from being served
                for batch in batches(members, 1000):
                    self._server.execute([_adding(index, batch), *_living(index, ms)], in_recovery=True)

    def _clean(self, owner: str, ids: Sequence[str]) -> None:
        """Remove those ids that have no session."""
        alive = set(self._alive(owner, ids))
        self.discard(owner, [session_id for session_id in ids if session_id not in alive])

    def discard(self, owner: str, ids: Sequence[str]) -> None:
        """Remove ids whose session was not found. Never fails: what remains is removed later."""
        with suppress(GruServeError):
            if ids:
                self._remove(owner, ids)

    def ids(self, owner: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` of an owner's ids above `after`, in order. Raises StoreUnavailable."""
        self._import()
        index = self._key(owner)
        (ids,) = self._server.execute([("ZRANGEBYLEX", index, f"({after}", "+", "LIMIT", 0, limit)])
        if not ids:
            self._server.require_intact(index)
        return [session_id.decode() for session_id in ids]

    def _remove(self, owner: str, ids: Sequence[str]) -> None:
        """Remove ids, but not those whose session has been created since.

        A creation adds its id once more when it is done. So either it does that after the removal, or the session is
        found here.
        """
        index = self._key(owner)
        self._server.execute([("ZREM", index, *ids)])
        if alive := [*self._alive(owner, ids)]:
            self._server.execute([_adding(index, alive)])

    def _import(self) -> None:
        """Add the sessions of versions of the service that had no index: one scan of all keys, once for a server.

        If Redis is full, lists lack these sessions; it is tried again a minute later.
        """
        with self._importing:
            if time.monotonic() < self._next_import:
                return
            marker = f"{self._prefix}indexed"
            try:
                if not self._server.execute([("EXISTS", marker)])[0]:
                    keys = self._server.keys(self._prefix.translate(_GLOB) + "*")
                    for batch in batches((key for key in keys if "/" in key[len(self._prefix) :]), 1000):
                        self._import_batch(batch)
                    self._server.execute([("SET", marker, 1)])
                self._next_import = math.inf
            except Overloaded:
                self._next_import = time.monotonic() + _RETRY_S

    def _import_batch(self, keys: Sequence[str]) -> None:
        ids: dict[str, list[str]] = {}
        for key in keys:
            owner, _, session_id = key[len(self._prefix) :].partition("/")
            ids.setdefault(self._key(owner), []).append(session_id)
        for index, members in ids.items():
            self._server.execute([_adding(index, members), *_living(index, _LONGEST_LIFE_MS)])

    def _key(self, owner: str) -> str:
        """No session has this key: its part after the prefix has no slash."""
        return f"{self._prefix}ids:{owner}"


def batches(items: Iterable[Item], size: int) -> Iterable[list[Item]]:
    """Yield lists of up to `size` items."""
    remaining = iter(items)
    while batch := [*islice(remaining, size)]:
        yield batch


def _adding(index: str, ids: Iterable[str]) -> tuple[Any, ...]:
    return "ZADD", index, *(part for session_id in ids for part in (0, session_id))


def _living(key: str, ms: int) -> list[tuple[Any, ...]]:
    """Return commands that keep a key for at least `ms` milliseconds. GT leaves a key that never expires as it is."""
    return [("PEXPIRE", key, ms, "NX"), ("PEXPIRE", key, ms, "GT")]

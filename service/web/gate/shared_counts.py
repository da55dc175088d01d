"""Counts the starts of all replicas, in the Redis of the session store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from limits.storage import RedisStorage, Storage
from redis import exceptions as errors

from service.sessions.redis_connections import Command, Link, RedisConnections, Script, without_errors
from service.sessions.redis_url import Address, parse

_TIMEOUT_S = 0.1  # of an exchange; after it this process counts alone until the storage answers again
_CALL_S = 2 * _TIMEOUT_S  # of a call, which may have to connect first
_ACQUIRE, _READ = (
    Script(script.decode())
    for script in (RedisStorage.SCRIPT_ACQUIRE_SLIDING_WINDOW, RedisStorage.SCRIPT_SLIDING_WINDOW)
)


class SharedCounts(RedisStorage):
    """A storage of the library `limits`, for its strategy `sliding-window-counter` only.

    The library's own storages for Sentinels and clusters connect when they are made, so that a server would not start
    while Redis is down, and find masters in ways of their own. Any number of threads may call.

    Args:
        _uri: Ignored.
        url: See docs/redis.md. Raises ValueError if it is invalid.
        key_prefix: Of every key.
    """

    STORAGE_SCHEME = ["gru-serve"]  # noqa: RUF012 - as the library declares it; its registry reads it

    def __init__(self, _uri: str, url: str, key_prefix: str) -> None:
        Storage.__init__(self)
        self.key_prefix = key_prefix
        self._connections = RedisConnections(parse(url), _TIMEOUT_S, (_ACQUIRE, _READ))
        self._idle: dict[Address, list[Link]] = {}  # connections that no thread uses
        self._lock = threading.Lock()  # held by the thread that discovers masters
        self._has_discovered = False
        # In the places of the library's scripts, which have a type of their own.
        self.lua_acquire_sliding_window = partial(self._call, _ACQUIRE)  # type: ignore[assignment]
        self.lua_sliding_window = partial(self._call, _READ)  # type: ignore[assignment]

    @property
    def base_exceptions(self) -> type[Exception]:
        """See Storage."""
        return errors.RedisError

    def get_connection(self, readonly: bool = False) -> Any:
        """Refuse what other strategies need."""
        raise NotImplementedError

    def check(self) -> bool:
        """Return whether the masters can be found and answer."""
        try:
            with self._discovering():
                masters = self._connections.discover(elsewhere=True)
                self._has_discovered = True
            for address in masters:
                without_errors(self._run(address, [("PING",)], False))
        except errors.RedisError:
            return False
        return True

    def close(self) -> None:
        """Close all connections."""
        for idle in list(self._idle.values()):
            while idle:
                idle.pop().close()
        self._connections.close()

    def _call(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script. All keys have to belong to one slot. Raises RedisError."""
        try:
            if not self._has_discovered:
                with self._discovering():
                    if not self._has_discovered:
                        self._connections.discover()
                        self._has_discovered = True
            return without_errors(self._connections.execute([script.call(keys, *arguments)], self._run))[0]
        except errors.RedisError:
            self._has_discovered = False
            raise

    @contextmanager
    def _discovering(self) -> Iterator[None]:
        """Wait for other threads, but not for all of them in turn: each may need the whole time."""
        if not self._lock.acquire(timeout=_CALL_S):
            raise errors.TimeoutError("another thread is still looking for the masters")
        try:
            yield
        finally:
            self._lock.release()

    def _run(self, address: Address, commands: Sequence[Command], is_asking: bool) -> list[Any]:
        ends_at = time.monotonic() + _CALL_S
        try:
            while (link := self._idle[address].pop()).is_closed():
                link.close()
            is_new = False
        except (KeyError, IndexError):
            link, is_new = self._connections.connect(address, ends_at=ends_at), True
        try:
            answers = link.run(commands, is_asking, ends_at=ends_at)
        except errors.ConnectionError:
            if is_new:
                raise
            link = self._connections.connect(address, ends_at=ends_at)  # the server has closed the idle one
            answers = link.run(commands, is_asking, ends_at=ends_at)
        self._idle.setdefault(address, []).append(link)
        return answers

"""A Redis server as a session store needs it: asked at once or not at all, and never after it lost what it knew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

import structlog
from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.errors import OutcomeUnknown, Overloaded, StoreUnavailable
from service.sessions.watch import Operation, StoreWatch

log = structlog.get_logger(__name__)

_SCRIPT = resources.files("service.sessions").joinpath("session.lua").read_text()
_AWAY = "sessions can't be had now, because their store can't be reached: try again in a second"
_UNKNOWN = (
    "the session store didn't answer: what you asked for may have been done, or not. Ask where the session stands"
)


class _Settling(errors.ConnectionError):
    """The server has not been there for long."""


class RedisServer:
    """RunRegistry `session.lua` on a server. Any number of threads may call; each call fails within about `timeout_s`.

    One that has failed makes the others fail at once, until `look` has found the server again. After a restart, which
    may have lost the last writes, or a failover to another server, nobody is served for `settle_s`: meanwhile each
    replica puts back what it wrote (`RedisStore`). It is asked once at the start, so that `check` is true from then on.
    """

    def __init__(
        self, url: str, timeout_s: float = 0.4, settle_s: float = 1.5, watch: StoreWatch | None = None
    ) -> None:
        self._settle_s, self._watch = settle_s, watch
        self._lock = threading.Lock()  # guards what follows
        self._is_down = False
        self._run_id: bytes | None = None  # of the server's process
        self._settled_at = 0.0  # monotonic
        self._has_changed = False  # and what was written lately has not been put back

        def client(on_connect: Callable[[Any], None]) -> Redis:
            return Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                redis_connect_func=on_connect,
                client_name="gru-serve",
            )

        self._client = client(self._met)
        self._own = client(self._greet)  # of the thread that puts back, which may call while others may not
        self._script, self._own_script = self._client.register_script(_SCRIPT), self._own.register_script(_SCRIPT)
        # Each with a connection: borrowing one from the client's pool for every call, which looks whether anything has
        # come on it first, costs a process as much as a third of the call.
        self._idle: list[Redis] = []
        with suppress(StoreUnavailable):
            self.look()

    def call(self, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        """Do one thing to one session; the script's answer.

        Raises StoreUnavailable if nothing was done; OutcomeUnknown if a save may have been; Overloaded if there is no
        room for a new session.
        """
        self.check()
        started = time.perf_counter()
        try:
            try:
                return self._run(key, operation, *arguments)
            except _Settling:
                raise
            except errors.ConnectionError:
                self._drop_idle()  # that were kept since before a restart are broken too
                answer = self._run(key, operation, *arguments, is_second=True)
            if operation == "claim" and answer[0] == b"conflict":
                raise OutcomeUnknown(_UNKNOWN)  # the first may have been done, and gone on from since
            return answer
        except errors.OutOfMemoryError as error:
            log.error("the session store is full", error=str(error))
            raise (Overloaded if operation == "create" else StoreUnavailable)(
                "the session store has no room: try again in a while"
            ) from error
        except errors.RedisError as error:
            self._failed(error)
            if self._watch is not None:
                self._watch.failed(operation)
            is_unknown = operation in ("save", "claim") and isinstance(
                error, errors.ConnectionError | errors.TimeoutError
            )
            raise OutcomeUnknown(_UNKNOWN) if is_unknown else StoreUnavailable(_AWAY) from error
        finally:
            if self._watch is not None:
                self._watch.took(operation, time.perf_counter() - started)

    def keys(self, pattern: str) -> Iterator[str]:
        """All that match, in no order. Raises StoreUnavailable."""
        self.check()
        try:
            for key in self._client.scan_iter(match=pattern, count=1000):
                yield key.decode()
        except errors.RedisError as error:
            self._failed(error)
            raise StoreUnavailable(_AWAY) from error

    def check(self) -> None:
        """Raises StoreUnavailable while sessions can't be had."""
        if self._is_down or self._has_changed or time.monotonic() < self._settled_at:
            raise StoreUnavailable(_AWAY)

    # What follows is for one thread, which looks after the server.

    def look(self) -> bool:
        """Ask whether it is there; true: it was restarted since `put_back` was called last. Raises StoreUnavailable."""
        try:
            self._own.ping()
        except errors.RedisError as error:
            self._failed(error)
            raise StoreUnavailable(_AWAY) from error
        with self._lock:
            if self._is_down:
                log.info("the session store is back")
            self._is_down = False
            return self._has_changed

    def call_all(self, calls: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """Several calls (operation, key, argument, ...) on the way of one, also while others may not call."""
        try:
            with self._own.pipeline(transaction=False) as pipeline:
                for operation, key, *arguments in calls:
                    self._own_script(keys=[key], args=[operation, *arguments], client=pipeline)
                answers: list[list[Any]] = pipeline.execute()
                return answers
        except errors.RedisError as error:
            self._failed(error)
            raise StoreUnavailable(_AWAY) from error

    def put_back(self) -> None:
        """What was written lately is there again."""
        with self._lock:
            self._settled_at = time.monotonic() + self._settle_s  # others may still be at it
            self._has_changed = False

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
        self._own.close()

    def _run(self, *arguments: Any, is_second: bool = False) -> list[Any]:
        """The script, on a connection that no other thread has meanwhile. is_second: on one that is not broken."""
        try:
            client = None if is_second else self._idle.pop()
        except IndexError:
            client = None
        if client is None:
            client = Redis(connection_pool=self._client.connection_pool, single_connection_client=True)
        try:
            answer: list[Any] = self._script(keys=arguments[:1], args=arguments[1:], client=client)
        except BaseException:
            client.close()
            raise
        self._idle.append(client)
        return answer

    def _drop_idle(self) -> None:
        with suppress(IndexError):
            while True:
                client = self._idle.pop()
                if client.connection is not None:
                    client.connection.disconnect()  # type: ignore[no-untyped-call]  # the pool would give it out again
                client.close()

    def _failed(self, error: errors.RedisError) -> None:
        if isinstance(error, _Settling):
            return
        if isinstance(error, errors.ResponseError) and not isinstance(error, errors.ConnectionError):
            log.error("the session store refused a call", error=str(error)[:200])
            return
        with self._lock:
            if not self._is_down:
                log.error("the session store can't be reached", error=type(error).__name__)
            self._is_down = True

    def _met(self, connection: Any) -> None:
        """For each new connection of those who may be refused."""
        self._greet(connection)
        if self._has_changed or time.monotonic() < self._settled_at:
            raise _Settling

    def _greet(self, connection: Any) -> None:
        """For each new connection: which process is it that answers?"""
        connection.on_connect()
        connection.send_command("INFO", "server")
        facts = _facts(connection.read_response())
        run_id = facts.get(b"run_id", b"")
        # The difference of two times without their fractions: one second more than it is, in the worst case.
        uptime_s = max(0.0, float(facts.get(b"uptime_in_seconds", "inf")) - 1)
        with self._lock:
            if self._run_id not in (None, run_id):
                log.warning("the session store was restarted, or another server has taken its place")
                self._has_changed = True
            elif self._run_id is None and uptime_s < self._settle_s:
                self._settled_at = time.monotonic() + self._settle_s - uptime_s  # others may be putting back
            self._run_id = run_id


def _facts(info: Any) -> dict[bytes, bytes]:
    lines = bytes(info).splitlines() if isinstance(info, bytes) else []
    return dict(line.split(b":", 1) for line in lines if b":" in line)

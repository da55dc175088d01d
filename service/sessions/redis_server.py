"""Calls session.lua on a Redis server, quickly or not at all.

Calls fail fast while Redis is down. After a restart of Redis they are refused until lost writes have been restored.
"""

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
from service.sessions.session_store import Operation, StoreObserver

log = structlog.get_logger(__name__)

_SCRIPT = resources.files("service.sessions").joinpath("session.lua").read_text()
# At its memory limit Redis refuses a script without `allow-oom`, which only `create` is. All else that a session needs,
# such as the lease for deleting it, is done at the limit too. Needs Redis 7.
_CREATE_SCRIPT, _OTHER_SCRIPT = f"#!lua\n{_SCRIPT}", f"#!lua flags=allow-oom\n{_SCRIPT}"
_UNREACHABLE = "sessions are unavailable, because the session store can't be reached: try again in a second"
_UNKNOWN = (
    "the session store did not answer, so the operation may or may not have been done: read the session's position "
    "before you repeat it"
)


class _InRecovery(errors.ConnectionError):
    """A new connection is refused during the recovery window."""


class RedisServer:
    """Calls session.lua. Any number of threads may call; each call fails within about `timeout_s`.

    After a call has failed, all calls fail at once, until `ping` reaches the server again. A restart, or a failover to
    another server, may have lost the last writes. All calls are refused from then until `recovery_window_s` after this
    process has restored its own writes (`LeaseRenewer`), so that other replicas can restore theirs too.
    """

    def __init__(
        self, url: str, timeout_s: float = 0.4, recovery_window_s: float = 1.5, observer: StoreObserver | None = None
    ) -> None:
        """Ping the server once, so that `check` is right from the start. Raises ValueError if the URL is invalid."""
        self._recovery_window_s, self._observer = recovery_window_s, observer
        self._lock = threading.Lock()  # guards the following
        self._is_down = False
        self._run_id: bytes | None = None  # identifies the server's process
        self._recovered_at = 0.0  # monotonic time at which the recovery window ends
        self._needs_restore = False  # another server process answers, and the last writes have not been restored in it

        def client(on_connect: Callable[[Any], None]) -> Redis:
            return Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                redis_connect_func=on_connect,
                client_name="gru-serve",
            )

        self._client = client(self._on_connect)
        self._renewer_client = client(self._identify)  # works during the recovery window too
        self._create_script = self._client.register_script(_CREATE_SCRIPT)
        self._other_script = self._client.register_script(_OTHER_SCRIPT)
        self._renewer_script = self._renewer_client.register_script(_OTHER_SCRIPT)
        # Clients with a connection each. To take a connection from the pool, which first checks it for unread data,
        # needs up to a third of the time that a call needs in this process.
        self._idle: list[Redis] = []
        with suppress(StoreUnavailable):
            self.ping()

    def call(self, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        """Run one operation on one session and return the script's answer.

        Raises StoreUnavailable if nothing was changed, OutcomeUnknown if a save may or may not have been done, and
        Overloaded if Redis has no memory for a new session.
        """
        self.check()
        started = time.perf_counter()
        try:
            try:
                return self._run_script(key, operation, *arguments)
            except _InRecovery:
                raise
            except errors.ConnectionError:
                self._close_idle()  # connections from before a restart are broken as well
                answer = self._run_script(key, operation, *arguments, is_retry=True)
            if answer[0] in (b"conflict", b"exists"):
                raise OutcomeUnknown(_UNKNOWN)  # the first attempt may have been done, and others have saved since
            return answer
        except errors.OutOfMemoryError as error:
            log.error("the session store is full", error=str(error))
            raise (Overloaded if operation == "create" else StoreUnavailable)(
                "the session store is full: try again later"
            ) from error
        except errors.RedisError as error:
            self._note_failure(error)
            if self._observer is not None:
                self._observer.count_failure(operation)
            is_unknown = operation in ("create", "save", "claim", "delete") and isinstance(
                error, errors.ConnectionError | errors.TimeoutError
            )
            raise OutcomeUnknown(_UNKNOWN) if is_unknown else StoreUnavailable(_UNREACHABLE) from error
        finally:
            if self._observer is not None:
                self._observer.observe(operation, time.perf_counter() - started)

    def keys(self, pattern: str) -> Iterator[str]:
        """Yield all keys that match a glob pattern, in any order. Raises StoreUnavailable."""
        self.check()
        try:
            for key in self._client.scan_iter(match=pattern, count=1000):
                yield key.decode()
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from error

    def check(self) -> None:
        """Raise StoreUnavailable while calls are refused."""
        if self._is_down or self._needs_restore or time.monotonic() < self._recovered_at:
            raise StoreUnavailable(_UNREACHABLE)

    # The following methods are for the renewer's thread.

    def ping(self) -> bool:
        """Return whether lost writes have to be restored: the server's process is new since the last `mark_restored`.

        Raises StoreUnavailable if the server doesn't answer.
        """
        try:
            self._renewer_client.ping()
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from error
        with self._lock:
            if self._is_down:
                log.info("the session store is back")
            self._is_down = False
            return self._needs_restore

    def call_all(self, calls: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """Run several calls (operation, key, argument, ...) in one round trip, also during the recovery window.

        Raises StoreUnavailable.
        """
        try:
            with self._renewer_client.pipeline(transaction=False) as pipeline:
                for operation, key, *arguments in calls:
                    self._renewer_script(keys=[key], args=[operation, *arguments], client=pipeline)
                answers: list[list[Any]] = pipeline.execute()
                return answers
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from error

    def mark_restored(self) -> None:
        """Note that this process has restored its writes. Calls are allowed again when the recovery window is over."""
        self._close_idle()  # they are of the process before: a call would fail on them, and what is repeated is less sure
        with self._lock:
            self._recovered_at = time.monotonic() + self._recovery_window_s  # other replicas may still be restoring
            self._needs_restore = False

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
        self._renewer_client.close()

    def _run_script(self, *arguments: Any, is_retry: bool = False) -> list[Any]:
        """Run the script on a connection that no other thread uses. is_retry: on a new one, not on an idle one."""
        try:
            client = None if is_retry else self._idle.pop()
        except IndexError:
            client = None
        if client is None:
            client = Redis(connection_pool=self._client.connection_pool, single_connection_client=True)
        try:
            script = self._create_script if arguments[1] == "create" else self._other_script
            answer: list[Any] = script(keys=arguments[:1], args=arguments[1:], client=client)
        except BaseException:
            client.close()
            raise
        self._idle.append(client)
        return answer

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                client = self._idle.pop()
                if client.connection is not None:
                    # Disconnect first: `close` returns the connection to the pool, which would hand it out again.
                    client.connection.disconnect()  # type: ignore[no-untyped-call]
                client.close()

    def _note_failure(self, error: errors.RedisError) -> None:
        if isinstance(error, _InRecovery):
            return
        if isinstance(error, errors.ResponseError) and not isinstance(error, errors.ConnectionError):
            log.error("the session store refused a call", error=str(error)[:200])
            return
        with self._lock:
            if not self._is_down:
                log.error("the session store can't be reached", error=type(error).__name__)
            self._is_down = True

    def _on_connect(self, connection: Any) -> None:
        """Prepare a new connection of `_client`. Raises _InRecovery during the recovery window."""
        self._identify(connection)
        if self._needs_restore or time.monotonic() < self._recovered_at:
            raise _InRecovery

    def _identify(self, connection: Any) -> None:
        """Prepare a new connection, and find out whether the server's process is the one of earlier connections."""
        connection.on_connect()
        connection.send_command("INFO", "server")
        info = _parse_info(connection.read_response())
        run_id = info.get(b"run_id", b"")
        # Redis counts whole seconds, so the uptime may be up to one second less than it says.
        uptime_s = max(0.0, float(info.get(b"uptime_in_seconds", "inf")) - 1)
        with self._lock:
            if self._run_id not in (None, run_id):
                log.warning("the session store was restarted, or another server has taken its place")
                self._needs_restore = True
            elif self._run_id is None and uptime_s < self._recovery_window_s:
                # The server was just started, and other replicas may be restoring their writes.
                self._recovered_at = time.monotonic() + self._recovery_window_s - uptime_s
            self._run_id = run_id

    def execute(self, commands: Sequence[tuple[Any, ...]], *, in_recovery: bool = False) -> list[Any]:
        """Run commands of Redis in one round trip and return their answers. Each may be repeated without harm.

        With `in_recovery`, also during the recovery window. Raises StoreUnavailable, and Overloaded if Redis is full.
        """
        if not in_recovery:
            self.check()
        client = self._renewer_client if in_recovery else self._client
        try:
            with client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                answers: list[Any] = pipeline.execute()
                return answers
        except errors.OutOfMemoryError as error:
            raise Overloaded("the session store is full: try again later") from error
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from error


def _parse_info(info: Any) -> dict[bytes, bytes]:
    lines = bytes(info).splitlines() if isinstance(info, bytes) else []
    return dict(line.split(b":", 1) for line in lines if b":" in line)

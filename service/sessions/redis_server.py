"""Calls session.lua on a Redis server, quickly or not at all.

Calls fail fast while Redis is down. After a restart of Redis, or if another server has taken its place, they are
refused until all processes have restored what it lost. The server itself knows which processes there are, and counts
such changes: the time between two of them is an epoch (`attend` in session.lua).

Of an error, only its kind and the first word of Redis' answer are logged: the rest may hold session ids, owners and the
tokens of leases.
"""

from __future__ import annotations

import errno
import math
import re
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from typing import Any

import structlog
from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from service.errors import GruServeError, OutcomeUnknown, Overloaded, StoreUnavailable
from service.sessions.session_store import Operation, StoreObserver

log = structlog.get_logger(__name__)

_SCRIPT = resources.files("service.sessions").joinpath("session.lua").read_text()
# At its memory limit Redis refuses a script without `allow-oom`, which only `create` is. All else that a session needs,
# such as the lease for deleting it, is done at the limit too. Needs Redis 7.
_CREATE_SCRIPT, _OTHER_SCRIPT = f"#!lua\n{_SCRIPT}", f"#!lua flags=allow-oom\n{_SCRIPT}"
_MIN_VERSION = 7
_UNREACHABLE = "sessions are unavailable, because the session store can't be reached: try again in a second"
_NO_CONNECTION = "this server has no connection to the session store left, and nothing was done: try again in a second"
_FULL = "the session store is full: try again later"
_UNKNOWN = (
    "the session store did not answer, so the operation may or may not have been done: read the session's position "
    "before you repeat it"
)
_MAX_CONNECTIONS = 2**31 - 1  # every call uses one for its length, so the number of threads is the limit
_PROBE_S = 1.0  # between two probes of a server that works
_PATIENCE_WINDOWS = 4  # a process that was there is waited for this many recovery windows after it was heard of last
_MAX_RESTORE_S = 60.0  # others no longer wait for a process that fails to restore for longer
_NO_EPOCH = b"0" * 16
_CHANGING: tuple[Operation, ...] = ("create", "save", "claim", "delete")
# First words of answers that concern one call. All others concern the server, such as READONLY, LOADING, MASTERDOWN,
# NOAUTH, NOPERM, MISCONF, NOREPLICAS and BUSY. Whether every call gets an ERR, a probe finds out.
_ABOUT_ONE_CALL = ("ERR", "WRONGTYPE", "NOSCRIPT")
_ADVICE = {
    "READONLY": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    "MASTERDOWN": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    "NOREPLICAS": "too few replicas follow it: see its setting min-replicas-to-write",
    "NOAUTH": "give a user and a password in GRU_SERVE_SESSION_STORE",
    "WRONGPASS": "correct the user and the password in GRU_SERVE_SESSION_STORE",
    "NOPERM": "give the user in GRU_SERVE_SESSION_STORE the permissions that docs/operations.md lists",
    "MISCONF": "it can't write to its disk: see its log",
    "LOADING": "it is starting: wait",
}
# After these, the server may have the data of another one.
_WAS_REPLICA = ("READONLY", "MASTERDOWN", "LOADING")
_NO_PERMISSION = re.compile("ACL failure in script|^The user executing the script can't ")


class _InRecovery(errors.ConnectionError):
    """A new connection is refused during the recovery window."""


class _Superseded(errors.ConnectionError):
    """The answer is from a server whose place another one has taken, and which may not know what was done."""


class _Unsuitable(errors.ConnectionError):
    """The server can't store sessions. The message says why, and what to do."""


class RedisServer:
    """Calls session.lua. Any number of threads may call; each call fails within about `timeout_s`.

    After a call has failed, all calls fail at once, until `ping` succeeds. A restart, or a failover to another server,
    may have lost the last writes. All calls are refused from then until this process has restored its own writes
    (`LeaseRenewer`) and the others theirs: those that the server knows, for up to four recovery windows after each was
    heard of last, and for one window also those that it doesn't know.

    A server that refuses to work, for example because it has become a replica, counts as replaced: connections made
    before are closed before their next use, and the server that works next is restored like another one.

    Args:
        url: Begins with `redis://`, `rediss://` or `unix://`.
        timeout_s: How long the server may take for an answer.
        recovery_window_s: How long calls are refused at least, so that every replica notices the change.
        observer: Counts and times the calls.
        probe_key: The key to which `ping` writes, and which has what replicas know of the server.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 0.4,
        recovery_window_s: float = 1.5,
        observer: StoreObserver | None = None,
        probe_key: str = "gru-serve:probe",
    ) -> None:
        """Ping the server once, so that `check` is right from the start. Raises ValueError if the URL is invalid."""
        self._recovery_window_s, self._observer, self._probe_key = recovery_window_s, observer, probe_key
        self._lock = threading.Lock()  # guards the following
        self._failed_at: float | None = None  # monotonic time of the last failure; None after a ping that succeeded
        self._failure: str | None = None  # what was logged about it
        self._run_id: bytes | None = None  # identifies the server's process
        # How often the server was replaced. Each connection has the number that was current when it was made
        # (`_change_of`). If it has an older one, it leads to a server that may have been replaced.
        self._change = 0
        self._restored_change = 0  # the last writes have been restored in the server that has this number
        self._opens_at = 0.0  # monotonic time from which on calls are served; inf if that depends on other replicas
        self._epoch, self._restored_epoch = _NO_EPOCH, b""  # the server's; the last one in which this process restored
        self._left_epoch = b""  # in which the server was seen as a replica
        self._restoring_since = math.inf  # monotonic; inf if this process has nothing to restore

        self._name = secrets.token_hex(8)  # names this process among the replicas
        self._probe_at = 0.0  # monotonic time of the next probe

        # The following are for the thread that pings. Its client has one connection, which no other thread uses.
        self._ping_change, self._ping_run_id = 0, b""  # of the connection
        self._pinged_change = 0  # of the connection on which the last ping succeeded
        self._batch_change = 0  # connections of `_batch_client` that are idle and older than this were closed
        self._inspected: bytes | None = None  # the server's process that was last inspected

        self._client = _client(url, timeout_s, self._on_connect)
        self._batch_client = _client(url, timeout_s, self._identify)  # also answers during the recovery window
        self._ping_client = _client(url, timeout_s, self._on_ping_connect)
        self._create_script = self._client.register_script(_CREATE_SCRIPT)
        self._other_script = self._client.register_script(_OTHER_SCRIPT)
        self._batch_script = self._batch_client.register_script(_OTHER_SCRIPT)
        self._ping_script = self._ping_client.register_script(_OTHER_SCRIPT)
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
        return self._timed(operation, partial(self._run_script, key, operation, *arguments))

    def call_between(self, command: tuple[Any, ...], operation: Operation, key: str, *arguments: Any) -> list[Any]:
        """Do the same, and a command before and after it, in the same exchange."""
        return self._timed(operation, partial(self._run_script_between, command, key, operation, *arguments))

    def keys(self, pattern: str) -> Iterator[str]:
        """Yield all keys that match a glob pattern, in any order. Raises StoreUnavailable."""
        self.check()
        try:
            client = self._take()
            try:
                for key in client.scan_iter(match=pattern, count=1000):
                    yield key.decode()
            except BaseException:
                _close(client)
                raise
            self._idle.append(client)
        except errors.RedisError as error:
            if _word(error):  # a user that may not list may still do everything else
                log.error("the session store refuses to list sessions", **_kind(error))
            else:
                self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None

    @property
    def epoch(self) -> bytes:
        """The epoch in which the server is: 16 digits. Each save's nonce begins with it."""
        return self._epoch

    def check(self) -> None:
        """Raise StoreUnavailable while calls are refused."""
        if self._failed_at is not None or self._is_recovering():
            raise StoreUnavailable(_UNREACHABLE)

    def ping(self) -> bool:
        """Return whether lost writes have to be restored: the server was replaced since the last `mark_restored`.

        Every second, and while calls are refused, this is a probe: on a new connection, which leads where the address
        leads now, it does what a session needs, even on a server that is full. For one thread. Raises StoreUnavailable
        if that fails.
        """
        began = time.monotonic()
        if self._failed_at is None and not self._is_recovering() and began < self._probe_at:
            with self._pinging():
                self._ping_client.ping()
        if self._failed_at is not None or self._is_recovering() or began >= self._probe_at:
            self._ping_client.connection_pool.disconnect()
            self.attend()
            self._probe_at = began + _PROBE_S
        if self._batch_change != self._change:
            # Those in use are other threads'.
            self._batch_client.connection_pool.disconnect(inuse_connections=False)
            self._batch_change = self._change
        with self._lock:
            self._pinged_change = self._ping_change
            if self._failed_at is not None and self._failed_at < began:
                log.info("the session store is back")
                self._failed_at = self._failure = None
            return self._has_to_restore()

    def attend(self) -> None:
        """Tell the server, and so the other replicas, that this one is there. For the thread that pings.

        While it restores, it calls this again and again, and they wait. Raises StoreUnavailable.
        """
        left = self._left_epoch
        with self._pinging():
            epoch, wait_ms = self._attend(left)
            if not self._restored_epoch:  # a process that has just started knows nothing that it could restore
                self._restored_epoch = epoch
                epoch, wait_ms = self._attend(left)
        with self._lock:
            was_open = not self._is_recovering()
            self._epoch = epoch
            if left == self._left_epoch:
                self._left_epoch = b""
            if self._has_to_restore():
                self._restoring_since = min(self._restoring_since, time.monotonic())
                return
            self._restoring_since = math.inf
            if not was_open:  # afterwards, nobody waits for others
                self._opens_at = time.monotonic() + int(wait_ms) / 1000 if wait_ms else math.inf

    def _attend(self, left: bytes, *, leaves: bool = False) -> list[bytes]:
        """Call `attend` of the script; `leaves`: for the last time."""
        self._ping_client.ping()  # connects, which finds out the server's process
        window_ms = round(1000 * self._recovery_window_s)
        gives_up = time.monotonic() - self._restoring_since > _MAX_RESTORE_S
        patience_ms = "" if leaves or gives_up else _PATIENCE_WINDOWS * window_ms
        facts = (self._ping_run_id, self._epoch, left, self._name, self._restored_epoch, window_ms, patience_ms)
        answer: list[bytes] = self._ping_script(keys=[self._probe_key], args=["attend", "", 0, *facts])
        return answer

    @contextmanager
    def _pinging(self) -> Iterator[None]:
        """Note failures of the thread that pings. Raises StoreUnavailable."""
        try:
            yield
        except errors.RedisError as error:
            self._probe_at = 0.0
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None

    def call_all(self, calls: Sequence[tuple[Any, ...]], *, one_by_one: bool = False) -> list[list[Any]]:
        """Run several calls (operation, key, argument, ...) in one round trip, also during the recovery window.

        Any thread may call. Raises StoreUnavailable. one_by_one: a call that is refused because of its key, for example
        because the key has something else, is logged and answers "refused".
        """
        commands = [("EVALSHA", self._batch_script.sha, 1, key, operation, *rest) for operation, key, *rest in calls]
        try:
            answers = self._send_all(self._batch_client, commands)
            for number, answer in enumerate(answers):
                if not isinstance(answer, errors.RedisError):
                    continue
                if not one_by_one or _word(answer) not in _ABOUT_ONE_CALL:
                    raise answer
                log.error("the session store refused a call", **_kind(answer))
                answers[number] = [b"refused"]
            return answers
        except errors.RedisError as error:
            self._note_failure(error, may_be_about_one_call=True)
            raise StoreUnavailable(_UNREACHABLE) from None

    def _send_all(self, client: Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands in one round trip and return their answers, also errors. Each may be repeated without harm."""
        for _ in range(2):
            with client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                # An error that a pipeline raises has the command in its message.
                answers: list[Any] = pipeline.execute(raise_on_error=False)
            if not any(isinstance(answer, errors.NoScriptError) for answer in answers):
                break
            client.script_load(_OTHER_SCRIPT)
        return answers

    def mark_restored(self) -> None:
        """Note that this process has restored its writes. Calls are allowed again when all replicas have done so.

        If the server was replaced since the last ping, they have to be restored again. For the thread that pings.
        """
        self._close_idle()
        with self._lock:
            self._opens_at = math.inf
            self._restored_change, self._restored_epoch = self._pinged_change, self._epoch
        with suppress(StoreUnavailable):
            self.attend()

    def close(self) -> None:
        """Close all connections. Other replicas no longer wait for this one."""
        if self._failed_at is None:
            with suppress(errors.RedisError):
                self._attend(b"", leaves=True)
        self._client.close()
        self._batch_client.close()
        self._ping_client.close()

    def _timed(self, operation: Operation, run: Callable[..., list[Any]]) -> list[Any]:
        self.check()
        started = time.perf_counter()
        try:
            return self._call(operation, run)
        finally:
            if self._observer is not None:
                self._observer.observe(operation, time.perf_counter() - started)

    def _call(self, operation: Operation, run: Callable[..., list[Any]]) -> list[Any]:
        is_retry = False
        while True:
            try:
                answer = run(is_retry=is_retry)
            except errors.RedisError as error:
                is_lost = _is_without_answer(error)
                if is_lost and not is_retry and isinstance(error, errors.ConnectionError):
                    self._close_idle()  # connections from before a restart are broken as well
                    is_retry = True
                    continue
                raise self._failed(operation, error, may_be_done=is_lost or is_retry) from None
            if is_retry and answer[0] in (b"conflict", b"exists"):
                raise OutcomeUnknown(_UNKNOWN)  # the first attempt may have been done, and others have saved since
            return answer

    def _run_script(self, key: str, operation: Operation, *arguments: Any, is_retry: bool = False) -> list[Any]:
        """Run the script on a connection that no other thread uses. is_retry: on a new one, not on an idle one."""
        script = self._create_script if operation == "create" else self._other_script
        return self._run(lambda client: script(keys=[key], args=[operation, *arguments], client=client), is_retry)

    def _run_script_between(
        self, command: tuple[Any, ...], key: str, operation: Operation, *arguments: Any, is_retry: bool = False
    ) -> list[Any]:
        script = self._create_script if operation == "create" else self._other_script
        evaluate = partial(_evaluate_between, command=command, script=script, arguments=(key, operation, *arguments))
        return self._run(evaluate, is_retry)

    def _run(self, use: Callable[[Redis], Any], is_retry: bool) -> list[Any]:
        client = self._take(is_new=is_retry)
        try:
            answer: list[Any] = use(client)
            if _change_of(client) != self._change:
                raise _Superseded
        except BaseException:
            _close(client)
            raise
        self._idle.append(client)
        return answer

    def _take(self, is_new: bool = False) -> Redis:
        """Return a client with a connection that no other thread uses, to the current server."""
        while self._idle and not is_new:
            try:
                client = self._idle.pop()
            except IndexError:
                break  # another thread was faster
            if _change_of(client) == self._change and not _is_closed(client):
                return client
            _close(client)
        return Redis(connection_pool=self._client.connection_pool, single_connection_client=True)

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                _close(self._idle.pop())

    def _failed(self, operation: Operation, error: errors.RedisError, may_be_done: bool) -> GruServeError:
        """Note that an operation failed, and return the error for its caller."""
        is_full = isinstance(error, errors.OutOfMemoryError)
        if is_full:
            log.error("the session store is full", **_kind(error))
        else:
            self._note_failure(error, may_be_about_one_call=True)
            if self._observer is not None:
                self._observer.count_failure(operation)
        if may_be_done and operation in _CHANGING:
            return OutcomeUnknown(_UNKNOWN)
        if is_full:
            return Overloaded(_FULL) if operation == "create" else StoreUnavailable(_FULL)
        return StoreUnavailable(_NO_CONNECTION if _is_own_exhaustion(error) else _UNREACHABLE)

    def _note_failure(self, error: errors.RedisError, may_be_about_one_call: bool = False) -> None:
        """Refuse calls until a ping succeeds, unless the error says nothing about the server."""
        word = _word(error)
        if isinstance(error, _InRecovery):
            return
        if _is_own_exhaustion(error):
            log.error("there are too many connections to the session store", **_kind(error))
            return
        if may_be_about_one_call and word in _ABOUT_ONE_CALL:
            log.error("the session store refused a call", **_kind(error))
            self._probe_at = 0.0
            return
        facts = _kind(error)
        with self._lock:
            if _is_without_answer(error):
                event = "the session store can't be reached"
            else:
                self._change += 1
                if word in _WAS_REPLICA:
                    self._left_epoch = self._epoch
                event = "the session store refuses to work"
                facts["advice"] = str(error) if isinstance(error, _Unsuitable) else _ADVICE.get(word, "see its log")
            if self._failure != event + word:
                log.error(event, **facts)
            self._failed_at, self._failure = time.monotonic(), event + word

    def _has_to_restore(self) -> bool:
        return self._restored_change != self._change or self._restored_epoch != self._epoch

    def _is_recovering(self) -> bool:
        return self._has_to_restore() or time.monotonic() < self._opens_at

    def _on_connect(self, connection: Any) -> None:
        """Prepare a new connection of `_client`. Raises _InRecovery during the recovery window."""
        self._identify(connection)
        if self._is_recovering():
            raise _InRecovery

    def _on_ping_connect(self, connection: Any) -> None:
        info = self._identify(connection)
        self._ping_change, self._ping_run_id = connection.change, info[b"run_id"]
        if self._ping_run_id != self._inspected:
            self._warn_of_eviction(connection)
            self._inspected = self._ping_run_id

    def _identify(self, connection: Any) -> dict[bytes, bytes]:
        """Prepare a new connection, and find out whether the server's process is the one of earlier connections.

        Raises _Unsuitable if the server can't store sessions.
        """
        connection.on_connect()
        info = _info(connection, "server")
        _require_suitable(info)
        run_id = info[b"run_id"]
        with self._lock:
            if self._run_id not in (None, run_id):
                log.warning("the session store was restarted, or another server has taken its place")
                self._change += 1
            self._run_id = run_id
            connection.change = self._change
        return info

    def _warn_of_eviction(self, connection: Any) -> None:
        info = _info(connection, "memory")
        policy = info.get(b"maxmemory_policy", b"noeviction").decode()
        if info.get(b"maxmemory", b"0") != b"0" and policy != "noeviction":
            log.error(
                "the session store may evict sessions that are in use",
                advice="set maxmemory-policy to noeviction in the Redis of GRU_SERVE_SESSION_STORE",
                maxmemory_policy=policy,
            )

    def execute(self, commands: Sequence[tuple[Any, ...]], *, in_recovery: bool = False) -> list[Any]:
        """Run commands of Redis in one round trip and return their answers. Each may be repeated without harm.

        With `in_recovery`, also during the recovery window. Raises StoreUnavailable, and Overloaded if Redis is full.
        """
        if not in_recovery:
            self.check()
        try:
            answers = self._send_all(self._batch_client if in_recovery else self._client, commands)
            for answer in answers:
                if isinstance(answer, errors.RedisError):
                    raise answer
            return answers
        except errors.OutOfMemoryError:
            raise Overloaded("the session store is full: try again later") from None
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None


def _client(url: str, timeout_s: float, on_connect: Callable[[Any], object]) -> Redis:
    """Return a client that has not connected yet. Raises ValueError if the URL is invalid, without naming it."""
    try:
        client = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=on_connect,
            client_name="gru-serve",
            max_connections=_MAX_CONNECTIONS,
            # Nothing that other servers may lack: with RESP3 come notices of maintenance.
            protocol=2,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # checks the URL's options
    except (ValueError, TypeError):
        # The message of the cause may have parts of the URL, such as the password.
        raise ValueError(
            "must be redis://[user:password@]host[:port][/db], rediss://... or unix://[user:password@]/path[?db=0]; "
            "write special characters in the user and the password as %XX"
        ) from None
    return client


def _change_of(client: Redis) -> int:
    change: int = client.connection.change  # type: ignore[union-attr]
    return change


def _is_closed(client: Redis) -> bool:
    """Whether an idle connection was closed at its other end. A command sent on it may have an unknown outcome."""
    socket = client.connection._sock  # type: ignore[union-attr]
    if socket is None:
        return True
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))  # from a connection that is idle and open nothing can be read


def _evaluate_between(client: Redis, command: tuple[Any, ...], script: Script, arguments: tuple[Any, ...]) -> Any:
    """Run a script between two executions of a command, in one round trip, and return its answer.

    If the command itself fails, that is not an error: the server may be full.
    """
    connection: Any = client.connection
    for _ in range(2):
        commands = [command, ("EVALSHA", script.sha, 1, *arguments), command]
        connection.send_packed_command(connection.pack_commands(commands))
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(connection.read_response())
            except errors.ResponseError as error:
                answers.append(error)
        if not isinstance(answers[1], errors.NoScriptError):
            break
        connection.send_command("SCRIPT", "LOAD", script.script)
        connection.read_response()
    if isinstance(answers[1], errors.RedisError):
        raise answers[1]
    return answers[1]


def _close(client: Redis) -> None:
    if client.connection is not None:
        # Disconnect first: `close` returns the connection to the pool, which would hand it out again.
        client.connection.disconnect()  # type: ignore[no-untyped-call]
    client.close()


def _word(error: errors.RedisError) -> str:
    """Return the first word of the answer that Redis gave, "" if it gave none."""
    if _NO_PERMISSION.search(str(error)):
        return "NOPERM"  # Redis 7.0 says ERR
    if error.status_code:
        return str(error.status_code)
    found = re.match("[A-Z]+ ", str(error)) if isinstance(error, errors.ResponseError) else None
    return found[0].strip() if found else ""


def _kind(error: errors.RedisError) -> dict[str, str]:
    """Return what may be logged of an error."""
    return {"error": type(error).__name__, "answer": _word(error)}


def _is_without_answer(error: errors.RedisError) -> bool:
    """Whether an operation may have been done although it failed."""
    is_network = isinstance(error, errors.ConnectionError | errors.TimeoutError)
    return is_network and not (
        isinstance(error, _InRecovery | _Unsuitable) or _word(error) or _is_own_exhaustion(error)
    )


def _is_own_exhaustion(error: errors.RedisError) -> bool:
    """Whether a connection was refused because there are too many, which says nothing about those that exist."""
    number = getattr(error.__context__, "errno", None)
    return (
        isinstance(error, errors.MaxConnectionsError)
        or number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL)
        or "max number of clients reached" in str(error)
    )


def _require_suitable(info: dict[bytes, bytes]) -> None:
    """Raise _Unsuitable, with advice, if a server can't store sessions."""
    version, mode = info.get(b"redis_version", b"0").decode(), info.get(b"redis_mode", b"standalone")
    if mode == b"sentinel":
        raise _Unsuitable("GRU_SERVE_SESSION_STORE leads to a Sentinel: give the address of the server that it watches")
    if mode == b"cluster":
        raise _Unsuitable("GRU_SERVE_SESSION_STORE leads to a node of a Redis Cluster: give a server without a cluster")
    if int(version.split(".")[0]) < _MIN_VERSION:
        raise _Unsuitable(f"the server in GRU_SERVE_SESSION_STORE is Redis {version}: sessions need Redis 7 or later")
    if not info.get(b"run_id"):
        raise _Unsuitable(
            "the server in GRU_SERVE_SESSION_STORE doesn't say its run_id in INFO: let it, or use another"
        )


def _info(connection: Any, section: str) -> dict[bytes, bytes]:
    connection.send_command("INFO", section)
    answer = connection.read_response()
    lines = bytes(answer).splitlines() if isinstance(answer, bytes) else []
    return dict(line.split(b":", 1) for line in lines if b":" in line)

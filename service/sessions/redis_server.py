"""Calls session.lua on Redis, quickly or not at all.

Calls fail fast while Redis is down. After a restart of Redis, or if another server has taken its place, they are
refused until lost writes have been restored. The masters of a cluster count as one server: a session's record, its
segments and its owner's index are on several of them, so while one is missing, little works.

Of an error, only its kind and the first word of Redis' answer are logged: the rest may hold session ids, owners and the
tokens of leases.
"""

from __future__ import annotations

import errno
import itertools
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

import structlog
from redis import exceptions as errors

from service.errors import GruServeError, OutcomeUnknown, Overloaded, StoreUnavailable
from service.sessions.redis_connections import (
    Command,
    Link,
    RedisConnections,
    Script,
    TlsFailure,
    Unsuitable,
    without_errors,
)
from service.sessions.redis_url import Address, parse
from service.sessions.session_store import Operation, StoreObserver

log = structlog.get_logger(__name__)

_SCRIPT = resources.files("service.sessions").joinpath("session.lua").read_text()
# At its memory limit Redis refuses a script without `allow-oom`, which only `create` is. All else that a session needs,
# such as the lease for deleting it, is done at the limit too. Needs Redis 7.
_CREATE_SCRIPT, _OTHER_SCRIPT = Script(f"#!lua\n{_SCRIPT}"), Script(f"#!lua flags=allow-oom\n{_SCRIPT}")
_UNREACHABLE = "sessions are unavailable, because the session store can't be reached: try again in a second"
_NO_CONNECTION = "this server has no connection to the session store left, and nothing was done: try again in a second"
_FULL = "the session store is full: try again later"
_UNKNOWN = (
    "the session store did not answer, so the operation may or may not have been done: read the session's position "
    "before you repeat it"
)
_PROBE_S = 1.0  # between two probes of a server that works
_CHANGING: tuple[Operation, ...] = ("create", "save", "claim", "delete")
# First words of answers that concern one call. All others concern the server, such as READONLY, LOADING, MASTERDOWN,
# NOAUTH, NOPERM, MISCONF, NOREPLICAS, CLUSTERDOWN and BUSY. Whether every call gets an ERR, a probe finds out.
_ABOUT_ONE_CALL = ("ERR", "WRONGTYPE", "NOSCRIPT")
_ADVICE = {
    "READONLY": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    "MASTERDOWN": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    "NOREPLICAS": "too few replicas follow it: see its setting min-replicas-to-write",
    "NOAUTH": "give a user and a password in GRU_SERVE_SESSION_STORE",
    "WRONGPASS": "correct the user and the password in GRU_SERVE_SESSION_STORE",
    "NOPERM": "give the user in GRU_SERVE_SESSION_STORE the permissions that docs/redis.md lists",
    "MISCONF": "it can't write to its disk: see its log",
    "LOADING": "it is starting: wait",
    "CLUSTERDOWN": "a part of the cluster is down: see CLUSTER INFO of its nodes",
}
_NO_PERMISSION = re.compile("ACL failure in script|^The user executing the script can't ")


class _InRecovery(errors.ConnectionError):
    """A new connection is refused during the recovery window."""


class _Superseded(errors.ConnectionError):
    """The answer is from a server whose place another one has taken, and which may not know what was done."""


class RedisServer:
    """Calls session.lua on a server, or on the masters of a cluster.

    Any number of threads may call. Each call fails within about `timeout_s`.

    After a call has failed, all calls fail at once, until `ping` succeeds. A restart, or a failover to another server,
    may have lost the last writes. All calls are refused from then until `recovery_window_s` after this process has
    restored its own writes (`LeaseRenewer`), so that other replicas can restore theirs too.

    A server that refuses to work, for example because it has become a replica, counts as replaced: connections made
    before are closed before their next use, and the server that works next is restored like another one. In a cluster
    this is so for every master, and a master that is added or removed counts as a change as well.

    Args:
        url: See docs/redis.md.
        timeout_s: How long the server may take for an answer.
        recovery_window_s: How long other replicas may take to restore their writes.
        observer: Counts and times the calls.
        probe_key: The key to which `ping` writes.
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
        self._failures: set[str] = set()  # what was logged since the last ping that succeeded
        self._advice: str | None = None  # what to do about it
        self._run_ids: dict[Address, bytes] = {}  # identify the processes of the masters
        # How often a server was replaced. Each connection has the number that was current when it was made
        # (`Link.change`). If it has an older one, it leads to a server that may have been replaced.
        self._change = 0
        self._restored_change = 0  # the last writes have been restored in the server that has this number
        self._recovered_at = 0.0  # monotonic time at which the recovery window ends

        self._probe_at = 0.0  # monotonic time of the next probe

        # The following are for the thread that pings. It has a connection to each master, which no other thread uses.
        self._ping_links: dict[Address, Link] = {}
        self._ping_change = 0  # of the connections
        self._pinged_change = 0  # of the connections on which the last ping succeeded
        self._has_probed = False  # a probe has succeeded, so all masters are known
        self._inspected: set[bytes] = set()  # the servers' processes that were inspected

        self._connections = RedisConnections(parse(url), timeout_s, (_CREATE_SCRIPT, _OTHER_SCRIPT))
        self._idle: dict[Address, list[Link]] = {}  # connections that no thread uses
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
            return self._call(operation, key, arguments)
        finally:
            if self._observer is not None:
                self._observer.observe(operation, time.perf_counter() - started)

    def keys(self, pattern: str) -> Iterator[str]:
        """Yield all keys that match a glob pattern, in any order. Raises StoreUnavailable."""
        self.check()
        try:
            for address in list(self._run_ids):
                link, cursor = self._take(address), 0
                try:
                    while True:
                        ((cursor, found),) = link.require([("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)])
                        for key in found:
                            yield key.decode()
                        if int(cursor) == 0:
                            break
                except BaseException:
                    link.close()
                    raise
                self._give_back(address, link)
        except errors.RedisError as error:
            if _word(error):  # a user that may not list may still do everything else
                log.error("the session store refuses to list sessions", **_kind(error))
            else:
                self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None

    def check(self, *, explain: bool = False) -> None:
        """Raise StoreUnavailable while calls are refused. explain: The message says what to do, if that is known."""
        if self._failed_at is not None or self._is_recovering():
            advice = self._advice if explain and self._failed_at is not None else None
            raise StoreUnavailable(_UNREACHABLE if advice is None else f"sessions are unavailable: {advice}")

    def ping(self) -> bool:
        """Return whether lost writes have to be restored: the server was replaced since the last `mark_restored`.

        Every second, and while calls are refused, this is a probe: on a new connection, which leads where the address
        leads now, it does what a session needs, even on a server that is full. For one thread. Raises StoreUnavailable
        if that fails.
        """
        began = time.monotonic()
        try:
            masters = self._connections.discover(elsewhere=self._failed_at is not None)
            is_probe = self._failed_at is not None or began >= self._probe_at or self._ping_change != self._change
            if is_probe or self._ping_links.keys() != set(masters) or not self._answer_pings():
                self._probe(masters)
                self._probe_at = began + _PROBE_S
        except errors.RedisError as error:
            self._probe_at = 0.0
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None
        with self._lock:
            self._pinged_change = self._ping_change
            if self._failed_at is not None and self._failed_at < began:
                log.info("the session store is back")
                self._failed_at = None
                self._failures.clear()
            return self._restored_change != self._change

    def call_all(self, calls: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """Run several calls (operation, key, argument, ...) in one round trip, also during the recovery window.

        Any thread may call. Raises StoreUnavailable.
        """
        commands = [_OTHER_SCRIPT.call([key], operation, *arguments) for operation, key, *arguments in calls]
        try:
            return self._send_all(commands, in_recovery=True)
        except errors.RedisError as error:
            self._note_failure(error, may_be_about_one_call=True)
            raise StoreUnavailable(_UNREACHABLE) from None

    def mark_restored(self) -> None:
        """Note that this process has restored its writes. Calls are allowed again when the recovery window is over.

        If the server was replaced since the last ping, they have to be restored again.
        """
        self._close_idle()  # they are broken, and a call that is repeated because of that may have an unknown outcome
        with self._lock:
            self._recovered_at = time.monotonic() + self._recovery_window_s  # other replicas may still be restoring
            self._restored_change = self._pinged_change

    def close(self) -> None:
        """Close all connections."""
        self._close_idle()
        self._close_ping_links()
        self._connections.close()

    def _call(self, operation: Operation, key: str, arguments: Sequence[Any]) -> list[Any]:
        is_retry = False
        while True:
            try:
                answer = self._run_script(key, operation, *arguments, is_retry=is_retry)
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
        """Run the script. is_retry: on a new connection, not on an idle one."""
        script = _CREATE_SCRIPT if operation == "create" else _OTHER_SCRIPT

        def run(address: Address, commands: Sequence[Command], is_asking: bool) -> list[Any]:
            link = self._take(address, is_new=is_retry)
            try:
                answers = link.run(commands, is_asking)
                if link.change != self._change:
                    raise _Superseded
            except BaseException:
                link.close()
                raise
            self._give_back(address, link)
            return answers

        (answer,) = without_errors(self._connections.execute([script.call([key], operation, *arguments)], run))
        result: list[Any] = answer
        return result

    def _send_all(self, commands: Sequence[Command], in_recovery: bool) -> list[Any]:
        """Run commands that may be repeated without harm, and return their answers. Raises RedisError."""

        def run(address: Address, some: Sequence[Command], is_asking: bool) -> list[Any]:
            for is_retry in (False, True):
                link = self._take(address, is_new=is_retry, in_recovery=in_recovery)
                try:
                    answers = link.run(some, is_asking)
                except BaseException as error:
                    link.close()
                    if is_retry or not isinstance(error, errors.ConnectionError) or _word(error):
                        raise
                    continue  # the server may have closed an idle connection
                self._give_back(address, link)
                return answers
            raise AssertionError

        return without_errors(self._connections.execute(commands, run))

    def _take(self, address: Address, *, is_new: bool = False, in_recovery: bool = False) -> Link:
        """Return a connection to a current master that no other thread uses. Raises RedisError.

        in_recovery: also during the recovery window.
        """
        idle = self._idle.setdefault(address, [])
        link = None
        while link is None and idle and not is_new:
            try:
                link = idle.pop()
            except IndexError:
                break  # another thread was faster
            if link.change != self._change:
                link.close()
                link = None
        if link is None:
            link = self._connections.connect(address)
            try:
                self._identify(address, link)
            except BaseException:
                link.close()
                raise
        if not in_recovery and self._is_recovering():
            self._give_back(address, link)
            raise _InRecovery
        return link

    def _give_back(self, address: Address, link: Link) -> None:
        self._idle[address].append(link)

    def _close_idle(self) -> None:
        for idle in list(self._idle.values()):
            with suppress(IndexError):
                while True:
                    idle.pop().close()

    def _close_ping_links(self) -> None:
        for link in self._ping_links.values():
            link.close()
        self._ping_links = {}

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
        facts, advice = _kind(error), str(error) if isinstance(error, TlsFailure) else None
        with self._lock:
            if _is_without_answer(error):
                event = "the session store can't be reached"
            else:
                self._change += 1
                event = "the session store refuses to work"
                advice = str(error) if isinstance(error, Unsuitable) else _ADVICE.get(word, "see its log")
            if advice is not None:
                facts["advice"] = advice
            self._advice = advice
            if event + word not in self._failures:
                log.error(event, **facts)
                self._failures.add(event + word)
            self._failed_at = time.monotonic()

    def _is_recovering(self) -> bool:
        return self._restored_change != self._change or time.monotonic() < self._recovered_at

    def _answer_pings(self) -> bool:
        """Return whether the connections of the last probe still work. Raises RedisError if a server doesn't."""
        for link in self._ping_links.values():
            try:
                link.require([("PING",)])
            except errors.ConnectionError as error:
                if _word(error):
                    raise
                return False  # it is closed: a server was restarted, or closes connections that are idle
        return True

    def _probe(self, masters: Sequence[Address]) -> None:
        """Do what a session needs on a new connection to each master. Raises RedisError."""
        self._close_ping_links()
        before = self._change
        for address in masters:
            link = self._ping_links[address] = self._connections.connect(address)
            info = self._identify(address, link)
            if not self._has_probed and link.info("replication").get(b"master_replid2", b"").strip(b"0"):
                # The server was a replica once, and may have been promoted a moment ago: others may be restoring.
                self._recovered_at = time.monotonic() + self._recovery_window_s
            if info[b"run_id"] not in self._inspected:
                self._warn_of_eviction(link)
                self._inspected.add(info[b"run_id"])
            link.require([_OTHER_SCRIPT.call([self._probe_key_on(address)], "probe", "", 0)])
        with self._lock:
            self._ping_change = max(link.change for link in self._ping_links.values())
            removed = self._run_ids.keys() - set(masters)
            for address in removed:
                del self._run_ids[address]
            if removed and self._change == before:  # else it has been counted that another one took its place
                log.warning("a master of the session store was removed")
                self._change += 1
                self._ping_change = self._change
            self._inspected.intersection_update(self._run_ids.values())
            self._has_probed = True

    def _probe_key_on(self, address: Address) -> str:
        """Return a key that a master has."""
        keys = itertools.chain([self._probe_key], (f"{self._probe_key}:{number}" for number in itertools.count()))
        return next(key for key in itertools.islice(keys, 10**6) if self._connections.address_of(key) == address)

    def _identify(self, address: Address, link: Link) -> dict[bytes, bytes]:
        """Find out whether the process to which a new connection leads is the one of earlier connections.

        Return what the server says of itself. Raises Unsuitable if it can't store sessions.
        """
        info = link.info("server")
        self._connections.require_suitable(info)
        run_id = info[b"run_id"]
        # Redis counts whole seconds, so the uptime may be up to one second less than it says.
        uptime_s = max(0.0, float(info.get(b"uptime_in_seconds", "inf")) - 1)
        with self._lock:
            known = self._run_ids.get(address)
            if known != run_id and (known is not None or self._has_probed):
                log.warning("the session store was restarted, or another server has taken its place")
                self._change += 1
            elif known is None and uptime_s < self._recovery_window_s:
                # The server was just started, and other replicas may be restoring their writes.
                recovered_at = time.monotonic() + self._recovery_window_s - uptime_s
                self._recovered_at = max(self._recovered_at, recovered_at)
            self._run_ids[address] = run_id
            link.change = self._change
        return info

    def _warn_of_eviction(self, link: Link) -> None:
        info = link.info("memory")
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
            return self._send_all(commands, in_recovery)
        except errors.OutOfMemoryError:
            raise Overloaded("the session store is full: try again later") from None
        except errors.RedisError as error:
            self._note_failure(error)
            raise StoreUnavailable(_UNREACHABLE) from None


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
    return is_network and not (isinstance(error, _InRecovery | Unsuitable) or _word(error) or _is_own_exhaustion(error))


def _is_own_exhaustion(error: errors.RedisError) -> bool:
    """Whether a connection was refused because there are too many, which says nothing about those that exist."""
    number = getattr(error.__context__, "errno", None)
    return number in (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.EADDRNOTAVAIL,
    ) or "max number of clients reached" in str(error)

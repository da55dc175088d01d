"""Calls session.lua on Redis, quickly or not at all.

Calls fail fast while Redis is down. After a restart of Redis, or if another server has taken its place, they are
refused until all processes have restored what it lost. The server itself knows which processes there are, and counts
such changes: the time between two of them is an epoch (`attend` in session.lua).

The masters of a cluster count as one server: a session's record, its segments and its owner's index are on several of
them, so while one is missing, little works. Each master counts its own changes. The deployment is in the greatest epoch
of a master, which every process takes to the other masters, so that a change of any of them begins an epoch in all.

Of an error, only its kind and the first word of Redis' answer are logged: the rest may hold session ids, owners and the
tokens of leases.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from typing import Any

import structlog
from redis import exceptions as errors

from service.errors import GruServeError, OutcomeUnknown, Overloaded, StoreUnavailable
from service.sessions.redis_answers import InvalidAnswer
from service.sessions.redis_connections import (
    Command,
    Link,
    RedisConnections,
    Script,
    TlsFailure,
    Unsuitable,
    facts,
    reading_answers,
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
_FORGOTTEN = "the session store has lost what it had, and gets it again: try again in a second"
_FULL = "the session store is full: try again later"
_OCCUPIED = "the session store has something else under a key that is needed: see the server's log"
_UNKNOWN = (
    "the session store did not answer, so the operation may or may not have been done: read the session's position "
    "before you repeat it"
)
_INSPECTED_S = 60.0  # between two looks at a server's settings, which can change while it runs
_CALL_TIMEOUTS = 2  # times the limit of an exchange, for a call
_PROBE_S = 1.0  # between two probes of a server that works
_PATIENCE_WINDOWS = 4  # a process that was there is waited for this many recovery windows after it was heard of last
_MAX_RESTORE_S = 60.0  # others no longer wait for a process that fails to restore for longer
_NO_EPOCH = b"0" * 16
_CHANGING: tuple[Operation, ...] = ("create", "save", "claim", "delete")
# First word of answers for a key that has something else, which session.lua also gives for a damaged record.
_WRONG_KEY = "WRONGTYPE"
# First words of answers that concern one call. All others concern the server, such as READONLY, LOADING, MASTERDOWN,
# NOAUTH, NOPERM, MISCONF, NOREPLICAS, CLUSTERDOWN and BUSY. Whether every call gets an ERR, a probe finds out.
_ABOUT_ONE_CALL = ("ERR", _WRONG_KEY, "NOSCRIPT")
_WHO: Command = ("INFO", "server")
_SEE_LOG = "see the log of its server"
_ADVICE = {
    "READONLY": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    "MASTERDOWN": "it is a replica: GRU_SERVE_SESSION_STORE has to lead to the master",
    _WRONG_KEY: "a key whose name begins with gru-serve:probe has something else: delete it",
    "NOREPLICAS": "too few replicas follow it: see its setting min-replicas-to-write",
    "NOAUTH": "give a user and a password in GRU_SERVE_SESSION_STORE",
    "WRONGPASS": "correct the user and the password in GRU_SERVE_SESSION_STORE",
    "NOPERM": "give the user in GRU_SERVE_SESSION_STORE the permissions that docs/redis.md lists",
    "MISCONF": "it can't write to its disk: see the log of its server",
    "LOADING": "it is starting: wait",
    "CLUSTERDOWN": "a part of the cluster is down: see CLUSTER INFO of its nodes",
    "DB": "correct the number of the database in GRU_SERVE_SESSION_STORE",
}
# After these, the server may have the data of another one.
_WAS_REPLICA = ("READONLY", "MASTERDOWN", "LOADING")
_NO_PERMISSION = re.compile("ACL failure in script|^The user executing the script can't ")


class KeyOccupied(StoreUnavailable):
    """A key has something else than this service stores there, or a damaged record. It concerns no other key."""


class _InRecovery(errors.ConnectionError):
    """A new connection is refused during the recovery window."""


class _Superseded(errors.ConnectionError):
    """The answer is from a server whose place another one has taken, and which may not know what was done."""


class RedisServer:
    """Calls session.lua on a server, or on the masters of a cluster.

    Any number of threads may call. An exchange with the server fails within `timeout_s`, and a call within about twice
    that: the rest is for connecting, redirections in a cluster, and a second attempt if the connection was closed.
    Texts of megabytes may take longer, at 8 MiB/s.

    After a call has failed, all calls fail at once, until `ping` succeeds. A restart, or a failover to another server,
    may have lost the last writes. All calls are refused from then until this process has restored its own writes
    (`LeaseRenewer`) and the others theirs: those that the server knows, for up to four recovery windows after each was
    heard of last, and for one window also those that it doesn't know.

    A server that refuses to work, for example because it has become a replica, counts as replaced: connections made
    before are closed before their next use, and the server that works next is restored like another one. In a cluster
    this is so for every master, and a master that is added or removed counts as a change as well.

    Args:
        url: See docs/redis.md.
        timeout_s: How long the server may take for an answer.
        recovery_window_s: How long calls are refused at least, so that every replica notices the change.
        observer: Counts and times the calls.
        probe_key: The key to which `ping` writes, and which has what replicas know of the server. In a cluster each
            master has such a key: this one, or one that begins with it.
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
        self._timeout_s, self._recovery_window_s = timeout_s, recovery_window_s
        self._observer, self._probe_key = observer, probe_key
        self._lock = threading.Lock()  # guards the following
        self._failed_at: float | None = None  # monotonic time of the last failure; None after a ping that succeeded
        self._failures: set[str] = set()  # what was logged since the last ping that succeeded
        self._advice: str | None = None  # what to do about it
        self._run_ids: dict[Address, bytes] = {}  # identify the processes of the masters
        # How often a server was replaced. Each connection has the number that was current when it was made
        # (`Link.change`). If it has an older one, it leads to a server that may have been replaced.
        self._change = 0
        self._restored_change = 0  # the last writes have been restored in the server that has this number
        self._opens_at = 0.0  # monotonic time from which on calls are served; inf if that depends on other replicas
        self._epoch, self._restored_epoch = _NO_EPOCH, b""  # the server's; the last one in which this process restored
        self._left_epoch = b""  # in which a master was seen as a replica, or removed
        self._restoring_since = math.inf  # monotonic; inf if this process has nothing to restore

        self._name = secrets.token_hex(8)  # names this process among the replicas
        self._probe_at = 0.0  # monotonic time of the next probe

        # The following are for the thread that pings. It has a connection to each master, which no other thread uses.
        self._ping_links: dict[Address, Link] = {}
        self._ping_change = 0  # of the connections
        self._pinged_change = 0  # of the connections on which the last ping succeeded
        self._has_probed = False  # a probe has succeeded, so all masters are known
        # When the settings of each server's process are read next, monotonic, and its policy if it may evict, else "".
        self._inspected: dict[bytes, tuple[float, str]] = {}

        self._connections = RedisConnections(parse(url), timeout_s, (_CREATE_SCRIPT, _OTHER_SCRIPT))
        self._idle: dict[Address, list[Link]] = {}  # connections that no thread uses
        with suppress(StoreUnavailable):
            self.ping()

    def call(self, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        """Run one operation on one session and return the script's answer.

        Raises StoreUnavailable if nothing was changed (KeyOccupied if that is because of the key), OutcomeUnknown if a
        save may or may not have been done, and Overloaded if Redis has no memory for a new session.
        """
        return self._timed(operation, partial(self._run_script, key, operation, *arguments))

    def call_between(self, command: Command, operation: Operation, key: str, *arguments: Any) -> list[Any]:
        """Do the same, and a command before and after it. If one master has both keys, that takes one exchange.

        If the command itself fails, that is only logged.
        """
        return self._timed(operation, partial(self._run_script, key, operation, *arguments, around=command))

    def keys(self, pattern: str) -> Iterator[str]:
        """Yield all keys that match a glob pattern, in any order. Raises StoreUnavailable."""
        self.check()
        try:
            for address in list(self._run_ids):
                link, cursor = self._take(address, self._call_ends_at()), 0
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

    @property
    def epoch(self) -> bytes:
        """The epoch in which the server is: 16 digits. Each save's nonce begins with it."""
        return self._epoch

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
        with self._pinging():
            is_refusing = self._failed_at is not None or self._is_recovering()
            masters = self._connections.discover(elsewhere=self._failed_at is not None)
            is_probe = is_refusing or began >= self._probe_at or self._ping_change != self._change
            if is_probe or self._ping_links.keys() != set(masters) or not self._answer_pings():
                self._reach(masters)
                self._attend()
                self._probe_at = began + _PROBE_S
        with self._lock:
            self._pinged_change = self._ping_change
            if self._failed_at is not None and self._failed_at < began:
                log.info("the session store is back")
                self._failed_at = None
                self._failures.clear()
            return self._has_to_restore()

    def require_intact(self, key: str, *, in_recovery: bool = False) -> None:
        """Raise StoreUnavailable if the master that should have a key has lost it with everything else.

        Such a master has lost its epoch too, or another process has begun a later one. The next ping is then a probe.
        Takes one exchange. Any thread may call.

        in_recovery: Also during the recovery window.
        """
        try:
            probe_key = self._probe_key_on(self._connections.address_of(key))
        except errors.RedisError as error:
            raise self._refused(error) from None
        if self.execute([("HGET", probe_key, "e")], in_recovery=True) != [self._epoch]:
            self._probe_at = 0.0
            raise StoreUnavailable(_FORGOTTEN)
        if not in_recovery:
            self.check()  # a probe may have noticed it just now, and know the new epoch

    def attend(self) -> None:
        """Tell the server, and so the other replicas, that this one is there. For the thread that pings.

        While it restores, it calls this again and again, and they wait. Raises StoreUnavailable.
        """
        with self._pinging():
            if not self._ping_links:
                self._reach(self._connections.discover(elsewhere=True))
            self._attend()

    def call_all(self, calls: Sequence[tuple[Any, ...]], *, one_by_one: bool = False) -> list[list[Any]]:
        """Run several calls (operation, key, argument, ...) in one round trip, also during the recovery window.

        Any thread may call. Raises StoreUnavailable, KeyOccupied. one_by_one: a call that is refused because of its
        key, for example because the key has something else, is logged and answers "refused".
        """
        commands = [_OTHER_SCRIPT.call([key], operation, *arguments) for operation, key, *arguments in calls]
        try:
            answers = self._send_all(commands, in_recovery=True)
            for number, answer in enumerate(answers):
                if not isinstance(answer, errors.RedisError):
                    _require_script_answer(answer)
                    continue
                if not one_by_one or _word(answer) not in _ABOUT_ONE_CALL:
                    raise answer
                log.error("the session store refused a call", **_kind(answer))
                answers[number] = [b"refused"]
            return answers
        except errors.RedisError as error:
            raise self._refused(error) from None

    def mark_restored(self) -> None:
        """Note that this process has restored its writes. Calls are allowed again when all replicas have done so.

        If the server was replaced since the last ping, they have to be restored again. For the thread that pings.
        """
        self._close_idle()  # they are broken, and a call that is repeated because of that may have an unknown outcome
        with self._lock:
            self._opens_at = math.inf
            self._restored_change, self._restored_epoch = self._pinged_change, self._epoch
        with suppress(StoreUnavailable):
            self.attend()

    def close(self) -> None:
        """Close all connections. Other replicas no longer wait for this one."""
        if self._failed_at is None:
            with suppress(errors.RedisError):
                self._attend_masters(b"", leaves=True)
        self._close_idle()
        self._close_ping_links()
        self._connections.close()

    def _timed(self, operation: Operation, run: Callable[..., list[Any]]) -> list[Any]:
        try:
            self.check()
        except StoreUnavailable:  # counted too: else an outage would look like a single failure
            self._count_failure(operation)
            raise
        started = time.perf_counter()
        try:
            return self._call(operation, run)
        finally:
            if self._observer is not None:
                self._observer.observe(operation, time.perf_counter() - started)

    def _call(self, operation: Operation, run: Callable[..., list[Any]]) -> list[Any]:
        is_retry, ends_at = False, self._call_ends_at()
        while True:
            try:
                answer = run(is_retry=is_retry, ends_at=ends_at)
                _require_script_answer(answer)
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

    def _run_script(
        self,
        key: str,
        operation: Operation,
        *arguments: Any,
        ends_at: float,
        around: Command | None = None,
        is_retry: bool = False,
    ) -> list[Any]:
        """Run the script.

        Args:
            key: Its key.
            operation: Its first argument.
            arguments: Its other ones.
            ends_at: When this has to end at the latest, monotonic.
            around: A command for before and after it.
            is_retry: Whether to use a new connection, and not an idle one.
        """
        script, num_exchanges = _CREATE_SCRIPT if operation == "create" else _OTHER_SCRIPT, 0

        def run(address: Address, commands: Sequence[Command], is_asking: bool) -> list[Any]:
            nonlocal num_exchanges
            num_exchanges += 1
            link = self._take(address, ends_at, is_new=is_retry)
            try:
                answers = link.run(commands, is_asking, ends_at=ends_at)
                if link.change != self._change:
                    raise _Superseded
            except BaseException:
                link.close()
                raise
            self._give_back(address, link)
            return answers

        call = script.call([key], operation, *arguments)
        if around is None:
            (answer,) = without_errors(self._connections.execute([call], run))
        else:
            first, answer, last = self._connections.execute([around, call, around], run)
            self._note_refused_command(first, last)
            if isinstance(answer, errors.RedisError):
                raise answer
            if num_exchanges > 1:  # another master has the other key: both commands were done before the script
                with suppress(GruServeError):
                    self.execute([around])
        result: list[Any] = answer
        return result

    def _send_all(self, commands: Sequence[Command], in_recovery: bool) -> list[Any]:
        """Run commands that may be repeated without harm, and return their answers, also errors. Raises RedisError."""
        ends_at = self._call_ends_at()

        def run(address: Address, some: Sequence[Command], is_asking: bool) -> list[Any]:
            for is_retry in (False, True):
                link = self._take(address, ends_at, is_new=is_retry, in_recovery=in_recovery)
                try:
                    answers = link.run(some, is_asking, ends_at=ends_at)
                except BaseException as error:
                    link.close()
                    if is_retry or not isinstance(error, errors.ConnectionError) or _word(error):
                        raise
                    continue  # the server may have closed an idle connection
                self._give_back(address, link)
                return answers
            raise AssertionError

        return self._connections.execute(commands, run)

    def _call_ends_at(self) -> float:
        return time.monotonic() + _CALL_TIMEOUTS * self._timeout_s

    def _take(self, address: Address, ends_at: float, *, is_new: bool = False, in_recovery: bool = False) -> Link:
        """Return a connection to a current master that no other thread uses. Raises RedisError.

        Args:
            address: Of the master.
            ends_at: When a new connection has to be there at the latest, monotonic.
            is_new: Whether it has to be a new one.
            in_recovery: Also during the recovery window.
        """
        idle = self._idle.get(address, [])
        link = None
        while link is None and idle and not is_new:
            try:
                link = idle.pop()
            except IndexError:
                break  # another thread was faster
            if link.change != self._change or link.is_closed():
                link.close()
                link = None
        if link is None:
            link = self._connections.connect(address, _WHO, ends_at=ends_at)
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
        self._idle.setdefault(address, []).append(link)

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
            self._count_failure(operation)
        if may_be_done and operation in _CHANGING:
            return OutcomeUnknown(_UNKNOWN)
        if is_full:
            return Overloaded(_FULL) if operation == "create" else StoreUnavailable(_FULL)
        if _word(error) == _WRONG_KEY:
            return KeyOccupied(_OCCUPIED)
        return StoreUnavailable(_NO_CONNECTION if _is_own_exhaustion(error) else _UNREACHABLE)

    def _count_failure(self, operation: Operation) -> None:
        if self._observer is not None:
            self._observer.count_failure(operation)

    def _note_refused_command(self, *answers: Any) -> None:
        for answer in answers:
            if isinstance(answer, errors.RedisError) and not isinstance(answer, errors.OutOfMemoryError):
                log.error("the session store refused a call", **_kind(answer))
                return

    def _refused(self, error: errors.RedisError) -> StoreUnavailable:
        """Note that commands failed that may be repeated, and return the error for their caller."""
        self._note_failure(error, may_be_about_one_call=True)
        return KeyOccupied(_OCCUPIED) if _word(error) == _WRONG_KEY else StoreUnavailable(_UNREACHABLE)

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
                if word in _WAS_REPLICA:
                    self._left_epoch = self._epoch
                event = "the session store refuses to work"
                advice = str(error) if isinstance(error, Unsuitable) else _ADVICE.get(word, _SEE_LOG)
            if advice is not None:
                facts["advice"] = advice
            self._advice = advice
            if event + word not in self._failures:
                log.error(event, **facts)
                self._failures.add(event + word)
            self._failed_at = time.monotonic()

    def _is_recovering(self) -> bool:
        return self._has_to_restore() or time.monotonic() < self._opens_at

    def _has_to_restore(self) -> bool:
        return self._restored_change != self._change or self._restored_epoch != self._epoch

    @contextmanager
    def _pinging(self) -> Iterator[None]:
        """Note failures of the thread that pings. Raises StoreUnavailable."""
        try:
            yield
        except errors.RedisError as error:
            self._close_ping_links()
            self._probe_at = 0.0
            self._note_failure(error)
            self._count_failure("ping")  # so that an outage is counted while nobody calls
            raise StoreUnavailable(_UNREACHABLE) from None

    def _answer_pings(self) -> bool:
        """Return whether the connections of the last probe still work. Raises RedisError if a server doesn't."""
        for link in self._ping_links.values():
            if link.is_closed():
                return False
            try:
                link.require([("PING",)])
            except errors.ConnectionError as error:
                if _word(error):
                    raise
                return False  # it is closed: a server was restarted, or closes connections that are idle
        return True

    def _reach(self, masters: Sequence[Address]) -> None:
        """Make a new connection to each master. Raises RedisError."""
        self._close_ping_links()
        before = self._change
        for address in masters:
            link = self._ping_links[address] = self._connections.connect(address, _WHO)
            self._identify(address, link)
            self._warn_of_eviction(link)
        with self._lock:
            # -1: another thread has found another process at one of the addresses, so this has to be done again.
            is_latest = all(self._run_ids[address] == link.run_id for address, link in self._ping_links.items())
            self._ping_change = max(link.change for link in self._ping_links.values()) if is_latest else -1
            removed = self._run_ids.keys() - set(masters)
            for address in removed:
                del self._run_ids[address]
            if removed and self._change == before:  # else it has been counted that another one took its place
                log.warning("a master of the session store was removed")
                self._change += 1
                self._ping_change = self._change
                self._left_epoch = self._epoch  # no master may have another process, so this one begins the epoch
            for run_id in self._inspected.keys() - set(self._run_ids.values()):
                del self._inspected[run_id]
            self._has_probed = True

    def _attend(self) -> None:
        """Tell the masters that this process is there, and find out the epoch. Raises RedisError."""
        left = self._left_epoch
        epoch, wait_ms = self._attend_masters(left)
        if not self._restored_epoch:  # a process that has just started knows nothing that it could restore
            self._restored_epoch = epoch
            epoch, wait_ms = self._attend_masters(left)
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
                self._opens_at = math.inf if wait_ms is None else time.monotonic() + wait_ms / 1000

    def _attend_masters(self, left: bytes, *, leaves: bool = False) -> tuple[bytes, int | None]:
        """Call `attend` of the script on each master. All of them have to be connected.

        A process that reaches only some of them restores nothing, so the others must not wait for it. Return the
        greatest epoch, and for how many milliseconds calls have to wait: None if nobody knows.

        leaves: For the last time.
        """
        window_ms = round(1000 * self._recovery_window_s)
        gives_up = time.monotonic() - self._restoring_since > _MAX_RESTORE_S
        patience_ms = "" if leaves or gives_up else _PATIENCE_WINDOWS * window_ms
        # Other processes wait for one that has noticed a change, even if it knows the epoch already.
        restored = self._restored_epoch if self._restored_change == self._change else b""
        masters = [(link, self._probe_key_on(address)) for address, link in self._ping_links.items()]
        epochs = [self._epoch]
        if len(masters) > 1:
            # First only look, so that a master which begins an epoch begins one that is greater than those of the
            # others. A process that has just started would not know them, and their clocks may differ.
            epochs += [link.require([("HGET", key, "e")])[0] or _NO_EPOCH for link, key in masters]
        with reading_answers():
            epoch, answers = max(epochs), []
            for link, key in masters:
                told = (link.run_id, epoch, left, self._name, restored, window_ms, patience_ms)
                (answer,) = link.require([_OTHER_SCRIPT.call([key], "attend", "", 0, *told)])
                epoch = max(epoch, answer[0])
                answers.append(answer)
            # If a master has begun an epoch, those before it get to know that the next time. Until then, calls wait.
            waits = [wait_ms if of_master == epoch else b"" for of_master, wait_ms in answers]
            return epoch, max(map(int, waits)) if waits and all(waits) else None

    def _probe_key_on(self, address: Address) -> str:
        """Return a key that a master has."""
        keys = itertools.chain([self._probe_key], (f"{self._probe_key}:{number}" for number in itertools.count()))
        return next(key for key in itertools.islice(keys, 10**6) if self._connections.address_of(key) == address)

    def _identify(self, address: Address, link: Link) -> None:
        """Find out whether the process to which a new connection leads is the one of earlier connections.

        The connection was made with `_WHO`.
        Raises Unsuitable if the server can't store sessions.
        """
        info = facts(*link.first_answers)
        self._connections.require_suitable(info)
        run_id = info[b"run_id"]
        with self._lock:
            known = self._run_ids.get(address)
            if known != run_id and (known is not None or self._has_probed):
                log.warning("the session store was restarted, or another server has taken its place")
                self._change += 1
            self._run_ids[address] = run_id
            link.run_id, link.change = run_id, self._change

    def _warn_of_eviction(self, link: Link) -> None:
        """Once a minute, log that a server may evict sessions, unless that is logged already."""
        due, known = self._inspected.get(link.run_id, (0.0, ""))
        if time.monotonic() < due:
            return
        info = link.info("memory")
        policy = info.get(b"maxmemory_policy", b"noeviction").decode()
        evicts = info.get(b"maxmemory", b"0") != b"0" and policy != "noeviction"
        self._inspected[link.run_id] = time.monotonic() + _INSPECTED_S, policy if evicts else ""
        if evicts and policy != known:
            log.error(
                "the session store may evict sessions that are in use",
                advice="set maxmemory-policy to noeviction in the Redis of GRU_SERVE_SESSION_STORE",
                maxmemory_policy=policy,
            )

    def execute(self, commands: Sequence[tuple[Any, ...]], *, in_recovery: bool = False) -> list[Any]:
        """Run commands of Redis in one round trip and return their answers. Each may be repeated without harm.

        With `in_recovery`, also during the recovery window. Raises StoreUnavailable, KeyOccupied, and Overloaded if
        Redis is full.
        """
        if not in_recovery:
            self.check()
        try:
            return without_errors(self._send_all(commands, in_recovery))
        except errors.OutOfMemoryError:
            raise Overloaded(_FULL) from None
        except errors.RedisError as error:
            raise self._refused(error) from None


def _word(error: errors.RedisError) -> str:
    """Return the first word of the answer that Redis gave, "" if it gave none."""
    if _NO_PERMISSION.search(str(error)):
        return "NOPERM"  # Redis 7.0 says ERR
    if "DB index is out of range" in str(error):
        return "DB"  # Redis says ERR
    if error.status_code:
        return str(error.status_code)
    found = re.match("[A-Z]+ ", str(error)) if isinstance(error, errors.ResponseError) else None
    return found[0].strip() if found else ""


def _require_script_answer(answer: Any) -> None:
    """Raise InvalidAnswer unless an answer is an array that begins with a word, as all of session.lua are."""
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], bytes):
        raise InvalidAnswer("the server answers with something else than the script does")


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

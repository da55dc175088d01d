"""Random operations of three replicas on a real Redis that restarts, loses writes, fills up, stops and is demoted.

Each change appends a token of its own to a session's text. So a text tells which changes it has, and the simple model
needs to know only three things of a session: the longest text that a caller has seen (`text`), the tokens of changes of
which nobody knows whether they were done (`maybe`), and what each replica has seen. What a replica answers must extend
what was seen before by tokens of `maybe`, unless it says that the session is lost.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.errors import (
    GruServeError,
    OutcomeUnknown,
    Overloaded,
    RevisionConflict,
    SessionBusy,
    SessionExists,
    SessionLost,
    SessionNotFound,
    StoreUnavailable,
)
from service.sessions import lease_renewer
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session, SessionKey
from service.sessions.session_store import Lease
from service.sessions.text import Text
from tests.harness.clock import Clock
from tests.harness.lossy_proxy import LossyProxy, lossy_proxy
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.wait import wait_until

NUM_RUNS = int(os.environ.get("STORE_MACHINE_RUNS", "20"))
TIMEOUT_S, WINDOW_S = 0.2, 0.03
LEASE_S = 6000.0  # long: a replica's own thread looks first after a sixth of it, and the machine looks itself
CACHES = (2**22, 2**22, 0)  # the last replica has none
REPLICAS = st.integers(0, len(CACHES) - 1)
IDS = st.sampled_from("ab")
EVENTS = ("mark", "pass_time", "close_connections", "fill", "empty")
WORK = ("update", "update", "update", "load", "load", "create", "delete", "lease", "save", "end", "release", "page")
CALL_OF_WORK = st.tuples(st.sampled_from(WORK), IDS, REPLICAS)
CALLS_OF_WORK = st.lists(CALL_OF_WORK, min_size=2, max_size=6)
CALLS = ("create", "lease", "claim", "save", "load", "release", "delete")


def tokens(text: str) -> list[str]:
    """Return the tokens of a text, each of which begins with a dot."""
    return [f".{token}" for token in text.split(".")[1:]]


def text_of(one: Session) -> str:
    return one.text.slice(0, one.position)


@dataclass
class Known:
    """A session as the simple model knows it."""

    text: str | None = None  # the longest that was seen; None if there is no session, or perhaps none
    maybe: set[str] = field(default_factory=set)  # tokens of changes that may have been done, or may be done again
    may_be_there: bool = False  # a creation whose outcome nobody knows
    may_be_deleted: bool = False  # the same for a deletion
    may_be_leased: bool = False  # by a call whose outcome nobody knows
    may_be_lost: bool = False  # Redis has lost what only replicas know that were stopped, or have no record
    seen: dict[int, str] = field(default_factory=dict)  # by replica
    deleted_by: int | None = None  # the replica that knows that there is none


class StoreMachine(RuleBasedStateMachine):
    """Replicas look at the server when the machine lets them: those that are paused never do.

    Redis and the replicas' time-outs are real. So any call may time out, and the same operations may give other answers
    when Hypothesis repeats them. The machine allows that, and waits after each such call until Redis has done it.
    """

    first_failure: Exception | None = None  # of all runs

    def __init__(self) -> None:
        super().__init__()
        self.ending, self.is_up, self.trace = ExitStack(), False, deque[str](maxlen=100)

    @initialize()
    def begin(self) -> None:
        directory = Path(self.ending.enter_context(tempfile.TemporaryDirectory()))
        options = ("--appendonly", "yes", "--appendfsync", "no")
        self.server: RedisProcess = self.ending.enter_context(redis_process(directory, *options))
        self.proxy: LossyProxy = self.ending.enter_context(lossy_proxy(self.server.url))
        self.clock = Clock()
        self.stores = [
            self.ending.enter_context(
                closing(
                    RedisStore(
                        RedisServer(self.proxy.url, TIMEOUT_S, WINDOW_S), 4096, cache, lease_s=LEASE_S, clock=self.clock
                    )
                )
            )
            for cache in CACHES
        ]
        self.paused: set[int] = set()
        self.sessions = {session_id: Known() for session_id in "ab"}
        self.leases: dict[str, list[tuple[int, Lease]]] = {}
        self.num_tokens = 0
        self.is_full = self.is_demoted = self.was_full = self.is_stopped = False
        self.mark()
        self.heal()
        self.is_up = True

    def teardown(self) -> None:
        failure = sys.exception()  # of the run that ends
        try:
            if failure is None and self.is_up:
                self.finish()
        except Exception as error:
            failure = error
            raise
        finally:
            if isinstance(failure, Exception) and StoreMachine.first_failure is None:
                StoreMachine.first_failure = failure
            self.ending.close()

    def finish(self) -> None:
        """Let everything work again, and compare all sessions with the model."""
        self.empty()
        for number in [*self.paused]:
            self.wake(number)
        self.pass_time()
        for session_id in self.sessions:
            for number in range(len(CACHES)):
                self.load(session_id, number)

    # The simple model

    @rule(event=st.sampled_from(EVENTS))
    def happen(self, event: str) -> None:
        self.note(event)
        getattr(self, event)()

    def mark(self) -> None:
        """Note what is on Redis' disk now: the next restart may lose what is written after it."""
        self.on_disk = self.server.on_disk()
        self.marked = {session_id: replace(known, maybe={*known.maybe}) for session_id, known in self.sessions.items()}
        self.changed: set[str] = set()  # sessions that somebody may have changed since

    def note(self, *facts: Any) -> None:
        """Add a line to what an assertion that fails reports: failures may depend on time, and not come again."""
        self.trace.append(" ".join(map(str, facts)))

    def ensure(self, condition: bool, message: str) -> None:
        assert condition, "\n".join([*self.trace, message])

    def new_token(self) -> str:
        self.num_tokens += 1
        return f".{self.num_tokens}"

    def see(self, session_id: str, number: int, text: str) -> None:
        """Compare a text that a replica has answered with what was seen before."""
        known = self.sessions[session_id]
        if known.text is None:
            self.ensure(known.may_be_there or known.may_be_lost, f"{session_id}: {text} is there")
            before = ""
        else:
            before = known.text
        if known.may_be_lost and number in known.seen:
            before_here = known.seen[number]
            self.ensure(text.startswith(before_here), f"replica {number} went back from {before_here}: {text}")
        self.ensure(text.startswith(before), f"{before} was seen, and now {text}")
        more = tokens(text[len(before) :])
        self.ensure(len(more) == len({*more}), f"doubled: {text}")
        self.ensure({*more} <= known.maybe, f"{text}: of {more} only {known.maybe} may be there")
        known.maybe -= {*more}
        known.text, known.may_be_there, known.may_be_deleted = text, False, False
        known.seen[number] = text

    def miss(self, session_id: str) -> None:
        """Note that a replica has said that there is no such session."""
        known = self.sessions[session_id]
        is_deleted = known.text is None or known.may_be_deleted or known.may_be_lost
        self.ensure(is_deleted, f"{session_id}: {known.text} was seen, and is not there")
        if not known.may_be_lost:
            self.sessions[session_id] = Known(may_be_leased=known.may_be_leased)

    def call(self, session_id: str, number: int, act: Callable[[RedisStore, SessionKey], Any]) -> Any:
        """Let a replica call. Returns its answer, or an error that may be."""
        store = self.stores[number]
        self.changed.add(session_id)
        try:
            answer = act(store, SessionKey("", session_id))
            self.note(number, session_id, text_of(answer) if isinstance(answer, Session) else answer)
            return answer
        except GruServeError as error:
            self.note(number, session_id, type(error).__name__)
            self.check_error(session_id, error)
            if isinstance(error, StoreUnavailable | OutcomeUnknown):
                self.settle()
            return error
        finally:
            self.look()

    def settle(self) -> None:
        """Wait until Redis has done all that it was sent, also calls that timed out."""
        if not self.is_stopped:
            wait_until(self.proxy.is_idle, 30)
            self.admin("PING")

    def check_error(self, session_id: str, error: GruServeError) -> None:
        known = self.sessions[session_id]
        if isinstance(error, SessionBusy):
            self.ensure(known.may_be_leased or bool(self.leases.get(session_id)), "nobody has leased it")
        elif isinstance(error, SessionLost):
            self.ensure(known.may_be_lost, f"{session_id}: {known} is not lost")
        elif isinstance(error, SessionNotFound):
            self.miss(session_id)
        elif isinstance(error, Overloaded):
            self.ensure(self.is_full, "the server is not full")
        elif isinstance(error, StoreUnavailable | OutcomeUnknown):
            known.may_be_leased = True
        else:
            self.ensure(isinstance(error, RevisionConflict | SessionExists), repr(error))

    # What callers do

    @rule(work=CALLS_OF_WORK)
    def work(self, work: list[tuple[str, str, int]]) -> None:
        for name, session_id, number in work:
            known = self.sessions[session_id]
            self.note(name)
            is_there = known.text is not None or known.may_be_there or known.may_be_lost
            getattr(self, name if is_there else "create")(session_id, number)

    @rule(work=CALLS_OF_WORK)
    def more_work(self, work: list[tuple[str, str, int]]) -> None:
        """Do the same. So work is done more often than anything else happens."""
        self.work(work)

    def create(self, session_id: str, number: int) -> None:
        if number in self.paused:
            return
        known, token = self.sessions[session_id], self.new_token()
        text = Text(np.zeros((1, 4), np.float32), 0, (), token)
        new = Session(session_id, "", "tiny@1", "ab", 7, 1e6, 0, 0, text)
        answer = self.call(session_id, number, lambda store, _: store.create(new))
        if isinstance(answer, Session):
            was_free = known.text is None or known.may_be_deleted or known.may_be_lost
            self.ensure(was_free, f"{session_id}: {known.text} was seen, and could be created again")
            may_be_lost = known.may_be_lost
            self.sessions[session_id] = Known(token, may_be_lost=False, may_be_leased=known.may_be_leased)
            if may_be_lost:  # a replica that was stopped may still have the one before, and says that it is lost
                self.sessions[session_id].may_be_lost = bool(self.paused)
            self.sessions[session_id].seen[number] = token
            self.leases.pop(session_id, None)
        elif isinstance(answer, OutcomeUnknown):
            known.may_be_there = True
            known.maybe.add(token)
            if known.may_be_lost:  # it may have taken the place of the lost one, of which replicas saw other texts
                known.seen.clear()
        elif isinstance(answer, SessionExists):
            is_there = known.text is not None or known.may_be_there or known.may_be_lost
            self.ensure(is_there, "there was none")

    def load(self, session_id: str, number: int) -> None:
        if number not in self.paused:
            answer = self.call(session_id, number, lambda store, key: store.load(key))
            if isinstance(answer, Session):
                self.see(session_id, number, text_of(answer))

    def update(self, session_id: str, number: int) -> None:
        if number not in self.paused:
            token = self.new_token()
            answer = self.call(session_id, number, lambda store, key: store.update(key, self.appending(token)))
            self.note_change(session_id, number, token, answer)

    def appending(self, token: str) -> Callable[[Session], tuple[Session, str]]:
        def change(one: Session) -> tuple[Session, str]:
            text = text_of(one) + token
            return replace(one, text=Text(one.hidden, 0, (), text)), text

        return change

    def note_change(self, session_id: str, number: int, token: str, answer: Any) -> None:
        """Compare what a change gave. After any error but an unknown outcome nothing was done, and never will be."""
        known = self.sessions[session_id]
        if isinstance(answer, OutcomeUnknown):
            known.maybe.add(token)
        elif isinstance(answer, str):
            known.maybe.add(token)
            self.see(session_id, number, answer)

    def delete(self, session_id: str, number: int) -> None:
        if number in self.paused:
            return
        known = self.sessions[session_id]
        answer = self.call(session_id, number, lambda store, key: store.delete(key))
        if answer is None:
            self.leases.pop(session_id, None)
            self.sessions[session_id] = Known(may_be_lost=known.may_be_lost and bool(self.paused))
            if known.text is not None:
                self.sessions[session_id].deleted_by = number
        elif isinstance(answer, StoreUnavailable):
            known.may_be_deleted = True

    def lease(self, session_id: str, number: int) -> None:
        if number in self.paused:
            return
        token = self.new_token()

        def begin(store: RedisStore, key: SessionKey) -> Lease | None:
            return store.begin(key, self.appending(token))[0]

        answer = self.call(session_id, number, begin)
        if isinstance(answer, StoreUnavailable):  # `begin` says the same whether nothing was done or nobody knows
            self.sessions[session_id].maybe.add(token)
        elif not isinstance(answer, GruServeError):
            self.leases.setdefault(session_id, []).append((number, answer))
            self.note_change(session_id, number, token, text_of(answer.session))

    def save(self, session_id: str, number: int, release: bool = False) -> None:
        for number, lease in self.leases.get(session_id, [])[-1:]:
            if number in self.paused:
                return
            token = self.new_token()
            changed, text = self.appending(token)(lease.session)
            saving = partial(lease.save, changed, release=release)
            answer = self.call(session_id, number, lambda *_, saving=saving, text=text: saving() or text)
            self.note_change(session_id, number, token, answer)
            known = self.sessions[session_id]
            if isinstance(answer, StoreUnavailable | OutcomeUnknown) or lease_of(lease).unanswered is not None:
                known.maybe.add(token)  # the lease's next save does it if it wasn't done
            if release or isinstance(answer, RevisionConflict):
                known.may_be_leased |= isinstance(answer, GruServeError)
                lease.release()  # as every caller does at its end
                self.leases[session_id].remove((number, lease))

    def end(self, session_id: str, number: int) -> None:
        self.save(session_id, number, release=True)

    def release(self, session_id: str, number: int) -> None:
        for number, lease in self.leases.get(session_id, [])[-1:]:
            if number not in self.paused:
                self.call(session_id, number, lambda *_, lease=lease: lease.release())
                self.leases[session_id].remove((number, lease))
                self.sessions[session_id].may_be_leased = True  # if the server was not there

    def page(self, session_id: str, number: int) -> None:
        if number in self.paused:
            return
        try:
            found = {one.id for one in self.stores[number].page("", "", 10)}
        except (StoreUnavailable, Overloaded):
            return
        for listed_id, known in self.sessions.items():
            if known.may_be_lost or known.may_be_deleted or known.may_be_there or self.was_full:
                continue
            self.ensure((listed_id in found) == (known.text is not None), f"{listed_id}: {known}, listed: {found}")

    def pass_time(self) -> None:
        """Let all leases end. Those that replicas hold may be renewed later, unless others have changed the session."""
        self.clock.now += 2 * LEASE_S
        for known in self.sessions.values():
            known.may_be_leased = False

    # What happens to replicas

    @rule(number=REPLICAS)
    def pause(self, number: int) -> None:
        if len(self.paused) < 2:
            self.note("pause", number)
            self.paused.add(number)

    @rule(number=REPLICAS, calls_first=st.booleans(), session_id=IDS)
    def wake(self, number: int, calls_first: bool = False, session_id: str = "a") -> None:
        if number in self.paused:
            self.note("wake", number, calls_first)
            self.paused.discard(number)
            if calls_first:  # before its thread has looked
                self.load(session_id, number)
            self.heal()

    @precondition(lambda _: NUM_RUNS > 20)  # it takes long
    @rule(number=REPLICAS, before=CALLS_OF_WORK, after=CALLS_OF_WORK, calls_first=st.booleans(), loses=st.booleans())
    def miss_a_recovery(
        self,
        number: int,
        before: list[tuple[str, str, int]],
        after: list[tuple[str, str, int]],
        calls_first: bool,
        loses: bool,
    ) -> None:
        """Stop the replica that saved last, before Redis loses that, and let others work until it continues."""
        if not self.paused:
            self.mark()
            self.work([(name, session_id, number) for name, session_id, _ in before])
            self.pause(number)
            self.restart(loses, 1)
            self.work(after)
            self.wake(number, calls_first, before[0][1])
            self.load(before[0][1], number)

    def look(self) -> None:
        """Let each replica that isn't paused do what its thread does, once."""
        for number, store in enumerate(self.stores):
            if number not in self.paused and not self.is_stopped:
                with suppress(StoreUnavailable):
                    if store._server.ping():
                        store._renewer._restore()
                    store._renewer._last_contact = time.monotonic()
                    store._renewer._renew()

    def heal(self) -> None:
        """Let replicas look until they serve calls."""

        def all_serve() -> bool:
            self.look()
            with suppress(StoreUnavailable):
                for number, store in enumerate(self.stores):
                    if number not in self.paused:
                        store.check()
                return True
            return False

        if not self.is_demoted:
            wait_until(all_serve, 30)

    # What happens to Redis

    @rule(loses=st.booleans(), num_times=st.integers(1, 2))
    def restart(self, loses: bool, num_times: int) -> None:
        self.note("restart", loses, num_times)
        for _ in range(num_times):
            self.is_up = False
            self.server.kill()
            if loses:
                self.server.lose_what_was_written_since(self.on_disk)
            self.server.start()
            self.is_up = True
            self.look()
        if self.is_full:
            self.fill()
        if loses:
            for session_id in self.sessions:
                self.lose(session_id)
        else:
            self.mark()
        self.heal()

    def lose(self, session_id: str) -> None:
        """Note what may be lost: what only paused replicas have. The last replica knows saves, but not their texts."""
        known, before = self.sessions[session_id], self.marked[session_id]
        if session_id not in self.changed:
            return
        live = [number for number in range(len(CACHES)) if number not in self.paused]
        keepers = [number for number in live if CACHES[number] and known.seen.get(number) == known.text]
        is_kept = known.deleted_by in live if known.text is None else bool(keepers)
        if known.may_be_lost:  # a second loss also loses what the session's epochs were: docs/operations.md
            known.seen.clear()
        if not is_kept:
            known.may_be_lost = True
            known.may_be_there = known.may_be_deleted = True
            kept = [known.seen[number] for number in live if CACHES[number] and number in known.seen]
            kept += [before.text] if before.text is not None else []
            text = known.text or ""
            is_one_history = known.text is not None and all(text.startswith(one) for one in kept)
            best = max(kept, key=len, default="") if is_one_history else ""
            known.maybe |= {*tokens(text[len(best) :])} | {*tokens(before.text or "")} | before.maybe
            for one in known.seen.values():
                known.maybe |= {*tokens(one)}
            known.text = best or None

    @rule(work=CALLS_OF_WORK)
    def demote(self, work: list[tuple[str, str, int]]) -> None:
        """Make the server a replica for some calls."""
        self.note("demote")
        self.admin("REPLICAOF", "127.0.0.1", "1")  # where no server listens
        self.is_demoted = True
        self.work(work)
        self.is_demoted = False
        self.admin("REPLICAOF", "NO", "ONE")
        self.heal()

    def fill(self) -> None:
        self.is_full = self.was_full = True
        self.admin("CONFIG", "SET", "maxmemory", "1")

    def empty(self) -> None:
        self.is_full = False
        self.admin("CONFIG", "SET", "maxmemory", "0")

    def close_connections(self) -> None:
        self.admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    @rule(operation=st.sampled_from(CALLS), twice=st.booleans())
    def lose_answer(self, operation: str, twice: bool) -> None:
        self.note("lose answer", operation, twice)
        again = (lambda: self.proxy.lose_answer(operation)) if twice else (lambda: None)
        self.proxy.lose_answer(operation, again)

    @rule(call=CALL_OF_WORK)
    def stop(self, call: tuple[str, str, int]) -> None:
        """Stop Redis during one call. What it has received it does when it continues."""
        name, session_id, number = call
        self.note("stop", name)
        self.server.send(signal.SIGSTOP)
        self.is_stopped = True
        try:
            getattr(self, name)(session_id, number)
        finally:
            self.server.send(signal.SIGCONT)
            self.is_stopped = False
        self.settle()
        self.heal()

    def admin(self, *command: str) -> None:
        with redis.Redis.from_url(self.server.url, retry=Retry(NoBackoff(), 3)) as client:
            client.execute_command(*command)


def lease_of(lease: Lease) -> Any:
    return lease


@pytest.fixture
def long_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas remember what they wrote for as long as a run of the machine takes."""
    monkeypatch.setattr(lease_renewer, "_AT_RISK_S", 1000.0)


@pytest.mark.usefixtures("long_risk")
def test_replicas__lose_nothing_that_their_callers_are_not_told() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    StoreMachine.first_failure = None
    try:
        run_state_machine_as_test(
            StoreMachine,
            settings=settings(
                max_examples=NUM_RUNS, stateful_step_count=25, deadline=None, suppress_health_check=checks
            ),
        )
    except Flaky as flaky:  # a failure that depends on time is one too
        raise (StoreMachine.first_failure or flaky) from flaky

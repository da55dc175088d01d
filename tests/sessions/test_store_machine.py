"""Random operations of three replicas on a real Redis that restarts, loses writes, fills up, stops and is demoted.

Each change appends a token of its own to a session's text, a number that is greater than all before. So a text tells
which changes it has, and in which order they were made.

After each call the machine looks into Redis itself. So of a session it knows what Redis has (`state`), and after a call
whose outcome its caller does not know, which of the possible outcomes it was. It checks that

- an answer is what Redis has, and a change adds exactly its token to that;
- a call that says that nothing was done has changed nothing;
- after a loss Redis has the latest of what its disk has and of what the replicas that are there can restore (`copies`);
- a replica does not go back to before what it answered last (`told`), unless it says that the session is lost. It says
  that of no other session.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from service.sessions.record import Record, decode
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
CHANGES = ("update", "update", "load", "create_anew", "delete")
WORK = (*CHANGES, "load", "create", "lease", "save", "end", "release", "page")
Call = tuple[str, str, int]  # which of WORK, session, replica
CALL: st.SearchStrategy[Call] = st.tuples(st.sampled_from(WORK), IDS, REPLICAS)
CALLS = st.lists(CALL, min_size=2, max_size=6)
ONE_CALL = CALL.filter(lambda call: call[0] != "create_anew")  # that is two, and replicas look after the first
CHANGE = st.sampled_from(CHANGES)
OPERATIONS = ("create", "lease", "claim", "save", "load", "release", "delete")

Tokens = tuple[int, ...]


def text_of(tokens: Tokens) -> str:
    return "".join(f".{token}" for token in tokens)


def tokens_of(one: Session) -> Tokens:
    return tuple(map(int, one.text.slice(0, one.position).split(".")[1:]))


def with_tokens(one: Session, tokens: Tokens) -> Session:
    return replace(one, text=Text(one.hidden, 0, (), text_of(tokens)))


@dataclass(frozen=True)
class State:
    """What Redis has of a session at one save."""

    kind: Literal["none", "alive", "deleted", "lost"] = "none"
    tokens: Tokens = ()  # of the text; of a deletion, also its own; of a lost save, those of the text that it had

    @property
    def age(self) -> tuple[int, bool]:
        """Orders the states of a session: later ones are greater. A lost save is restored by a replica that has it."""
        return max(self.tokens, default=0), self.kind != "lost"

    def then(self, token: int, kind: Literal["alive", "deleted"] = "alive") -> State:
        """Return the state after a change."""
        return State(kind, (*self.tokens, token))

    def without_text(self) -> State:
        """Return what a replica that knows this save, but has no copy of it, can make Redis store again."""
        return replace(self, kind="lost") if self.kind == "alive" else self

    def has_all_of(self, tokens: Tokens) -> bool:
        """Whether callers that have seen this text miss nothing: it is there, or the session was created anew since."""
        return self.tokens[: len(tokens)] == tokens or self.tokens[:1] > tokens[:1]


@dataclass
class Leased:
    """A lease as its holder knows it, which continues with its text after a save whose outcome is unknown."""

    number: int  # of the replica
    lease: Lease
    tokens: Tokens
    is_unanswered: bool = False


@dataclass
class Known:
    """A session as the simple model knows it."""

    state: State = State()  # what Redis has
    on_disk: State = State()  # what Redis has after it lost what was written since the mark
    # By replica: what it would store again if Redis lost it. One of these, because a call that failed may have read.
    copies: list[set[State]] = field(default_factory=lambda: [{State()} for _ in CACHES])
    told: list[Tokens] = field(default_factory=lambda: [() for _ in CACHES])  # by replica: what its callers saw last
    leases: list[Leased] = field(default_factory=list)
    # By a call whose outcome is unknown, or because Redis has lost that a lease was given back.
    may_be_leased: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Replicas look at the server when the machine lets them: those that are paused never do.

    Redis and the replicas' time-outs are real. So any call may time out, and the same operations may give other answers
    when Hypothesis repeats them. The machine allows that, and waits after each call until Redis has done it.
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
        self.redis = self.ending.enter_context(redis.Redis.from_url(self.server.url, retry=Retry(NoBackoff(), 3)))
        self.proxy: LossyProxy = self.ending.enter_context(lossy_proxy(self.server.url))
        self.clock = Clock()
        self.stores = [self.open_store(cache_bytes) for cache_bytes in CACHES]
        self.paused: set[int] = set()
        self.sessions = {session_id: Known() for session_id in "ab"}
        self.num_tokens, self.saves = 0, dict[bytes | None, Tokens]()  # what each nonce's save had
        self.is_full = self.was_full = self.is_stopped = False
        self.mark()
        self.heal()
        self.is_up = True

    def open_store(self, cache_bytes: int) -> RedisStore:
        server = RedisServer(self.proxy.url, TIMEOUT_S, WINDOW_S)
        store = RedisStore(server, 4096, cache_bytes, lease_s=LEASE_S, clock=self.clock)
        return self.ending.enter_context(closing(store))

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
        self.let_all_work()
        for session_id in self.sessions:
            for number in range(len(CACHES)):
                self.do("load", session_id, number)

    # The simple model

    def note(self, *facts: Any) -> None:
        """Add a line to what an assertion that fails reports: failures may depend on time, and not come again."""
        self.trace.append(" ".join(map(str, facts)))

    def ensure(self, condition: bool, message: str) -> None:
        assert condition, "\n".join([*self.trace, message])

    def new_token(self) -> int:
        self.num_tokens += 1
        return self.num_tokens

    def adopt(self, session_id: str, possible: Iterable[State]) -> None:
        """Find out which of these states Redis has. A tombstone has no text, but the nonce of a save that had one."""
        sign, nonce, data, settled = self.admin("HMGET", f"gru-serve:/{session_id}", "s", "n", "d", "p")
        kind = sign.decode() if sign else "none" if data is None else "alive"
        tokens = self.saves.get(nonce)  # None after a deletion that nobody has seen yet
        if kind == "alive":
            record = Record(data, settled or b"")
            tokens = tokens_of(decode(record, lambda _: [], SessionKey("", session_id), 0, 0))
        fitting = [state for state in possible if state.kind == kind and tokens in (None, state.tokens)]
        self.ensure(bool(fitting), f"{session_id}: Redis has {kind} {tokens}, and may have {possible}")
        state = self.sessions[session_id].state = max(fitting, key=lambda state: state.age)
        self.saves[nonce] = state.tokens

    def see(self, session_id: str, number: int, state: State) -> None:
        """Compare what a replica has answered, or has saved, with what Redis has and with what it answered before."""
        known = self.sessions[session_id]
        self.adopt(session_id, [state])
        told = known.told[number]
        self.ensure(state.has_all_of(told), f"replica {number} goes back from {told} to {state} without saying so")
        known.copies[number], known.told[number] = {state}, state.tokens

    def call(
        self,
        session_id: str,
        number: int,
        act: Callable[[RedisStore, SessionKey], Any],
        after: Iterable[State] = (),
        unknown: Any = OutcomeUnknown,
    ) -> Any:
        """Let a replica call. Returns its answer, or an error that may be.

        after: What Redis may have afterwards, beside what it has now, if the call fails with `unknown`.
        """
        known = self.sessions[session_id]
        before = known.state
        try:
            answer = act(self.stores[number], SessionKey("", session_id))
        except GruServeError as error:
            answer = error
        self.resume()
        self.settle()
        is_error = isinstance(answer, GruServeError)
        self.note(number, session_id, type(answer).__name__ if is_error else answer)
        if is_error:
            self.adopt(session_id, [before, *(after if isinstance(answer, unknown) else ())])
            if not isinstance(answer, SessionLost | SessionNotFound):  # else it may have read a text
                known.copies[number] |= {state for state in (before, known.state) if state.kind == "alive"}
            self.check_error(session_id, number, answer)
        self.look()
        return answer

    def settle(self) -> None:
        """Wait until Redis has done all that it was sent, also calls that timed out."""
        wait_until(self.proxy.is_idle)
        for _ in range(2):  # after the first one it knows all connections
            self.admin("PING")

    def check_error(self, session_id: str, number: int, error: GruServeError) -> None:
        known = self.sessions[session_id]
        state = known.state
        has_parted = any(not state.has_all_of(copy.tokens) for copy in known.copies[number])
        is_right = {
            SessionNotFound: state.kind in ("none", "deleted"),
            SessionExists: state.kind == "alive",
            SessionLost: state.kind == "lost" or (state.kind == "alive" and has_parted),
            SessionBusy: known.may_be_leased or bool(known.leases),
            Overloaded: self.is_full,
            RevisionConflict: True,
            StoreUnavailable: True,
            OutcomeUnknown: True,
        }
        self.ensure(any(is_right[kind] for kind in is_right if isinstance(error, kind)), f"{error!r}, but {known}")
        if isinstance(error, SessionNotFound) and state.kind == "deleted":
            known.copies[number], known.told[number] = {state}, state.tokens
        known.may_be_leased |= isinstance(error, StoreUnavailable | OutcomeUnknown)

    # What callers do

    @rule(calls=CALLS)
    def work(self, calls: list[Call]) -> None:
        for call in calls:
            self.do(*call)

    @rule(calls=CALLS)
    def more_work(self, calls: list[Call]) -> None:
        """Do the same. So work is done more often than anything else happens."""
        self.work(calls)

    def do(self, name: str, session_id: str, number: int) -> None:
        known = self.sessions[session_id]
        if known.state.kind == "none" or (known.state.kind == "deleted" and name not in ("load", "delete", "page")):
            name = "create"
        if name in ("save", "end", "release"):
            for leased in known.leases[-1:]:
                if leased.number not in self.paused:
                    self.note(name)
                    getattr(self, name)(session_id, leased)
        elif number not in self.paused:
            self.note(name)
            getattr(self, name)(session_id, number)

    def create(self, session_id: str, number: int) -> None:
        known = self.sessions[session_id]
        before, after = known.state, State().then(self.new_token())
        new = Session(session_id, "", "tiny@1", "ab", 7, 1e6, 0, 0, Text(np.zeros((1, 4), np.float32), 0, (), ""))
        new = with_tokens(new, after.tokens)
        outcomes = [after] if before.kind != "alive" else []
        answer = self.call(session_id, number, lambda store, _: tokens_of(store.create(new)), outcomes)
        if not isinstance(answer, GruServeError):
            self.ensure(before.kind != "alive", f"{before} was there, and could be created again")
            self.see(session_id, number, after)
            known.leases.clear()

    def create_anew(self, session_id: str, number: int) -> None:
        self.delete(session_id, number)
        self.create(session_id, number)

    def load(self, session_id: str, number: int) -> None:
        before = self.sessions[session_id].state
        answer = self.call(session_id, number, lambda store, key: tokens_of(store.load(key)))
        if not isinstance(answer, GruServeError):
            self.ensure(answer == before.tokens, f"Redis had {before}")
            self.see(session_id, number, before)

    def appending(self, token: int) -> Callable[[Session], tuple[Session, Tokens]]:
        def change(one: Session) -> tuple[Session, Tokens]:
            tokens = (*tokens_of(one), token)
            return with_tokens(one, tokens), tokens

        return change

    def update(self, session_id: str, number: int) -> None:
        token, before = self.new_token(), self.sessions[session_id].state
        after = [before.then(token)] if before.kind == "alive" else []
        change = self.appending(token)
        answer = self.call(session_id, number, lambda store, key: store.update(key, change), after)
        if not isinstance(answer, GruServeError):
            self.ensure([answer] == [state.tokens for state in after], f"Redis had {before}")
            self.see(session_id, number, *after)

    def delete(self, session_id: str, number: int) -> None:
        token, known = self.new_token(), self.sessions[session_id]
        after = [known.state.then(token, "deleted")] if known.state.kind == "alive" else []
        before = known.state
        answer = self.call(session_id, number, lambda store, key: store.delete(key), after, StoreUnavailable)
        if answer is None:
            self.ensure(before.kind in ("alive", "deleted"), f"Redis had {before}")
            self.see(session_id, number, *(after or [before]))
            known.leases.clear()

    def lease(self, session_id: str, number: int) -> None:
        token, known = self.new_token(), self.sessions[session_id]
        after = [known.state.then(token)] if known.state.kind == "alive" else []
        change = self.appending(token)
        # StoreUnavailable: `begin` does not say whether nothing was done or nobody knows.
        answer = self.call(session_id, number, lambda store, key: store.begin(key, change), after, StoreUnavailable)
        if not isinstance(answer, GruServeError):
            lease, tokens = answer
            self.ensure([tokens] == [state.tokens for state in after], "it was not like this")
            self.see(session_id, number, *after)
            known.leases.append(Leased(number, lease, tokens))

    def save(self, session_id: str, leased: Leased, release: bool = False) -> None:
        known = self.sessions[session_id]
        before, tokens = known.state, (*leased.tokens, self.new_token())
        # First it does the save before, if that has no answer and was not done.
        is_followed = before.kind == "alive" and tokens[: len(before.tokens)] == before.tokens
        outcomes = [State("alive", tokens[:end]) for end in range(len(before.tokens), len(tokens) + 1)]
        saving = partial(leased.lease.save, with_tokens(leased.lease.session, tokens), release=release)
        unknown = OutcomeUnknown | StoreUnavailable if leased.is_unanswered else OutcomeUnknown
        answer = self.call(session_id, leased.number, lambda *_: saving(), outcomes if is_followed else (), unknown)
        if answer is None:
            self.ensure(is_followed, f"{tokens} was saved over {before}")
            self.see(session_id, leased.number, State("alive", tokens))
        if answer is None or isinstance(answer, OutcomeUnknown):
            leased.tokens, leased.is_unanswered = tokens, answer is not None
        if release or isinstance(answer, RevisionConflict):
            known.may_be_leased |= isinstance(answer, GruServeError)
            leased.lease.release()  # as every caller does at its end
            known.leases.remove(leased)

    def end(self, session_id: str, leased: Leased) -> None:
        self.save(session_id, leased, release=True)

    def release(self, session_id: str, leased: Leased) -> None:
        self.call(session_id, leased.number, lambda *_: leased.lease.release())
        self.sessions[session_id].leases.remove(leased)
        self.sessions[session_id].may_be_leased = True  # if the server was not there

    def page(self, session_id: str, number: int) -> None:
        found = self.call(session_id, number, lambda store, _: {one.id for one in store.page("", "", 10)})
        if not isinstance(found, GruServeError) and not self.was_full:  # a full server may not list what it has
            there = {one for one, known in self.sessions.items() if known.state.kind == "alive"}
            self.ensure(found == there, f"{there} are there")

    # What happens to replicas

    def let_all_work(self) -> None:
        """End what keeps calls from being done: a full server, pauses, and leases."""
        self.empty()
        for number in [*self.paused]:
            self.wake(number)
        self.pass_time()

    @rule(event=st.sampled_from(EVENTS))
    def happen(self, event: str) -> None:
        self.note(event)
        getattr(self, event)()

    def pass_time(self) -> None:
        """Let all leases end. Those that replicas hold may be renewed later, unless others have changed the session."""
        self.clock.now += 2 * LEASE_S
        for known in self.sessions.values():
            known.may_be_leased = False

    @rule(number=REPLICAS)
    def pause(self, number: int) -> None:
        if len(self.paused) < 2:
            self.note("pause", number)
            self.paused.add(number)

    @rule(number=REPLICAS, first=st.none() | ONE_CALL)
    def wake(self, number: int, first: Call | None = None) -> None:
        """Let a replica continue. first: Before its thread looks, it is called."""
        if number in self.paused:
            self.note("wake", number)
            self.paused.discard(number)
            if first is not None:
                self.do(first[0], first[1], number)
            self.heal()

    @precondition(lambda _: NUM_RUNS > 20)  # it takes long
    @rule(
        number=REPLICAS,
        session_id=IDS,
        before=st.lists(CHANGE, min_size=1, max_size=3),
        after=st.lists(st.tuples(CHANGE, REPLICAS), max_size=3),
        first=st.none() | ONE_CALL,
    )
    def miss_a_recovery(
        self, number: int, session_id: str, before: list[str], after: list[tuple[str, int]], first: Call | None
    ) -> None:
        """Stop the replica that saved last, let Redis lose that, and let others work until the replica continues."""
        self.let_all_work()
        self.do("update", session_id, number)  # or creates it
        self.mark()
        for name in before:
            self.do(name, session_id, number)
        self.pause(number)
        self.restart(True, 1)
        for name, other in after:
            self.do(name, session_id, other)
        self.wake(number, first)
        self.do("load", session_id, number)

    def look(self) -> None:
        """Let each replica that isn't paused do what its thread does, once."""
        for number, store in enumerate(self.stores):
            if number not in self.paused:
                with suppress(StoreUnavailable):
                    if store._server.ping():
                        store._renewer._restore()
                    store._renewer._last_contact = time.monotonic()
                    store._renewer._renew()

    def heal(self) -> None:
        """Let replicas look until they serve calls. Then Redis has the latest of what it had and of what they have."""

        def all_serve() -> bool:
            self.look()
            with suppress(StoreUnavailable):
                for number, store in enumerate(self.stores):
                    if number not in self.paused:
                        store.check()
                return True
            return False

        wait_until(all_serve)
        self.settle()
        for session_id, known in self.sessions.items():
            copies = [{known.state}]
            for number, states in enumerate(known.copies):
                if number not in self.paused:
                    copies.append(states if CACHES[number] else {state.without_text() for state in states})
            least = max(min(state.age for state in states) for states in copies)
            self.adopt(session_id, {state for states in copies for state in states if state.age >= least})

    # What happens to Redis

    def mark(self) -> None:
        """Note what is on Redis' disk now: the next restart may lose what is written after it."""
        self.files = self.server.on_disk()
        for known in self.sessions.values():
            known.on_disk = known.state

    @rule(loses=st.booleans(), num_times=st.integers(1, 2))
    def restart(self, loses: bool, num_times: int) -> None:
        self.note("restart", loses, num_times)
        for _ in range(num_times):
            self.is_up = False
            self.server.kill()
            if loses:
                self.server.lose_what_was_written_since(self.files)
            self.server.start()
            self.is_up = True
            self.look()
        if self.is_full:
            self.fill()
        for known in self.sessions.values():
            if loses:
                self.lose(known)
        self.heal()
        if not loses:
            self.mark()

    def lose(self, known: Known) -> None:
        """Note that Redis has what it had at the mark.

        It also forgets which histories have parted before. So replicas whose callers had to be told that need not tell
        them any more: docs/operations.md.
        """
        known.told = [told if known.state.has_all_of(told) else () for told in known.told]
        known.state, known.may_be_leased = known.on_disk, True

    @rule(calls=CALLS)
    def demote(self, calls: list[Call]) -> None:
        """Make the server a replica for some calls."""
        self.note("demote")
        self.admin("REPLICAOF", "127.0.0.1", "1")  # where no server listens
        self.work(calls)
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

    @rule(operation=st.sampled_from(OPERATIONS), twice=st.booleans())
    def lose_answer(self, operation: str, twice: bool) -> None:
        self.note("lose answer", operation, twice)
        again = (lambda: self.proxy.lose_answer(operation)) if twice else (lambda: None)
        self.proxy.lose_answer(operation, again)

    @rule(call=CALL)
    def stop(self, call: Call) -> None:
        """Stop Redis during one call. What it has received it does when it continues."""
        self.note("stop")
        self.server.send(signal.SIGSTOP)
        self.is_stopped = True
        self.do(*call)
        self.resume()
        self.heal()

    def resume(self) -> None:
        if self.is_stopped:
            self.server.send(signal.SIGCONT)
            self.is_stopped = False

    def admin(self, *command: str) -> Any:
        return self.redis.execute_command(*command)


@pytest.fixture
def long_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas remember what they wrote for as long as a run of the machine takes."""
    monkeypatch.setattr(lease_renewer, "_AT_RISK_S", 1000.0)


@pytest.mark.usefixtures("long_risk")
def test_replicas__lose_nothing_that_their_callers_are_not_told() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = settings(max_examples=NUM_RUNS, stateful_step_count=25, suppress_health_check=checks)
    StoreMachine.first_failure = None
    try:
        run_state_machine_as_test(StoreMachine, settings=options)
    except Flaky as flaky:  # a failure that depends on time is one too
        raise (StoreMachine.first_failure or flaky) from flaky

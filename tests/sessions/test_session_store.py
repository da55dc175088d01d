"""The contract of session stores: one suite for all implementations. Add a new one to STORES."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.arrays import Float32
from service.engine.sampling_settings import PLAIN
from service.errors import (
    GruServeError,
    InvalidValue,
    Overloaded,
    PositionConflict,
    RevisionConflict,
    SessionBusy,
    SessionExists,
    SessionGone,
    SessionNotFound,
)
from service.sessions.memory_store import MemoryStore
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Run, Session, SessionKey
from service.sessions.session_store import Lease, Operation, SessionStore
from service.sessions.text import Retention, Segment, Text
from service.shares import work_for
from tests.harness.clock import Clock
from tests.harness.redis_stores import TIMEOUT_S

SHAPE = (1, 16)
A, B = SessionKey("", "a"), SessionKey("", "b")


class Exchanges:
    """Lists the exchanges with a Redis server."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def observe(self, operation: Operation, duration_s: float) -> None:
        self.operations.append(operation)

    def count_failure(self, operation: Operation) -> None:
        raise AssertionError(f"{operation} failed")


def redis_store(
    request: pytest.FixtureRequest,
    clock: Clock,
    cache_bytes: int = 2**20,
    prefix: str | None = None,
    exchanges: Exchanges | None = None,
    url: str = "redis_url",
) -> RedisStore:
    """Return a store. Its leases are very long: the tests' clock jumps, and none is renewed.

    prefix: None for one of its own, so that it has its own sessions. url: The fixture of the address.
    """
    server = RedisServer(request.getfixturevalue(url), TIMEOUT_S, 0, exchanges)
    prefix = prefix or f"{secrets.token_hex(8)}*["
    return RedisStore(server, 4096, cache_bytes, prefix=prefix, lease_s=10**7, clock=clock)


STORES: dict[str, Callable[[pytest.FixtureRequest, Clock], SessionStore]] = {
    "memory": lambda _, clock: MemoryStore(100, 2**30, clock, clock),
    "redis": redis_store,
    "redis without its cache": lambda request, clock: redis_store(request, clock, cache_bytes=0),
    "redis cluster": lambda request, clock: redis_store(request, clock, url="redis_cluster_url"),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, clock: Clock) -> Iterator[SessionStore]:
    store = STORES[request.param](request, clock)
    yield store
    store.close()


@pytest.fixture
def exchanges() -> Exchanges:
    return Exchanges()


@pytest.fixture
def replicas(request: pytest.FixtureRequest, clock: Clock, exchanges: Exchanges) -> Iterator[list[RedisStore]]:
    """Two stores with the same sessions. The exchanges of the first one are listed."""
    prefix = f"{secrets.token_hex(8)}:"
    with (
        closing(redis_store(request, clock, prefix=prefix, exchanges=exchanges)) as one,
        closing(redis_store(request, clock, prefix=prefix)) as other,
    ):
        yield [one, other]


def state(value: float) -> Float32:
    return np.full(SHAPE, value, np.float32)


def text(characters: str = "ROMEO:", hidden: Float32 | None = None) -> Text:
    return Text(state(0.5) if hidden is None else hidden, 0, (), characters)


def session(session_id: str = "a", **changes: Any) -> Session:
    fields: dict[str, Any] = {
        "owner": "", "model": "tiny@1", "identity": "ab", "seed": 7, "ttl_s": 60, "created_at": 0, "expires_at": 0,
        "text": text(),
    }  # fmt: skip
    return Session(session_id, **(fields | changes))


def facts(one: Session) -> list[Any]:
    """Return everything of a session but its checkpoints, comparable."""
    characters = [one.text.start, one.text.slice(one.text.start, one.position)]
    names = ("id", "owner", "model", "identity", "seed", "ttl_s", "created_at", "expires_at", "run", "origin")
    return [*(getattr(one, name) for name in names), one.revision, one.hidden.tobytes(), *characters]


def checkpoints(one: Session) -> set[tuple[int, bytes]]:
    """Return the positions and states of a session's checkpoints."""
    return {(segment.end, segment.hidden.tobytes()) for segment in one.text.segments}


def with_changes(**changes: Any) -> Callable[[Session], tuple[Session, int]]:
    """Return a change that sets these fields; its answer is the seed that the session had."""
    return lambda one: (replace(one, **changes), one.seed)


def unchanged(one: Session) -> tuple[Session, int]:
    """Change nothing. The answer is the session's seed."""
    return one, one.seed


def change(store: SessionStore, key: SessionKey = A, **changes: Any) -> Session:
    store.update(key, with_changes(**changes))
    return store.load(key)


def lease_of(store: SessionStore, key: SessionKey = A) -> Lease:
    """Return a lease; this saves the session once."""
    lease, _ = store.begin(key, with_changes())
    assert lease is not None
    return lease


def use(store: SessionStore, key: SessionKey = A) -> None:
    """Use a session without changing it."""
    store.update(key, unchanged)


def every_use(store: SessionStore) -> list[Callable[[SessionKey], Any]]:
    """Return all calls that need a session which is there."""

    def delete_if_there(key: SessionKey) -> None:
        store.load(key)  # a deleted one may be deleted again
        store.delete(key)

    return [
        store.load,
        lambda key: store.update(key, unchanged),
        lambda key: store.update(key, with_changes(seed=99)),
        lambda key: store.begin(key, with_changes(seed=99)),
        delete_if_there,
    ]


def test_load__returns_what_was_created(store: SessionStore, clock: Clock) -> None:
    run = Run(3, 10, -5, replace(PLAIN, temperature=0.5), ("ab",), "xyz", "stop", 6)
    read = Text(state(0.5), 2, (Segment("ab", 4, state(0.1)),), "cd")
    created = store.create(session(ttl_s=90.5, run=run, origin=b"0123", text=read))
    assert (created.created_at, created.expires_at, created.revision) == (clock.now, clock.now + 90.5, 1)
    loaded = store.load(A)
    assert facts(loaded) == facts(created)
    assert checkpoints(loaded) <= checkpoints(created)


@pytest.mark.parametrize("begin", [0, 500, 70_000])
def test_load__returns_a_long_text_with_checkpoints_from_its_first_character(store: SessionStore, begin: int) -> None:
    """A store may drop checkpoints, but at most so many that 4,096 characters are stepped again."""

    def at(position: int) -> Float32:
        return state(position / 2**20)

    retention, characters = Retention(), "".join(chr(97 + number % 23) for number in range(20_000))
    end = begin + len(characters)
    read = Text.from_state(begin, at(begin)) if begin else Text(at(0))
    hidden = {position: at(position) for position in retention.checkpoint_positions(begin, end)}
    created = store.create(session(text=read.extended(characters, at(end), hidden, retention)))
    loaded = store.load(A)
    assert facts(loaded) == facts(created)
    for position in range(begin, end + 1, 77):
        start, checkpoint = loaded.text.nearest_checkpoint(position)
        assert begin <= start <= position < start + 4096
        if start == 0:
            assert checkpoint is None
        else:
            assert checkpoint is not None
            assert checkpoint.tobytes() == at(start).tobytes()


def test_create__refuses_an_id_in_use(store: SessionStore) -> None:
    store.create(session())
    with pytest.raises(SessionExists):
        store.create(session(seed=8))
    assert store.load(A).seed == 7


def test_owners__do_not_see_one_anothers_sessions(store: SessionStore) -> None:
    store.create(session(owner="one", seed=1))
    store.create(session(owner="two", seed=2))
    store.create(session(owner="", seed=3))
    assert [store.load(SessionKey(owner, "a")).seed for owner in ("one", "two", "")] == [1, 2, 3]
    for call in every_use(store):
        with pytest.raises(SessionNotFound):
            call(SessionKey("three", "a"))
    store.delete(SessionKey("one", "a"))
    assert store.load(SessionKey("two", "a")).seed == 2
    assert [len(store.page(owner, "", 9)) for owner in ("one", "two", "", "three")] == [0, 1, 1, 0]


def test_sessions__are_values(store: SessionStore) -> None:
    """A loaded session doesn't change with the stored one, nor the stored one with the array it was made from."""
    hidden = state(0.25)
    created = store.create(session(text=text(hidden=hidden)))
    loaded = store.load(A)
    hidden[:] = 9
    assert store.load(A).hidden.tobytes() == state(0.25).tobytes()
    changed = state(0.75)
    store.update(A, with_changes(text=text("ROMEO:x", changed)))
    changed[:] = 9
    assert loaded.hidden.tobytes() == state(0.25).tobytes()
    assert created.position == loaded.position == 6
    assert store.load(A).position == 7
    assert store.load(A).hidden.tobytes() == state(0.75).tobytes()


# Changes


def test_update__saves_the_change_and_returns_its_answer(store: SessionStore, clock: Clock) -> None:
    created = store.create(session())
    clock.now += 10
    assert store.update(A, with_changes(seed=8)) == 7
    loaded = store.load(A)
    assert (loaded.seed, loaded.revision, loaded.expires_at) == (8, created.revision + 1, clock.now + 60)
    assert store.update(A, with_changes(seed=9), idempotent=True) == 8
    assert store.load(A).seed == 9


def test_update__saves_a_state_of_another_shape(store: SessionStore) -> None:
    store.create(session())
    changed = change(store, text=text(hidden=np.full((3, 4), 0.2, np.float32)))
    assert (changed.hidden.shape, changed.hidden.tolist()) == ((3, 4), np.full((3, 4), 0.2, np.float32).tolist())


@pytest.mark.parametrize("error", [InvalidValue("too large"), KeyError("a defect")])
def test_update__that_raises_leaves_the_session_as_it_was(store: SessionStore, error: Exception) -> None:
    before = store.create(session())

    def failing(_: Session) -> tuple[Session, None]:
        raise error

    for apply in (store.update, store.begin):
        with pytest.raises(type(error)) as caught:
            apply(A, failing)
        assert caught.value is error
    assert facts(store.load(A)) == facts(before)
    store.delete(A)  # it isn't leased


def test_update__with_nothing_to_save_counts_as_use(store: SessionStore, clock: Clock) -> None:
    before = store.create(session())
    clock.now += 30
    assert store.update(A, unchanged) == 7
    assert facts(store.load(A)) == facts(replace(before, expires_at=clock.now + 60))
    clock.now += 30
    lease, answer = store.begin(A, unchanged)
    assert (lease, answer) == (None, 7)
    assert facts(store.load(A)) == facts(replace(before, expires_at=clock.now + 60))
    store.delete(A)  # it isn't leased


def test_update__refuses_a_session_that_is_leased(store: SessionStore) -> None:
    store.create(session())
    lease = lease_of(store)
    before = store.load(A)
    for call in every_use(store)[1:]:
        with pytest.raises(SessionBusy):
            call(A)
    assert facts(store.load(A)) == facts(before)
    lease.release()
    assert store.update(A, with_changes(seed=8)) == 7


@pytest.mark.parametrize("use", range(5))
def test_session__that_has_expired_is_refused_whatever_its_first_use_is(
    store: SessionStore, clock: Clock, use: int
) -> None:
    store.create(session())
    clock.now += 60
    with pytest.raises(SessionGone):
        every_use(store)[use](A)


def test_update__may_change_another_session_meanwhile(store: SessionStore) -> None:
    """No lock of the whole store is held while a change runs."""
    store.create(session("a"))
    store.create(session("b"))

    def changing_the_other(one: Session) -> tuple[Session, int]:
        seed = store.update(B, with_changes(seed=8))
        store.create(session("c"))
        store.delete(SessionKey("", "c"))
        return replace(one, seed=9), seed

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(store.update, A, changing_the_other).result(60) == 7
    assert [store.load(key).seed for key in (A, B)] == [9, 8]


def test_update__by_many_threads_loses_none(store: SessionStore) -> None:
    """Each update is applied, or its caller gets SessionBusy."""
    store.create(session(seed=0))
    barrier = threading.Barrier(6)

    def count() -> int:
        num_applied = 0
        barrier.wait(60)
        for _ in range(40):
            try:
                store.update(A, lambda one: (replace(one, seed=one.seed + 1), None))
            except SessionBusy:
                continue
            num_applied += 1
        return num_applied

    with ThreadPoolExecutor(6) as pool:
        num_applied = sum(future.result(60) for future in [pool.submit(count) for _ in range(6)])
    assert num_applied > 0
    assert (store.load(A).seed, store.load(A).revision) == (num_applied, 1 + num_applied)


# Leases


def test_begin__saves_and_keeps_the_lease(store: SessionStore) -> None:
    created = store.create(session())
    lease, answer = store.begin(A, with_changes(seed=8))
    assert answer == 7
    assert lease is not None
    assert facts(lease.session) == facts(store.load(A))
    assert (lease.session.seed, lease.session.revision) == (8, created.revision + 1)
    with pytest.raises(SessionBusy):
        store.update(A, with_changes(seed=9))
    lease.save(replace(lease.session, seed=10))
    assert facts(lease.session) == facts(store.load(A))
    assert (lease.session.seed, lease.session.revision) == (10, created.revision + 2)
    lease.release()
    assert store.load(A).seed == 10


def test_save__needs_the_lease_and_the_revision(store: SessionStore) -> None:
    store.create(session())
    lease = lease_of(store)
    first = lease.session
    lease.save(replace(first, seed=8))
    second = store.load(A)
    assert (second.seed, second.revision, lease.session.revision) == (8, first.revision + 1, first.revision + 1)
    for stale in (first, replace(second, id="b"), replace(second, owner="somebody")):
        with pytest.raises(RevisionConflict):
            lease.save(replace(stale, seed=9))
    lease.release()
    with pytest.raises(RevisionConflict):
        lease.save(replace(second, seed=9))
    other = lease_of(store)
    with pytest.raises(RevisionConflict):
        lease.save(replace(other.session, seed=9))
    lease.release()  # already released: does nothing, and leaves the other lease alone
    with pytest.raises(SessionBusy):
        lease_of(store)
    other.release()
    assert store.load(A).seed == 8


def test_save__can_release_in_the_same_exchange(store: SessionStore, clock: Clock) -> None:
    store.create(session())
    lease = lease_of(store)
    clock.now += 10
    lease.save(replace(lease.session, seed=11), release=True)
    assert (store.load(A).seed, store.load(A).expires_at) == (11, clock.now + 60)
    with pytest.raises(RevisionConflict):
        lease.save(replace(lease.session, seed=12))
    lease.release()
    assert store.update(A, with_changes(seed=13)) == 11


def test_save__of_a_deleted_session_is_refused(store: SessionStore) -> None:
    store.create(session())
    lease = lease_of(store)
    lease.release()
    store.delete(A)
    with pytest.raises(RevisionConflict):
        lease.save(replace(lease.session, seed=8))
    store.create(session(seed=9))
    with pytest.raises(RevisionConflict):
        lease.save(replace(lease.session, seed=8))
    lease.release()
    assert store.load(A).seed == 9


def test_lease__is_exclusive(store: SessionStore) -> None:
    store.create(session())
    lease = lease_of(store)
    with pytest.raises(SessionBusy):
        lease_of(store)
    assert store.load(A).seed == 7  # loading needs no lease
    lease.release()
    lease_of(store).release()


def test_lease__goes_to_one_of_many_threads(store: SessionStore) -> None:
    store.create(session())
    got: list[Lease] = []
    barrier = threading.Barrier(8)

    def reach() -> None:
        for _ in range(50):
            barrier.wait(60)
            try:
                lease = lease_of(store)
            except SessionBusy:
                continue
            finally:
                barrier.wait(60)
            got.append(lease)
            lease.release()

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 50
    assert store.load(A).revision == 1 + 50


# The life of a session


def test_session__expires_at_its_time(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    clock.now += 59.9
    store.load(A)
    clock.now += 0.1
    for call in every_use(store):
        with pytest.raises(SessionGone):
            call(A)
    with pytest.raises(SessionNotFound):
        store.load(SessionKey("somebody", "a"))
    assert store.page("", "", 9) == []
    store.create(session(seed=9))  # the id is free again
    assert store.load(A).seed == 9


def test_session__lives_longer_when_used_but_not_when_read(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    clock.now += 59
    use(store)
    assert store.load(A).expires_at == clock.now + 60
    clock.now += 59
    store.load(A)
    store.page("", "", 9)
    clock.now += 1
    with pytest.raises(SessionGone):
        store.load(A)


def test_session__never_expires_while_leased(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    lease = lease_of(store)
    for _ in range(100):
        clock.now += 1000
        store.load(A)
    lease.save(replace(lease.session, seed=8))
    clock.now += 1000
    lease.release()
    clock.now += 59.9
    assert store.load(A).seed == 8
    clock.now += 0.1
    with pytest.raises(SessionGone):
        store.load(A)


def test_delete__makes_the_session_unknown(store: SessionStore) -> None:
    store.create(session())
    store.delete(A)
    for call in every_use(store):
        with pytest.raises(SessionNotFound):
            call(A)
    assert store.page("", "", 9) == []
    store.create(session(seed=9))  # the id is free again
    assert (store.load(A).seed, store.load(A).revision) == (9, 1)


def test_delete__again_changes_nothing(store: SessionStore, clock: Clock) -> None:
    """The answer to the first one may have been lost. Of a session that never was, or has expired, there was none."""
    store.create(session())
    store.delete(A)
    store.delete(A)
    with pytest.raises(SessionNotFound):
        store.delete(B)
    store.create(session(seed=9))
    assert store.load(A).seed == 9
    clock.now += 60
    with pytest.raises(SessionGone):
        store.delete(A)


def test_delete__of_a_leased_session_is_refused(store: SessionStore) -> None:
    store.create(session())
    lease = lease_of(store)
    with pytest.raises(SessionBusy):
        store.delete(A)
    lease.save(replace(lease.session, seed=8), release=True)
    assert store.load(A).seed == 8
    store.delete(A)


def test_page__is_in_the_order_of_ids(store: SessionStore) -> None:
    for session_id in ("b", "B", "a", "ab", "z", "-"):
        store.create(session(session_id))
    ids = [one.id for one in store.page("", "", 99)]
    assert ids == sorted(ids)
    assert [one.id for one in store.page("", "B", 2)] == ["a", "ab"]
    assert [one.id for one in store.page("", "aa", 9)] == ["ab", "b", "z"]
    assert store.page("", "z", 9) == []


# Redis only: several stores with the same sessions


def test_redis_store__updates_a_current_copy_in_one_exchange(replicas: list[RedisStore], exchanges: Exchanges) -> None:
    one, _ = replicas
    one.create(session())
    one.update(A, with_changes(seed=8))
    lease, _ = one.begin(A, with_changes(seed=9))
    assert exchanges.operations == ["create", "claim", "claim"]
    assert lease is not None
    lease.save(replace(lease.session, seed=10), release=True)
    assert exchanges.operations[3:] == ["save"]


def test_redis_store__creates_in_one_exchange(replicas: list[RedisStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for the owner's index are needed once in some minutes, and those for long texts once for each segment."""
    one, _ = replicas
    monkeypatch.setattr(one._index, "check_some", lambda _: None)
    exchanges: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        send = getattr(one._server, name)

        def count(*arguments: Any, **options: Any) -> Any:
            exchanges.append(name)
            return send(*arguments, **options)

        return count

    for name in ("_run_script", "_send_all"):
        monkeypatch.setattr(one._server, name, counted(name))
    one.create(session("first"))
    assert len(exchanges) == 2
    exchanges.clear()
    one.create(session("a"))
    assert exchanges == ["_run_script"]
    assert [summary.id for summary in one.page("", "", 9)] == ["a", "first"]
    exchanges.clear()
    with pytest.raises(SessionExists):
        one.create(session("a"))
    assert exchanges == ["_run_script"]
    exchanges.clear()
    retention, hidden = Retention(), state(0)
    states = dict.fromkeys(retention.checkpoint_positions(0, 9_000), hidden)
    long = one.create(session("long", text=Text(hidden).extended("x" * 9_000, hidden, states, retention)))
    assert exchanges == ["_send_all", "_send_all", "_run_script"]
    exchanges.clear()
    one.create(replace(long, id="fork"))
    assert exchanges == ["_send_all", "_run_script"]


def test_redis_store__without_a_cache_needs_two_exchanges(
    request: pytest.FixtureRequest, clock: Clock, exchanges: Exchanges
) -> None:
    with closing(redis_store(request, clock, cache_bytes=0, exchanges=exchanges)) as store:
        store.create(session())
        store.update(A, with_changes(seed=8))
        assert exchanges.operations == ["create", "lease", "save"]


def test_redis_store__runs_a_change_again_if_its_copy_was_stale(
    replicas: list[RedisStore], exchanges: Exchanges
) -> None:
    one, other = replicas
    one.create(session(seed=1))
    other.update(A, with_changes(seed=2))
    seen: list[int] = []

    def doubled(session: Session) -> tuple[Session, int]:
        seen.append(session.seed)
        return replace(session, seed=10 * session.seed), session.seed

    assert one.update(A, doubled) == 2
    assert seen == [1, 2]
    assert exchanges.operations == ["create", "claim", "lease", "save"]
    for replica in replicas:
        assert (replica.load(A).seed, replica.load(A).revision) == (20, 3)


def test_redis_store__runs_a_change_again_that_had_nothing_to_save_in_a_stale_copy(replicas: list[RedisStore]) -> None:
    one, other = replicas
    one.create(session(seed=1))
    other.update(A, with_changes(seed=2))

    def set_to_one(session: Session) -> tuple[Session, bool]:
        return (session, False) if session.seed == 1 else (replace(session, seed=1), True)

    assert one.update(A, set_to_one)
    assert other.load(A).seed == 1


@pytest.mark.parametrize("keep", [False, True])
def test_redis_store__does_not_report_what_a_change_raised_on_a_stale_copy(
    replicas: list[RedisStore], keep: bool
) -> None:
    one, other = replicas
    one.create(session())
    other.update(A, with_changes(text=text("ROMEO:xy")))

    def at_eight(session: Session) -> tuple[Session, str]:
        session.require_position(8)
        return replace(session, seed=8), "done"

    if keep:
        lease, answer = one.begin(A, at_eight)
        assert lease is not None
        lease.release()
    else:
        answer = one.update(A, at_eight)
    assert answer == "done"
    assert (other.load(A).seed, other.load(A).position) == (8, 8)


def test_redis_store__reports_what_a_change_raises_on_the_current_session(replicas: list[RedisStore]) -> None:
    one, other = replicas
    one.create(session())
    other.update(A, with_changes(text=text("ROMEO:xy")))

    def at_six(session: Session) -> tuple[Session, None]:
        session.require_position(6)
        return replace(session, seed=8), None

    with pytest.raises(PositionConflict) as caught:
        one.update(A, at_six)
    assert caught.value.position == 8
    assert other.update(A, with_changes(seed=9)) == 7  # neither changed nor leased


def test_redis_store__leases_across_replicas(replicas: list[RedisStore]) -> None:
    one, other = replicas
    one.create(session())
    lease = lease_of(one)
    before = other.load(A)
    for call in every_use(other)[1:]:
        with pytest.raises(SessionBusy):
            call(A)
    assert facts(other.load(A)) == facts(before)
    lease.save(replace(lease.session, seed=8), release=True)
    assert other.update(A, with_changes(seed=9)) == 8
    assert one.load(A).seed == 9


def test_redis_store__updates_by_several_replicas_lose_none(replicas: list[RedisStore]) -> None:
    replicas[0].create(session(seed=0))

    def count(store: RedisStore) -> int:
        num_applied = 0
        for _ in range(100):
            try:
                store.update(A, lambda one: (replace(one, seed=one.seed + 1), None))
            except SessionBusy:
                continue
            num_applied += 1
        return num_applied

    with ThreadPoolExecutor(4) as pool:
        num_applied = sum(pool.map(count, replicas * 2))
    assert num_applied > 0
    for store in replicas:
        assert (store.load(A).seed, store.load(A).revision) == (num_applied, 1 + num_applied)


def test_redis_store__update_refuses_a_cached_session_that_has_expired(
    replicas: list[RedisStore], clock: Clock
) -> None:
    one, other = replicas
    one.create(session())
    clock.now += 60
    for store in replicas:
        for call in every_use(store):
            with pytest.raises(SessionGone):
                call(A)
    other.create(session(seed=14))
    assert one.update(A, with_changes(seed=15)) == 14


def test_redis_store__sees_that_another_replica_deleted_the_session(replicas: list[RedisStore]) -> None:
    one, other = replicas
    one.create(session())
    other.delete(A)
    for call in every_use(one):
        with pytest.raises(SessionNotFound):
            call(A)


@pytest.mark.parametrize("num_updates", [0, 3])
def test_redis_store__sees_that_another_replica_made_the_session_anew(
    replicas: list[RedisStore], num_updates: int
) -> None:
    """Even though the copy in its cache has a higher revision."""
    one, other = replicas
    one.create(session(seed=1))
    for _ in range(num_updates):
        one.update(A, with_changes(seed=2))
    other.delete(A)
    other.create(session(seed=30))
    assert facts(one.load(A)) == facts(other.load(A))
    assert one.update(A, with_changes(seed=31)) == 30
    assert other.load(A).seed == 31


# The memory store only


def memory(clock: Clock, max_sessions: int = 3, max_bytes: int = 2**30) -> MemoryStore:
    return MemoryStore(max_sessions, max_bytes, clock, clock)


def outcome(store: MemoryStore, session_id: str) -> str | None:
    """Return the code of the error that loading the session raises, or None."""
    try:
        store.load(SessionKey("", session_id))
    except GruServeError as error:
        return error.code
    return None


def test_memory_store__evicts_the_least_recently_used_idle_session(clock: Clock) -> None:
    store = memory(clock)
    for session_id in "abc":
        store.create(session(session_id))
    use(store, A)
    lease = lease_of(store, B)
    store.create(session("d"))  # evicts c: a was used after it, b is leased
    assert [outcome(store, one) for one in "abcd"] == [None, None, "session_gone", None]
    store.create(session("e"))
    assert outcome(store, "a") == "session_gone"
    leases = [lease, *(lease_of(store, SessionKey("", one)) for one in "de")]
    with pytest.raises(Overloaded):
        store.create(session("f"))
    assert len(store) == 3
    for lease in leases:
        lease.release()
    store.create(session("f"))
    assert outcome(store, "b") == "session_gone"


def test_memory_store__limits_its_bytes(clock: Clock) -> None:
    store = memory(clock, max_sessions=10**6, max_bytes=10**6)
    for number in range(3000):
        store.create(session(f"s{number}"))
        assert store.num_bytes <= 10**6
    assert 100 < len(store) < 3000
    assert outcome(store, "s2999") is None
    with pytest.raises(Overloaded):
        store.create(session("large", text=text(hidden=np.zeros((1, 300_000), np.float32))))
    assert outcome(store, "s2999") is None  # nothing was evicted for it


def test_memory_store__counts_the_settings_of_a_run(clock: Clock) -> None:
    """A thousand biases and four long stop strings take more memory than the state."""
    store = memory(clock)
    store.create(session("a"))
    before = store.num_bytes
    sampling = replace(PLAIN, logit_bias=tuple((number, 0.5) for number in range(1000)))
    change(store, run=Run(6, 10, 7, sampling, ("x" * 256,) * 4))
    assert store.num_bytes - before > 120_000
    change(store, run=None)
    assert store.num_bytes == before


def test_memory_store__evicts_idle_sessions_for_one_that_grows(clock: Clock) -> None:
    store = memory(clock, max_bytes=50_000)
    for session_id in "ab":
        store.create(session(session_id))
    change(store, B, text=text("x" * 48_000))
    assert outcome(store, "a") == "session_gone"
    assert store.load(B).position == 48_000


def test_memory_store__counts_shared_segments_once(clock: Clock) -> None:
    """A thousand forks of a long draft take one state each, and free all of their memory."""
    store = memory(clock, max_sessions=2000)
    retention, hidden = Retention(), np.zeros((1, 1024), np.float32)
    states = {position: hidden.copy() for position in retention.checkpoint_positions(0, 60_000)}
    draft = store.create(session("draft", text=Text(hidden).extended("x" * 60_000, hidden, states, retention)))
    one = store.num_bytes
    assert one > 60_000 / 256 * 4096
    for number in range(1000):
        store.create(replace(draft, id=f"fork{number}"))
    assert store.num_bytes - one < 1000 * 5400
    clock.now += 60
    while store.sweep(100):
        pass
    assert (len(store), store.num_bytes) == (0, 0)


def test_memory_store__frees_all_memory_of_deleted_sessions(clock: Clock) -> None:
    store = memory(clock)
    segment = Segment("ab", 2, state(0.1))
    store.create(session("a", text=Text(state(0.2), 0, (segment,), "c")))
    store.create(session("b", text=Text(state(0.3), 0, (segment,), "d")))
    change(store, B, text=text("xyz"))
    for key in (A, B):
        store.delete(key)
    assert (len(store), store.num_bytes) == (0, 0)


def test_sweep__deletes_expired_sessions_up_to_its_limit(clock: Clock) -> None:
    store = memory(clock, max_sessions=1000)
    for number in range(300):
        store.create(session(f"s{number}", ttl_s=10 + number % 3))
    lease = lease_of(store, SessionKey("", "s0"))
    assert store.sweep(1000) == 0
    clock.now += 10
    assert [store.sweep(60), store.sweep(60), store.sweep(60)] == [60, 39, 0]
    clock.now += 2.5
    assert store.sweep(1000) + store.sweep(1000) == 200
    assert len(store) == 1
    lease.release()
    clock.now += 11  # whole seconds are swept
    assert store.sweep(10) == 1
    assert store.num_bytes == 0


@pytest.mark.parametrize("step_s", [10**10, -(10**9)])
def test_memory_store__a_step_of_the_wall_clock_ends_no_session(clock: Clock, step_s: int) -> None:
    """Nor does it keep one alive: the wall clock is only shown."""
    wall = Clock()
    store = MemoryStore(10, 2**30, clock, wall)
    store.create(session("a", ttl_s=100))
    wall.now += step_s
    assert store.sweep(10) == 0  # and at once: it must not look at each second of the step
    assert store.load(A).expires_at == 1_800_000_100
    use(store, A)
    assert store.load(A).expires_at == wall.now + 100
    assert store.create(session("b", ttl_s=100)).created_at == wall.now
    clock.now += 100
    assert outcome(store, "a") == outcome(store, "b") == "session_gone"
    assert store.sweep(10) == 0
    assert store.num_bytes == 0


def test_sweep__is_quick_after_the_process_was_paused(clock: Clock) -> None:
    store = memory(clock)
    store.create(session("a", ttl_s=100))
    store.sweep()
    clock.now += 10**10
    assert [store.sweep(), store.sweep()] == [1, 0]


@pytest.fixture
def as_client() -> Iterator[Callable[[str], None]]:
    """Let this thread work for a client."""
    yield work_for
    work_for("")


@pytest.mark.parametrize("limit", ["sessions", "bytes"])
def test_memory_store__a_client_does_not_push_out_others(
    clock: Clock, limit: str, as_client: Callable[[str], None]
) -> None:
    store = memory(clock, 100, 2**30) if limit == "sessions" else memory(clock, 10**6, 100 * 1200)
    for number, client in enumerate(("modest", "two", "two")):
        as_client(client)
        store.create(session(f"{client}{number}"))
    as_client("greedy")
    for number in range(1000):
        store.create(session(f"g{number}"))
    assert [outcome(store, one) for one in ("modest0", "two1", "two2", "g0", "g999")] == [
        None, None, None, "session_gone", None,
    ]  # fmt: skip
    num_greedy = len(store) - 3
    as_client("modest")  # finds room
    for number in range(40):
        store.create(session(f"m{number}"))
    assert all(outcome(store, f"m{number}") is None for number in range(40))
    assert len(store) - 43 <= num_greedy - 38
    for number in range(40, 1000):  # now it is the greedy one
        store.create(session(f"m{number}"))
    assert outcome(store, "g999") is None
    assert outcome(store, "two1") is None


def test_memory_store__a_growing_session_is_not_evicted_for_itself(
    clock: Clock, as_client: Callable[[str], None]
) -> None:
    store = memory(clock, max_bytes=50_000)
    for client in "ab":
        as_client(client)
        store.create(session(client))
    change(store, B, text=text("x" * 48_000))
    assert [outcome(store, one) for one in "ab"] == ["session_gone", None]


def test_memory_store__forgets_clients_without_sessions(clock: Clock, as_client: Callable[[str], None]) -> None:
    store = memory(clock)
    for number in range(100):
        as_client(f"stranger{number}")
        store.create(session("a"))
        store.delete(A)
    assert (store.num_clients, store.num_bytes) == (0, 0)


def test_memory_store__has_states_of_different_shapes(clock: Clock) -> None:
    store = memory(clock)
    store.create(session("a"))
    store.create(session("b", text=text(hidden=np.full((2, 8), 0.1, np.float32))))
    change(store, A, text=text(hidden=np.full((3, 4), 0.2, np.float32)))
    store.create(session("c", text=text(hidden=state(0.9))))
    assert [store.load(SessionKey("", one)).hidden.shape for one in "abc"] == [(3, 4), (2, 8), SHAPE]
    assert store.load(SessionKey("", "c")).hidden.tobytes() == state(0.9).tobytes()

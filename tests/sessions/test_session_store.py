"""The contract of session stores: one suite for all implementations. Add a new one to STORES."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.engine.sampling_settings import PLAIN
from service.errors import (
    GruServeError,
    Overloaded,
    RevisionConflict,
    SessionBusy,
    SessionExists,
    SessionGone,
    SessionNotFound,
)
from service.sessions.memory_store import MemoryStore
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Run, Session
from service.sessions.session_store import Lease, SessionStore
from service.sessions.transcript import Retention, Segment, Transcript
from tests.harness.clock import Clock

SHAPE = (1, 16)


def redis_store(request: pytest.FixtureRequest, clock: Clock, cache_bytes: int = 2**20) -> SessionStore:
    """Return a store with its own sessions. Its leases are very long: the tests' clock jumps, and none is renewed."""
    server = RedisServer(request.getfixturevalue("redis_url"), recovery_window_s=0)
    return RedisStore(server, 4096, cache_bytes, prefix=f"{secrets.token_hex(8)}*[", lease_s=10**7, clock=clock)


STORES: dict[str, Callable[[pytest.FixtureRequest, Clock], SessionStore]] = {
    "memory": lambda _, clock: MemoryStore(100, 2**30, clock),
    "redis": redis_store,
    "redis without its cache": lambda request, clock: redis_store(request, clock, cache_bytes=0),
}
CACHING_STORES = {"redis"}  # those whose `cached_copy` returns copies


# For what needs a `cached_copy`; test_cached_copy__is_none_in_a_store_without_a_cache is about the other stores.
caching = pytest.mark.parametrize("store", CACHING_STORES, indirect=True)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, clock: Clock) -> Iterator[SessionStore]:
    store = STORES[request.param](request, clock)
    yield store
    store.close()


def state(value: float) -> Any:
    return np.full(SHAPE, value, np.float32)


def session(session_id: str = "a", **changes: Any) -> Session:
    fields: dict[str, Any] = {
        "owner": "", "model": "tiny@1", "identity": "ab", "seed": 7, "ttl_s": 60, "created_at": 0, "expires_at": 0,
        "hidden": state(0.5), "transcript": Transcript(0, (), "ROMEO:"),
    }  # fmt: skip
    return Session(session_id, **(fields | changes))


def facts(one: Session) -> list[Any]:
    """Return everything of a session but its checkpoints, comparable."""
    transcript = [one.transcript.start, one.transcript.text(one.transcript.start, one.position)]
    names = ("id", "owner", "model", "identity", "seed", "ttl_s", "created_at", "expires_at", "run", "origin")
    return [*(getattr(one, name) for name in names), one.revision, one.hidden.tobytes(), *transcript]


def checkpoints(one: Session) -> set[tuple[int, bytes]]:
    """Return the positions and states of a session's checkpoints."""
    return {(segment.end, segment.hidden.tobytes()) for segment in one.transcript.segments}


def change(store: SessionStore, session_id: str = "a", **changes: Any) -> Session:
    lease = store.lease("", session_id)
    store.save(lease, replace(lease.session, **changes))
    store.release(lease)
    return store.load("", session_id)


def test_load__returns_what_was_created(store: SessionStore, clock: Clock) -> None:
    run = Run(3, 10, -5, replace(PLAIN, temperature=0.5), ("ab",), "xyz", "stop", 6)
    transcript = Transcript(2, (Segment("ab", 4, state(0.1)),), "cd")
    created = store.create(session(ttl_s=90.5, run=run, origin=b"0123", transcript=transcript))
    assert (created.created_at, created.expires_at, created.revision) == (clock.now, clock.now + 90.5, 1)
    loaded = store.load("", "a")
    assert facts(loaded) == facts(created)
    assert checkpoints(loaded) <= checkpoints(created)


@pytest.mark.parametrize("begin", [0, 500, 70_000])
def test_load__returns_a_long_text_with_checkpoints_from_its_first_character(store: SessionStore, begin: int) -> None:
    """A store may drop checkpoints, but going back may never step more than 4,096 characters again."""
    retention, text = Retention(), "".join(chr(97 + number % 23) for number in range(20_000))
    transcript = Transcript.from_state(begin, state(begin)) if begin else Transcript()
    kept = {position: state(position) for position in retention.checkpoint_positions(begin, begin + len(text))}
    created = store.create(session(transcript=transcript.extend(text, kept, retention)))
    loaded = store.load("", "a")
    assert facts(loaded) == facts(created)
    for position in range(begin, begin + len(text) + 1, 77):
        start, hidden = loaded.transcript.nearest_checkpoint(position)
        assert begin <= start <= position < start + 4096
        assert hidden is None if start == 0 else hidden is not None and hidden.tobytes() == state(start).tobytes()


def test_create__refuses_an_id_in_use(store: SessionStore) -> None:
    store.create(session())
    with pytest.raises(SessionExists):
        store.create(session(seed=8))
    assert store.load("", "a").seed == 7


def test_owners__do_not_see_one_anothers_sessions(store: SessionStore) -> None:
    store.create(session(owner="one", seed=1))
    store.create(session(owner="two", seed=2))
    store.create(session(owner="", seed=3))
    assert [store.load(owner, "a").seed for owner in ("one", "two", "")] == [1, 2, 3]
    for call in (store.load, store.lease):
        with pytest.raises(SessionNotFound):
            call("three", "a")
    store.delete(store.lease("one", "a"))
    assert store.load("two", "a").seed == 2
    assert [len(store.page(owner, "", 9)) for owner in ("one", "two", "", "three")] == [0, 1, 1, 0]


def test_sessions__are_values(store: SessionStore) -> None:
    """A loaded session doesn't change with the stored one, nor the stored one with the array it was made from."""
    hidden = state(0.25)
    created = store.create(session(hidden=hidden))
    loaded = store.load("", "a")
    hidden[:] = 9
    assert store.load("", "a").hidden.tobytes() == state(0.25).tobytes()
    change(store, hidden=state(0.75), transcript=Transcript(0, (), "ROMEO:x"))
    assert loaded.hidden.tobytes() == state(0.25).tobytes()
    assert created.position == loaded.position == 6
    assert store.load("", "a").position == 7


def test_save__needs_the_lease_and_the_revision(store: SessionStore) -> None:
    first = store.create(session())
    lease = store.lease("", "a")
    assert store.save(lease, replace(first, seed=8)) == first.revision + 1
    second = store.load("", "a")
    assert (second.seed, second.revision) == (8, first.revision + 1)
    with pytest.raises(RevisionConflict):
        store.save(lease, replace(first, seed=9))
    store.release(lease)
    for use in (lambda: store.save(lease, replace(second, seed=9)), lambda: store.delete(lease)):
        with pytest.raises(RevisionConflict):
            use()
    other = store.lease("", "a")
    with pytest.raises(RevisionConflict):
        store.save(lease, replace(second, seed=9))
    store.release(lease)  # already released: does nothing, and leaves the other lease alone
    with pytest.raises(SessionBusy):
        store.lease("", "a")
    store.release(other)
    assert facts(store.load("", "a")) == facts(second)


def cached(store: SessionStore) -> Session:
    copy = store.cached_copy("", "a")
    assert copy is not None
    return copy


def test_compare_and_save__refuses_a_session_that_is_no_cached_copy(store: SessionStore) -> None:
    store.create(session())
    for one in (session(), replace(store.load("", "a"))):
        assert store.compare_and_save(one, replace(one, seed=8)) is None
    assert store.load("", "a").seed == 7


@pytest.mark.parametrize("store", sorted(STORES.keys() - CACHING_STORES), indirect=True)
def test_cached_copy__is_none_in_a_store_without_a_cache(store: SessionStore) -> None:
    store.create(session())
    store.load("", "a")
    assert store.cached_copy("", "a") is None


@caching
def test_compare_and_save__saves_and_leases_a_current_copy(store: SessionStore) -> None:
    store.create(session())
    copy = cached(store)
    lease = store.compare_and_save(copy, replace(copy, seed=8))
    assert lease is not None
    assert facts(lease.session) == facts(store.load("", "a"))
    assert (lease.session.seed, lease.session.revision) == (8, copy.revision + 1)
    assert store.save(lease, replace(lease.session, seed=10)) == copy.revision + 2
    store.release(lease)
    assert store.load("", "a").seed == 10


@caching
def test_compare_and_save__refuses_every_copy_of_a_leased_session(store: SessionStore) -> None:
    store.create(session())
    stale = cached(store)
    assert store.compare_and_save(stale, replace(stale, seed=8)) is not None
    before = store.load("", "a")
    for copy in (stale, before, cached(store)):
        assert store.compare_and_save(copy, replace(copy, seed=9)) is None
    assert facts(store.load("", "a")) == facts(before)


@caching
def test_compare_and_save__can_release_in_the_same_exchange(store: SessionStore, clock: Clock) -> None:
    store.create(session())
    copy = cached(store)
    released = store.compare_and_save(copy, replace(copy, seed=11), release=True)
    assert released is not None
    with pytest.raises(RevisionConflict):
        store.save(released, replace(released.session, seed=12))
    assert store.compare_and_save(copy, replace(copy, seed=13)) is None  # it is stale now
    assert (store.load("", "a").seed, store.load("", "a").expires_at) == (11, clock() + 60)


@caching
def test_compare_and_save__refuses_an_expired_session(store: SessionStore, clock: Clock) -> None:
    store.create(session())
    copy = cached(store)
    clock.now += 60
    assert store.compare_and_save(copy, replace(copy, seed=14)) is None
    with pytest.raises(SessionGone):
        store.load("", "a")


@caching
def test_compare_and_save__refuses_a_deleted_session(store: SessionStore) -> None:
    store.create(session())
    copy = cached(store)
    store.delete(store.lease("", "a"))
    assert store.compare_and_save(copy, replace(copy, seed=15)) is None
    with pytest.raises(SessionNotFound):
        store.load("", "a")


def test_lease__is_exclusive(store: SessionStore) -> None:
    store.create(session())
    lease = store.lease("", "a")
    with pytest.raises(SessionBusy):
        store.lease("", "a")
    assert store.load("", "a").seed == 7  # loading needs no lease
    store.release(lease)
    store.release(store.lease("", "a"))


def test_lease__goes_to_one_of_many_threads(store: SessionStore) -> None:
    store.create(session())
    got: list[Lease] = []
    barrier = threading.Barrier(8)

    def reach() -> None:
        for _ in range(50):
            barrier.wait(10)
            try:
                lease = store.lease("", "a")
            except SessionBusy:
                continue
            finally:
                barrier.wait(10)
            got.append(lease)
            store.release(lease)

    threads = [threading.Thread(target=reach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 50


def test_session__expires_at_its_time(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    clock.now += 59.9
    store.load("", "a")
    clock.now += 0.1
    for call in (store.load, store.lease):
        with pytest.raises(SessionGone):
            call("", "a")
    with pytest.raises(SessionNotFound):
        store.load("somebody", "a")
    assert store.page("", "", 9) == []
    store.create(session(seed=9))  # the id is free again
    assert store.load("", "a").seed == 9


def test_session__lives_longer_when_used_but_not_when_read(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    clock.now += 59
    store.release(store.lease("", "a"))
    assert store.load("", "a").expires_at == clock.now + 60
    clock.now += 59
    store.load("", "a")
    store.page("", "", 9)
    clock.now += 1
    with pytest.raises(SessionGone):
        store.load("", "a")


def test_session__never_expires_while_leased(store: SessionStore, clock: Clock) -> None:
    store.create(session(ttl_s=60))
    lease = store.lease("", "a")
    for _ in range(100):
        clock.now += 1000
        store.load("", "a")
    store.save(lease, replace(store.load("", "a"), seed=8))
    store.release(lease)
    clock.now += 59.9
    assert store.load("", "a").seed == 8
    clock.now += 0.1
    with pytest.raises(SessionGone):
        store.load("", "a")


def test_delete__makes_the_session_unknown(store: SessionStore) -> None:
    store.create(session())
    lease = store.lease("", "a")
    store.delete(lease)
    store.release(lease)
    for call in (store.load, store.lease):
        with pytest.raises(SessionNotFound):
            call("", "a")


def test_page__is_in_the_order_of_ids(store: SessionStore) -> None:
    for session_id in ("b", "B", "a", "ab", "z", "-"):
        store.create(session(session_id))
    ids = [one.id for one in store.page("", "", 99)]
    assert ids == sorted(ids)
    assert [one.id for one in store.page("", "B", 2)] == ["a", "ab"]
    assert [one.id for one in store.page("", "aa", 9)] == ["ab", "b", "z"]
    assert store.page("", "z", 9) == []


# The memory store only


def memory(clock: Clock, max_sessions: int = 3, max_bytes: int = 2**30) -> MemoryStore:
    return MemoryStore(max_sessions, max_bytes, clock)


def outcome(store: MemoryStore, session_id: str) -> str | None:
    """Return the code of the error that loading the session raises, or None."""
    try:
        store.load("", session_id)
    except GruServeError as error:
        return error.code
    return None


def test_memory_store__evicts_the_least_recently_used_idle_session(clock: Clock) -> None:
    store = memory(clock)
    for session_id in "abc":
        store.create(session(session_id))
    store.release(store.lease("", "a"))
    held = store.lease("", "b")
    store.create(session("d"))  # evicts c: a was used after it, b is leased
    assert [outcome(store, one) for one in "abcd"] == [None, None, "session_gone", None]
    store.create(session("e"))
    assert outcome(store, "a") == "session_gone"
    all_held = [held, store.lease("", "d"), store.lease("", "e")]
    with pytest.raises(Overloaded):
        store.create(session("f"))
    assert len(store) == 3
    for lease in all_held:
        store.release(lease)
    store.create(session("f"))
    assert outcome(store, "b") == "session_gone"


def test_memory_store__limits_its_bytes(clock: Clock) -> None:
    store = memory(clock, max_sessions=10**6, max_bytes=10**6)
    for number in range(3000):
        store.create(session(f"s{number}"))
        assert store.num_bytes <= 10**6
    assert 100 < len(store) < 3000
    store.load("", "s2999")
    with pytest.raises(Overloaded):
        store.create(session("large", hidden=np.zeros((1, 300_000), np.float32)))
    store.load("", "s2999")  # nothing was evicted for it


def test_memory_store__counts_the_settings_of_a_run(clock: Clock) -> None:
    """A thousand biases and four long stop strings take more memory than the state."""
    store = memory(clock)
    store.create(session("a"))
    before = store.num_bytes
    sampling = replace(PLAIN, logit_bias=tuple((number, 0.5) for number in range(1000)))
    change(store, "a", run=Run(6, 10, 7, sampling, ("x" * 256,) * 4))
    assert store.num_bytes - before > 120_000
    change(store, "a", run=None)
    assert store.num_bytes == before


def test_memory_store__evicts_idle_sessions_for_one_that_grows(clock: Clock) -> None:
    store = memory(clock, max_bytes=50_000)
    for session_id in "ab":
        store.create(session(session_id))
    change(store, "b", transcript=Transcript(0, (), "x" * 48_000))
    assert outcome(store, "a") == "session_gone"
    assert store.load("", "b").position == 48_000


def test_memory_store__counts_shared_segments_once(clock: Clock) -> None:
    """A thousand forks of a long draft take one state each, and free all of their memory."""
    store = memory(clock, max_sessions=2000)
    retention, text, hidden = Retention(), "x" * 60_000, np.zeros((1, 1024), np.float32)
    kept = {position: hidden.copy() for position in retention.checkpoint_positions(0, 60_000)}
    draft = store.create(session("draft", transcript=Transcript().extend(text, kept, retention), hidden=hidden))
    one = store.num_bytes
    assert one > 60_000 / 256 * 4096
    for number in range(1000):
        store.create(replace(draft, id=f"fork{number}"))
    assert store.num_bytes - one < 1000 * 5400
    clock.now += 60
    while store.sweep(100):
        pass
    assert (len(store), store.num_bytes) == (0, 0)


def test_sweep__deletes_expired_sessions_up_to_its_limit(clock: Clock) -> None:
    store = memory(clock, max_sessions=1000)
    for number in range(300):
        store.create(session(f"s{number}", ttl_s=10 + number % 3))
    held = store.lease("", "s0")
    assert store.sweep(1000) == 0
    clock.now += 10
    assert [store.sweep(60), store.sweep(60), store.sweep(60)] == [60, 39, 0]
    clock.now += 2.5
    assert store.sweep(1000) + store.sweep(1000) == 200
    assert len(store) == 1
    store.release(held)
    clock.now += 11  # whole seconds are swept
    assert store.sweep(10) == 1
    assert store.num_bytes == 0


def test_sweep__finds_all_sessions_after_the_clock_jumped(clock: Clock) -> None:
    """Forwards or backwards."""
    store = memory(clock)
    store.create(session("a", ttl_s=100))
    clock.now += 50
    store.sweep(10)
    clock.now -= 1000
    store.create(session("b", ttl_s=100))
    store.release(store.lease("", "a"))
    clock.now += 10**6
    assert store.sweep(10) + store.sweep(10) == 2
    assert store.num_bytes == 0


def test_memory_store__has_states_of_different_shapes(clock: Clock) -> None:
    store = memory(clock)
    store.create(session("a"))
    store.create(session("b", hidden=np.full((2, 8), 0.1, np.float32)))
    change(store, "a", hidden=np.full((3, 4), 0.2, np.float32))
    store.create(session("c", hidden=state(0.9)))
    assert [store.load("", one).hidden.shape for one in "abc"] == [(3, 4), (2, 8), SHAPE]
    assert store.load("", "c").hidden.tobytes() == state(0.9).tobytes()

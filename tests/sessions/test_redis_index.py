"""Lists of sessions in Redis."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from service.errors import GruServeError
from service.sessions.memory_store import MemoryStore
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session, SessionKey
from service.sessions.session_store import SessionStore
from service.sessions.text import Text
from tests.harness.clock import Clock
from tests.harness.redis_process import redis_process
from tests.harness.redis_stores import TIMEOUT_S
from tests.harness.wait import wait_until

OWNERS = ("", "one", "on", "one.two", "*")
IDS = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=4)


@pytest.fixture
def prefix() -> str:
    return f"{secrets.token_hex(8)}*["


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def store(redis_url: str, prefix: str, clock: Clock) -> Iterator[RedisStore]:
    with closing(new_store(redis_url, prefix, clock)) as store:
        yield store


def new_store(url: str, prefix: str, clock: Clock | None = None) -> RedisStore:
    """Return a store whose leases are very long, because the tests' clock jumps."""
    return RedisStore(RedisServer(url, TIMEOUT_S, 0), 4096, prefix=prefix, lease_s=10**7, clock=clock)


def session(session_id: str = "a", owner: str = "", ttl_s: float = 60) -> Session:
    text = Text(np.full((1, 16), 0.5, np.float32), 0, (), "ROMEO:" + session_id)
    return Session(session_id, owner, "tiny@1", "ab", 7, ttl_s, 0, 0, text)


def ids(store: SessionStore, owner: str = "", after: str = "", limit: int = 1000) -> list[str]:
    return [one.id for one in store.page(owner, after, limit)]


def indexed(client: Redis, prefix: str, owner: str = "") -> list[str]:
    """Return what an owner's index has, whether the sessions are there or not."""
    members: Any = client.zrange(f"{prefix}ids:{owner}", 0, -1)
    return [one.decode() for one in members]


def outlived(redis: Redis, key: str) -> None:
    """Let a key expire at once, as Redis does at the end of its time."""
    redis.delete(key)


@given(
    created=st.lists(st.tuples(st.sampled_from(OWNERS), IDS), max_size=30, unique=True),
    deleted=st.sets(st.integers(0, 29), max_size=10),
    pages=st.lists(st.tuples(st.sampled_from(OWNERS), st.one_of(st.just(""), IDS), st.integers(1, 5)), max_size=8),
)
@settings(max_examples=40)
def test_page__lists_what_the_memory_store_lists(
    redis_url: str, created: list[tuple[str, str]], deleted: set[int], pages: list[tuple[str, str, int]]
) -> None:
    clock = Clock()
    memory = MemoryStore(1000, 2**30, clock, clock)
    with closing(new_store(redis_url, secrets.token_hex(8), clock)) as redis:
        for store in (memory, redis):
            for owner, session_id in created:
                store.create(session(session_id, owner))
            for number, (owner, session_id) in enumerate(created):
                if number in deleted:
                    store.delete(SessionKey(owner, session_id))
        for owner, after, limit in pages:
            assert redis.page(owner, after, limit) == memory.page(owner, after, limit)
        for owner in OWNERS:
            assert redis.page(owner, "", 1000) == memory.page(owner, "", 1000)


def test_page__drops_what_has_expired_and_what_was_lost(
    store: RedisStore, client: Redis, prefix: str, clock: Clock
) -> None:
    for session_id, ttl_s in (("gone", 10), ("here", 100), ("lost", 100), ("more", 100)):
        store.create(session(session_id, ttl_s=ttl_s))
    outlived(client, f"{prefix}/lost")
    clock.now += 50
    assert ids(store, limit=2) == ["here", "more"]
    assert indexed(client, prefix) == ["here", "more"]


def test_page__keeps_a_record_that_this_version_cannot_read(store: RedisStore, client: Redis, prefix: str) -> None:
    """A newer version's session is not listed by an older replica, and stays listed by the newer ones."""
    store.create(session("a"))
    client.hset(f"{prefix}/a", "d", b"\xff\0\0\0\0")
    assert ids(store) == []
    assert indexed(client, prefix) == ["a"]


def test_page__looks_at_no_other_key(store: RedisStore, client: Redis) -> None:
    store.create(session("a"))
    ids(store)  # a server's first list looks for sessions without an index
    before = client.info("commandstats")
    ids(store)
    after = client.info("commandstats")
    assert "cmdstat_zrangebylex" in after
    for name in ("cmdstat_scan", "cmdstat_keys"):
        assert before.get(name) == after.get(name)


def test_index__stays_as_large_as_the_live_sessions(
    store: RedisStore, client: Redis, prefix: str, clock: Clock
) -> None:
    """2,000 sessions are created and expire, 20 of them alive at a time, and nobody lists them."""
    for number in range(2000):
        store.create(session(f"{number * 7919 % 2000}", ttl_s=20))
        clock.now += 1
    assert len(indexed(client, prefix)) < 60


def test_index__expires_with_its_sessions(store: RedisStore, client: Redis, prefix: str) -> None:
    store.create(session("a", ttl_s=5000))
    store.create(session("b", ttl_s=1))
    assert 5_000_000 < client.pttl(f"{prefix}ids:") < 6_000_000


def test_index__lives_on_with_a_session_that_is_used(store: RedisStore, client: Redis, prefix: str) -> None:
    """An index that was made for an hour lists a session that is used for a day."""
    store.create(session("a", ttl_s=50))
    client.pexpire(f"{prefix}ids:", 1)
    wait_until(lambda: not client.exists(f"{prefix}ids:"))
    store._index._lifetimes.clear()  # as after the time that the index was made for
    store.update(SessionKey("", "a"), lambda _: (session("a", ttl_s=50_000), None))
    assert ids(store) == ["a"]
    assert client.pttl(f"{prefix}ids:") > 50_000_000


def test_index__has_a_session_that_a_list_removed_while_it_was_created(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store._call_create

    def create_after_a_list(*arguments: Any) -> list[Any]:
        assert ids(store) == []
        return create(*arguments)

    monkeypatch.setattr(store, "_call_create", create_after_a_list)
    store.create(session("a"))
    assert ids(store) == ["a"]


def test_index__has_a_session_that_was_created_while_its_predecessor_was_removed(
    store: RedisStore, client: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(session("a"))
    record_deletion = store._renewer.record_deletion

    def create_again(*arguments: Any) -> None:
        record_deletion(*arguments)
        store.create(session("a"))

    monkeypatch.setattr(store._renewer, "record_deletion", create_again)
    store.delete(SessionKey("", "a"))
    assert indexed(client, prefix) == ["a"]


def test_index__has_the_sessions_of_versions_without_one(
    redis_url: str, client: Redis, prefix: str, clock: Clock
) -> None:
    with closing(new_store(redis_url, prefix, clock)) as store:
        for owner in OWNERS:
            for session_id in ("b", "a"):
                store.create(session(session_id, owner))
            client.delete(f"{prefix}ids:{owner}")
        store.create(session("c"))
    with closing(new_store(redis_url, prefix, clock)) as store:
        assert ids(store) == ["a", "b", "c"]
        for owner in OWNERS[1:]:
            assert ids(store, owner) == ["a", "b"]
            assert client.pttl(f"{prefix}ids:{owner}") > 60_000


def test_lists__outlive_a_restart_that_loses_the_last_writes(tmp_path: Path) -> None:
    """The replica restores the lists of what it has written, as it restores the sessions."""
    with redis_process(tmp_path, "--appendonly", "yes", "--appendfsync", "no") as redis:
        server = RedisServer(redis.url, recovery_window_s=0.1)
        with closing(RedisStore(server, 4096)) as store:
            wait_until(lambda: works(store))
            store.create(session("a", "one"))
            written = redis.on_disk()
            for session_id in ("b", "c", "d"):
                store.create(session(session_id, "one"))
            store.delete(SessionKey("one", "c"))
            redis.kill()
            redis.lose_what_was_written_since(written)
            redis.start()
            wait_until(lambda: works(store))
            assert ids(store, "one") == ["a", "b", "d"]


def works(store: RedisStore) -> bool:
    try:
        store.page("one", "", 1)
    except GruServeError:
        return False
    return True

"""What Redis has of a session's text, and how little of it a small change writes."""

from __future__ import annotations

import gc
import json
import random
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from service.engine.sampling_settings import PLAIN
from service.errors import GruServeError, SessionExists, SessionLost
from service.sessions import lifetimes, record
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Run, Session, SessionKey
from service.sessions.text import Retention, Segment, Text
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import TIMEOUT_S
from tests.harness.wait import wait_until

SHAPE = (2, 512)  # as the shipped model: 4 KiB
RETENTION = Retention()
KEY = SessionKey("", "a")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server of the test's own, because the tests measure what it gets and stores."""
    with redis_process(tmp_path, "--appendonly", "yes", "--appendfsync", "no") as redis:
        yield redis


@pytest.fixture
def client(redis: RedisProcess) -> Iterator[Redis]:
    with Redis.from_url(redis.url) as client:
        yield client


@pytest.fixture
def store(redis: RedisProcess) -> Iterator[RedisStore]:
    with closing(new_store(redis.url)) as store:
        yield store


def new_store(url: str, recovery_window_s: float = 0, **options: Any) -> RedisStore:
    return RedisStore(RedisServer(url, 5, recovery_window_s), RETENTION.segment_chars, **options)


def state(position: int, shape: tuple[int, int] = SHAPE) -> Any:
    """Return the state after `position` characters."""
    return np.random.default_rng(position).uniform(-1, 1, shape).astype(np.float32)


def extended(text: Text, characters: str, retention: Retention = RETENTION, shape: tuple[int, int] = SHAPE) -> Text:
    """Return a text with more characters, whose states `state` gives in the place of a network."""
    end = text.position + len(characters)
    positions = retention.checkpoint_positions(text.position, end)
    return text.extended(characters, state(end, shape), {at: state(at, shape) for at in positions}, retention)


def characters(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz \n", k=count))


def session(session_id: str = "a", num_chars: int = 10, ttl_s: float = 60) -> Session:
    text = extended(Text(state(0)), characters(num_chars))
    return Session(session_id, "", "shakespeare@1", "ab" * 16, 7, ttl_s, 0, 0, text)


def feed(store: RedisStore, text: str = "x", key: SessionKey = KEY) -> None:
    store.update(key, lambda one: (replace(one, text=extended(one.text, text)), None))


def require_same(one: Text, other: Text) -> None:
    """Require the same text and state, and checkpoints that are states of that text."""
    assert (one.start, one.position) == (other.start, other.position)
    assert one.slice(one.start, one.position) == other.slice(other.start, other.position)
    assert one.hidden.tobytes() == other.hidden.tobytes()
    for segment in one.segments:
        assert segment.hidden.tobytes() == state(segment.end, segment.hidden.shape).tobytes()
        assert not other.segments or segment.end in {one.end for one in other.segments}


def received(client: Redis) -> int:
    return int(client.info("stats")["total_net_input_bytes"])


@pytest.mark.parametrize("num_chars", [10, 1_000, 10_000, 60_000, 64_000, 65_000])
def test_feed__writes_at_most_6_kb_however_long_the_text_is(
    store: RedisStore, redis: RedisProcess, client: Redis, num_chars: int
) -> None:
    """Of 20 feeds of a character: what Redis gets, and what it appends to its file. Was 4.7 to 122 KB for each."""
    store.create(session(num_chars=num_chars))
    feed(store)
    sent, written = received(client), sum(redis.on_disk().values())
    for _ in range(20):
        feed(store)
    assert (received(client) - sent) / 20 < 6_000
    assert (sum(redis.on_disk().values()) - written) / 20 < 6_000


def test_feed__writes_a_full_segment_once(store: RedisStore, client: Redis) -> None:
    """The dearest feed is the one that fills a segment."""
    store.create(session(num_chars=61_400))
    most = 0
    for _ in range(600):
        before = received(client)
        feed(store)
        most = max(most, received(client) - before)
    assert most < 16_000
    assert len(client.keys("*segment:*")) == 15


def test_feed__sends_no_command_for_segments_that_live_long_enough(store: RedisStore, client: Redis) -> None:
    store.create(session(num_chars=60_000, ttl_s=3600))
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    for _ in range(10):
        feed(store)
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 20  # a few renewals may be among them
    before = client.info("commandstats")
    assert before.get("cmdstat_exists", {"calls": 0})["calls"] <= 2 * 14 + 3


def test_forks__share_segments(store: RedisStore, client: Redis) -> None:
    """50 forks of 60,000 characters take little more than one. They took 6.1 MB."""
    store.create(session(num_chars=60_000))
    one = int(client.info("memory")["used_memory_dataset"])
    parent = store.load(KEY)
    for number in range(50):
        store.create(replace(parent, id=f"fork {number}"))
    assert int(client.info("memory")["used_memory_dataset"]) - one < 50 * 12_000
    assert len(client.keys("*segment:*")) == 14


def test_forks__share_segments_with_other_replicas(store: RedisStore, redis: RedisProcess, client: Redis) -> None:
    store.create(session(num_chars=60_000))
    with closing(new_store(redis.url)) as other:
        parent = other.load(KEY)
        before = received(client)
        other.create(replace(parent, id="fork"))
        assert received(client) - before < 16_000
        require_same(other.load(SessionKey("", "fork")).text, parent.text)


def test_load__reads_only_the_segments_that_a_replica_lacks(
    store: RedisStore, redis: RedisProcess, client: Redis
) -> None:
    store.create(session(num_chars=60_000))
    with closing(new_store(redis.url)) as other:
        other.load(KEY)
        feed(store)
        before = int(client.info("stats")["total_net_output_bytes"])
        require_same(other.load(KEY).text, store.load(KEY).text)
        assert int(client.info("stats")["total_net_output_bytes"]) - before < 20_000


def test_segments__expire_after_the_last_session_that_needs_them(
    redis: RedisProcess, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetimes, "_SPARE_S", 0.2)
    with closing(new_store(redis.url)) as store:
        store.create(session(num_chars=9_000, ttl_s=1))
        store.create(session("b", num_chars=4_096, ttl_s=500))
        wait_until(lambda: len(client.keys("*segment:*")) == 1)
        feed(store, key=SessionKey("", "b"))
        with closing(new_store(redis.url)) as other:
            require_same(other.load(SessionKey("", "b")).text, store.load(SessionKey("", "b")).text)


def test_segments__live_on_with_a_session_that_is_used(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of one second that is fed for three: its first segment was written three seconds ago."""
    monkeypatch.setattr(lifetimes, "_SPARE_S", 0.4)
    with closing(new_store(redis.url)) as store:
        store.create(session(num_chars=5_000, ttl_s=1))
        end = time.monotonic() + 3
        while time.monotonic() < end:
            feed(store)
        with closing(new_store(redis.url)) as other:
            require_same(other.load(KEY).text, store.load(KEY).text)


def test_delete__deletes_the_segments_that_no_other_session_needs(
    store: RedisStore, redis: RedisProcess, client: Redis
) -> None:
    store.create(session(num_chars=9_000))
    with closing(new_store(redis.url)) as other:
        fork = replace(other.load(KEY), id="fork")
        other.create(replace(fork, text=fork.text.truncated(5_000, state(5_000))))
        store.delete(KEY)
        assert len(client.keys("*segment:*")) == 1
        require_same(store.load(SessionKey("", "fork")).text, session(num_chars=5_000).text)
        store.create(session(num_chars=9_000))  # the store had written these before
        require_same(other.load(KEY).text, session(num_chars=9_000).text)
        other.delete(SessionKey("", "fork"))
        other.delete(KEY)
        assert not client.keys("*segment:*")


def test_create__of_what_exists_leaves_no_segments(store: RedisStore, client: Redis) -> None:
    store.create(session())
    with pytest.raises(SessionExists):
        store.create(session(num_chars=9_000))
    assert not client.keys("*segment:*")


def test_load__of_a_record_without_its_segments_is_lost(store: RedisStore, redis: RedisProcess, client: Redis) -> None:
    store.create(session(num_chars=9_000))
    client.delete(client.keys("*segment:*")[0])
    with closing(new_store(redis.url)) as other:
        for call in (other.load, other.delete):
            with pytest.raises(SessionLost):
                call(KEY)
        assert [one.id for one in other.page("", "", 9)] == ["a"]
    feed(store)  # the replica that has the text can go on


def test_restore__writes_segments_again(redis: RedisProcess, client: Redis) -> None:
    with closing(new_store(redis.url, recovery_window_s=0.1)) as store:
        wait_until(lambda: works(store))
        store.create(session(num_chars=3_000))
        written = redis.on_disk()
        feed(store, characters(40_000))
        expected = store.load(KEY).text
        redis.kill()
        redis.lose_what_was_written_since(written)
        redis.start()
        wait_until(lambda: works(store))
        assert len(client.keys("*segment:*")) == 10
        with closing(new_store(redis.url)) as other:
            require_same(other.load(KEY).text, expected)


def works(store: RedisStore) -> bool:
    try:
        store.page("", "", 1)
    except GruServeError:
        return False
    return True


SMALL = Retention(checkpoint_chars=4, max_chars=200)  # segments of 48 characters, settled text in steps of 6
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 120)),
        st.tuples(st.just("rewind"), st.floats(0, 1)),
        st.tuples(st.just("base"), st.integers(0, 300)),
        st.tuples(st.just("fork"), st.floats(0, 1)),
        st.tuples(st.just("elsewhere"), st.just(0)),
    ),
    max_size=12,
)


def changed(kind: str, amount: float, added: str, shape: tuple[int, int], text: Text) -> Text:
    """Return a text after one of CHANGES."""
    if kind == "feed":
        return extended(text, added, SMALL, shape)
    at = int(amount) if kind == "base" else text.start + int(amount * (text.position - text.start))
    return Text.from_state(at, state(at, shape)) if kind == "base" else text.truncated(at, state(at, shape))


def with_text(change: Callable[[Text], Text], one: Session) -> tuple[Session, None]:
    return replace(one, text=change(one.text)), None


@given(changes=CHANGES, caches=st.lists(st.sampled_from([0, 2**20]), min_size=2, max_size=2))
@settings(max_examples=60)
def test_load__returns_any_text_to_the_bit(redis_url: str, changes: list[tuple[str, float]], caches: list[int]) -> None:
    """Two replicas change a session in turn, with their caches or without; each loads what the other one saved."""
    prefix, shape = secrets.token_hex(8), (1, 4)
    stores = [RedisStore(RedisServer(redis_url, TIMEOUT_S, 0), SMALL.segment_chars, size, prefix) for size in caches]
    expected, key, rng = Text(state(0, shape)), KEY, random.Random(len(changes))
    try:
        stores[0].create(replace(session(), text=expected))
        for number, (kind, amount) in enumerate(changes):
            if kind == "elsewhere":
                stores.reverse()
                continue
            added = "".join(rng.choices("aé€𝄞", k=int(amount))) if kind == "feed" else ""
            change = partial(changed, kind, amount, added, shape)
            expected = change(expected)
            if kind == "fork":
                parent = stores[0].load(key)
                key = SessionKey("", f"fork {number}")
                stores[0].create(replace(parent, id=key.id, text=change(parent.text)))
            else:
                stores[0].update(key, partial(with_text, change))
            for store in stores:
                require_same(store.load(key).text, expected)
    finally:
        for store in stores:
            store.close()


def test_load__reads_records_of_version_1(store: RedisStore, redis: RedisProcess, client: Redis) -> None:
    """As the version before wrote it: header, states and text in one. Its settled text is another record's."""
    run = Run(3, 10, -5, replace(PLAIN, temperature=0.5), ("ab",), "xyz", "stop", 6)
    text = extended(Text(state(0)), characters(9_000))
    header = {
        "model": "m@1", "identity": "ab", "seed": 7, "ttl_s": 60.0, "created_at": 5.0, "shape": SHAPE, "start": 0,
        "ends": [4096, 8192], "run": asdict(run), "origin": "00ff",
    }  # fmt: skip
    head = json.dumps(header).encode()
    states = [state(at).tobytes() for at in (9_000, 4_096, 8_192)]
    store.create(session(num_chars=3_000))
    data = b"".join([struct.pack("<BI", 1, len(head)), head, *states, characters(9_000).encode()])
    client.hset("gru-serve:/a", mapping={"d": data, "n": b"another save", "r": 2})
    loaded = store.load(KEY)
    require_same(loaded.text, text)
    assert (loaded.run, loaded.origin, loaded.created_at) == (run, b"\0\xff", 5.0)
    assert store.page("", "", 9) == [loaded.summary]
    feed(store)
    with closing(new_store(redis.url)) as other:
        require_same(other.load(KEY).text, extended(text, "x"))


def test_segments__are_released_with_the_texts_that_have_them(store: RedisStore) -> None:
    """Their hashes are remembered for as long as the segments are in memory, and no longer."""
    store.create(session(num_chars=9_000))
    gc.collect()
    before = len(record._hashes)
    store._cache.drop(KEY)
    gc.collect()
    assert len(record._hashes) <= before - 2


def test_stored_segments__of_another_length_load(redis: RedisProcess) -> None:
    """A setting that changes the length of stored segments leaves old records as they are."""
    text = extended(Text(state(0)), characters(9_000))
    lengths = (4_096, 1_024, 2_048)
    for number, length in enumerate(lengths):
        with closing(RedisStore(RedisServer(redis.url, TIMEOUT_S, 0), length)) as store:
            if not number:
                store.create(replace(session(), text=text))
            require_same(store.load(KEY).text, text)
            text = extended(text, "x" * 3_000)
            feed(store, "x" * 3_000)
            require_same(store.load(KEY).text, text)
    assert isinstance(text.segments[0], Segment)

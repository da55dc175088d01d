"""Keys that have something else than the service stored there: each harms the sessions that need it, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis

from service.errors import SessionLost, StoreUnavailable
from service.sessions.session import Session, SessionKey
from service.sessions.text import Retention, Text
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import appended, characters, replicas, session, when_served
from tests.harness.wait import wait_until

A, B = SessionKey("", "a"), SessionKey("", "b")
LONG = "ROMEO:" * 1000  # more than one segment of 4,096 characters


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as process:
        yield process


def spoil(client: redis.Redis, pattern: str) -> None:
    """Store something else under all keys that match."""
    (*keys,) = client.scan_iter(pattern)
    assert keys
    for key in keys:
        client.delete(key)
        client.lpush(key, "something else")


@pytest.mark.parametrize(
    ("field", "value"),
    [("b", "x"), ("b", None), ("b", "9" * 15), ("n", None), ("x", "soon"), ("t", "x"), ("s", "x"), ("all", "list")],
)
def test_damaged_session__is_lost_and_alone(server: RedisProcess, field: str, value: str | None) -> None:
    with replicas(server.url, server.url) as (writer, reader), redis.Redis.from_url(server.url) as client:
        for key in (A, B):
            writer.create(session(key.id))
        if field == "all":
            spoil(client, "gru-serve:/a")
        elif value is None:
            client.hdel("gru-serve:/a", field)
        else:
            client.hset("gru-serve:/a", field, value)
        for store in (writer, reader):
            for call in (store.load, store.delete, lambda key, store=store: store.update(key, appended("x"))):
                with pytest.raises(SessionLost):
                    call(A)
            with pytest.raises(SessionLost):
                store.create(session("a"))
            assert [one.id for one in store.page("", "", 10)] == ["b"]
            store.update(B, appended("x"))
        assert characters(writer.load(B)) == "ROMEO:xx"


def long_session(session_id: str) -> Session:
    """Return a session whose text has a stored segment."""
    hidden, kept = np.zeros((1, 16), np.float32), Retention()
    empty = Text(hidden, 0, (), "")
    positions = kept.checkpoint_positions(0, len(LONG))
    text = empty.extended(LONG, hidden, dict.fromkeys(positions, hidden), kept)
    return replace(session(session_id), text=text)


def test_segment__with_something_else_in_its_place_costs_its_session_alone(server: RedisProcess) -> None:
    with replicas(server.url) as (writer,), redis.Redis.from_url(server.url) as client:
        writer.create(long_session("a"))
        writer.create(session("b"))
        spoil(client, "gru-serve:segment:*")
        with replicas(server.url) as (reader,):
            with pytest.raises(SessionLost):
                reader.load(A)
            assert characters(reader.load(B)) == "ROMEO:"  # the server does not count as failed
        server.kill()
        server.start()
        assert characters(when_served(lambda: writer.load(B))) == "ROMEO:"


@pytest.mark.parametrize("field", ["e", "i", "o", "m"])
def test_probe__with_a_damaged_field_is_written_anew(server: RedisProcess, field: str) -> None:
    with replicas(server.url, server.url) as stores, redis.Redis.from_url(server.url) as client:
        stores[0].create(session("a"))
        before = int(client.hget("gru-serve:probe", "e") or 0)
        client.hset("gru-serve:probe", field, "damaged")
        wait_until(lambda: client.hget("gru-serve:probe", field) != b"damaged")
        for store in stores:
            when_served(partial(store.update, A, appended("x"), idempotent=False))
        assert int(client.hget("gru-serve:probe", "e") or 0) >= before
        assert characters(stores[0].load(A)) == "ROMEO:xx"


def test_index__with_something_else_in_its_place_costs_lists_alone(server: RedisProcess) -> None:
    with replicas(server.url) as (store,), redis.Redis.from_url(server.url) as client:
        store.create(session("a"))
        spoil(client, "gru-serve:ids:*")
        with replicas(server.url) as (fresh,):
            fresh.create(session("b"))
            fresh.delete(A)
            with pytest.raises(StoreUnavailable):
                fresh.page("", "", 10)
            assert characters(fresh.load(B)) == "ROMEO:"  # the server does not count as failed
        store.load(B)
        server.kill()
        server.start()
        assert characters(when_served(lambda: store.load(B))) == "ROMEO:"
        client.delete("gru-serve:ids:")
        with suppress(SessionLost):
            store.create(session("c"))
        assert "c" in [one.id for one in store.page("", "", 10)]

"""Epochs in a cluster: a change of any master begins one, and all replicas and masters get to know it.

The replicas' threads look every 10 s only, so that a test decides when each one notices a restart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import pytest
import redis

from service.errors import StoreUnavailable
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import SessionKey
from tests.harness.redis_process import RedisProcess
from tests.harness.redis_stores import TIMEOUT_S, appended, characters, session
from tests.harness.redis_topologies import Cluster, admin_of, redis_cluster
from tests.harness.wait import wait_until

WINDOW_S = 0.2  # others are waited for four times as long


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with redis_cluster(directory, "--appendonly", "yes", "--appendfsync", "always", node_timeout_ms=30_000) as cluster:
        yield cluster


@contextmanager
def replicas(cluster: Cluster, count: int, window_s: float = WINDOW_S) -> Iterator[list[RedisStore]]:
    with ExitStack() as stack:
        stores = [
            stack.enter_context(
                closing(RedisStore(RedisServer(cluster.url, TIMEOUT_S, window_s), 4096, 2**20, lease_s=60))
            )
            for _ in range(count)
        ]
        open_again(*stores)
        yield stores


def look(store: RedisStore) -> bool:
    """Do what the store's thread does several times a second. Return whether the store serves calls."""
    with suppress(StoreUnavailable):
        if store._server.ping():
            store._renewer._restore()
        store.check()
        return True
    return False


def open_again(*stores: RedisStore) -> None:
    """Let all of these look at the cluster until all serve calls."""
    wait_until(lambda: False not in [look(store) for store in stores])


def restart(cluster: Cluster, master: RedisProcess) -> None:
    master.kill()
    master.start()
    wait_until(lambda: all(is_ok(node) for node in cluster.masters))


def is_ok(node: RedisProcess) -> bool:
    with admin_of(node) as client:
        return bool(client.cluster("info")["cluster_state"] == "ok")


def key_of(store: RedisStore, master: RedisProcess) -> str:
    return store._server._probe_key_on(("127.0.0.1", master.port))


def epochs(cluster: Cluster, store: RedisStore) -> list[bytes]:
    """Return what each master has as its epoch."""
    found = []
    for master in cluster.masters:
        with admin_of(master) as client:
            found.append(client.hget(key_of(store, master), "e"))
    return found


def test_epoch__begins_with_the_change_of_any_master(cluster: Cluster) -> None:
    with replicas(cluster, 2) as (one, other):
        before = one._server.epoch
        for master in cluster.masters:
            assert epochs(cluster, one) == [before] * 3
            restart(cluster, master)
            open_again(one, other)
            now = one._server.epoch
            assert now > before
            assert other._server.epoch == now
            before = now
        for _ in range(5):
            time.sleep(1.1 * WINDOW_S)
            assert look(one)
            assert look(other)
        assert one._server.epoch == before  # nothing changes if nothing happens


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_epoch__never_goes_back_after_a_master_has_lost_its_own(cluster: Cluster, victim: int) -> None:
    """Not even if a process notices it first that knows no epoch, and the clocks of the other masters are fast."""
    master = cluster.masters[victim]
    with replicas(cluster, 1) as (store,):
        fast = b"%016d" % (int(store._server.epoch) + 3600 * 10**6)
        for other in cluster.masters:
            if other is not master:
                with admin_of(other) as client:
                    client.hset(key_of(store, other), "e", fast)
        wait_until(lambda: look(store) and store._server.epoch == fast)
        assert epochs(cluster, store) == [fast] * 3
        with admin_of(master) as client:
            client.delete(key_of(store, master))
        restart(cluster, master)
        with closing(RedisServer(cluster.url, TIMEOUT_S, WINDOW_S)) as new:
            assert new.epoch > fast
            assert epochs(cluster, store) == [new.epoch] * 3
            open_again(store)
            assert store._server.epoch == new.epoch


def test_recovery__waits_for_a_replica_that_was_there(cluster: Cluster) -> None:
    """It has what one master lost; the others lost nothing, and refuse calls as well."""
    keys = [SessionKey("", f"waits{number}") for number in range(12)]
    with replicas(cluster, 2, 2.0) as (writer, other):  # it is waited for longer than a machine stalls
        for key in keys:
            writer.create(session(key.id))
        master = cluster.owner_of("gru-serve:/waits0")
        on_disk = master.on_disk()
        for key in keys:
            assert writer.update(key, appended("x")) == 7
        master.kill()
        master.lose_what_was_written_since(on_disk)
        master.start()
        wait_until(lambda: all(is_ok(node) for node in cluster.masters))
        began = time.monotonic()
        while time.monotonic() < began + 2 * WINDOW_S:
            assert not look(other)
        open_again(writer, other)
        assert [characters(other.load(key)) for key in keys] == ["ROMEO:x"] * 12


def test_recovery__does_not_wait_for_a_replica_that_reaches_only_some_masters(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(cluster, 2) as (cut_off, other):
        unreachable = ("127.0.0.1", cluster.masters[0].port)
        connect = cut_off._server._connections.connect

        def connect_to_some(address: tuple[str, int], *first: Any, **limits: Any) -> object:
            if address == unreachable:
                raise redis.ConnectionError
            return connect(address, *first, **limits)

        monkeypatch.setattr(cut_off._server._connections, "connect", connect_to_some)
        restart(cluster, cluster.masters[1])

        def is_open() -> bool:
            assert not look(cut_off)
            return look(other)

        wait_until(is_open)
        monkeypatch.undo()
        open_again(cut_off)
        assert cut_off._server.epoch == other._server.epoch

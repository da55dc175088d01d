"""A Redis that lost its last writes, and replicas that are slow, or stopped, or alone, when it recovers.

The replicas' threads look every 10 s only, so that a test decides when each one notices the restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from service.errors import GruServeError, RevisionConflict, SessionLost, SessionNotFound, StoreUnavailable
from service.sessions import lease_renewer, redis_server
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import SessionKey
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import TIMEOUT_S, appended, session, when_served
from tests.harness.wait import wait_until

A, B = SessionKey("", "a"), SessionKey("", "b")
WINDOW_S = 0.2  # others are waited for four times as long
ON_DISK = ("--appendonly", "yes", "--appendfsync", "always")


def text_of(store: RedisStore, key: SessionKey = A) -> str:
    loaded = store.load(key)
    return loaded.text.slice(0, loaded.position)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path, *ON_DISK) as process:
        yield process


@contextmanager
def replicas(
    server: RedisProcess, count: int, cache_bytes: int = 2**20, window_s: float = WINDOW_S
) -> Iterator[list[RedisStore]]:
    with ExitStack() as stack:
        stores = [
            stack.enter_context(
                closing(RedisStore(RedisServer(server.url, TIMEOUT_S, window_s), 4096, cache_bytes, lease_s=60))
            )
            for _ in range(count)
        ]
        open_again(*stores)
        yield stores


def restart(server: RedisProcess, on_disk: dict[Path, int]) -> None:
    """Kill the server and start it again with what was on its disk at a moment."""
    server.kill()
    server.lose_what_was_written_since(on_disk)
    server.start()


def look(store: RedisStore) -> bool:
    """Do what the store's thread does several times a second. Return whether the store serves calls."""
    with suppress(StoreUnavailable):
        if store._server.ping():
            store._renewer._restore()
        store.check()
        return True
    return False


def open_again(*stores: RedisStore) -> None:
    """Let all of these look at the server until all serve calls."""
    wait_until(lambda: False not in [look(store) for store in stores])


# A replica that was stopped while the others recovered


def test_recovery__waits_for_a_replica_that_was_there(server: RedisProcess) -> None:
    """It has what the server lost, and the others must not serve the older text."""
    with replicas(server, 3, window_s=2.0) as (writer, other, third):  # it is waited for longer than a machine stalls
        writer.create(session())
        on_disk = server.on_disk()
        assert writer.update(A, appended("x")) == 7
        restart(server, on_disk)
        began = time.monotonic()
        while time.monotonic() < began + 2 * WINDOW_S:
            assert not look(other)
            assert not look(third)
        open_again(writer, other, third)
        assert [text_of(store) for store in (writer, other, third)] == ["ROMEO:x"] * 3


def test_recovery__waits_for_no_replica_that_has_left_or_died(server: RedisProcess) -> None:
    long_s = 3.0  # a machine that stalls delays the end of the recovery, but not by twice this
    with replicas(server, 1, window_s=long_s) as (other,):
        with replicas(server, 1, window_s=long_s) as (leaving,):
            leaving.create(session())
        look(other)
        on_disk = server.on_disk()
        restart(server, on_disk)
        began = time.monotonic()
        open_again(other)
        assert time.monotonic() - began < 3 * long_s
    with replicas(server, 2) as (other, dead):
        restart(server, server.on_disk())
        began = time.monotonic()
        open_again(other)
        assert time.monotonic() - began > 3 * WINDOW_S
        assert not dead._server._is_recovering()  # it has noticed nothing


def test_late_replica__restores_what_nobody_has_changed_since(server: RedisProcess) -> None:
    with replicas(server, 2) as (late, other):
        late.create(session())
        other.load(A)
        on_disk = server.on_disk()
        assert late.update(A, appended("x")) == 7
        restart(server, on_disk)
        open_again(other)
        assert text_of(other) == "ROMEO:"  # nobody who is there can know
        open_again(late)
        assert [text_of(store) for store in (late, other)] == ["ROMEO:x"] * 2
        assert other.update(A, appended("y")) == 8
        assert late.update(A, appended("z")) == 9


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize(("num_lost", "num_later"), [(1, 1), (3, 1), (1, 3)])
def test_late_replica__overwrites_nothing_that_was_saved_since(
    server: RedisProcess, num_lost: int, num_later: int, cache_bytes: int
) -> None:
    """Whichever history is longer. Clients of the late replica get to know that their text is lost."""
    with replicas(server, 2, cache_bytes) as (late, other):
        late.create(session())
        on_disk = server.on_disk()
        for _ in range(num_lost):
            late.update(A, appended("x"))
        restart(server, on_disk)
        open_again(other)
        for _ in range(num_later):
            other.update(A, appended("y"))
        open_again(late)
        for call in (late.load, late.delete, partial(late.update, change=appended("z"))):
            with pytest.raises(SessionLost):
                call(A)
        assert text_of(other) == "ROMEO:" + num_later * "y"
        other.delete(A)
        late.create(session(characters="JULIET:"))
        assert [text_of(store) for store in (late, other)] == ["JULIET:"] * 2


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_late_replica__does_not_bring_back_what_was_deleted_or_made_anew(
    server: RedisProcess, cache_bytes: int
) -> None:
    with replicas(server, 2, cache_bytes) as (late, other):
        for session_id in "ab":
            late.create(session(session_id))
        on_disk = server.on_disk()
        for key in (A, B):
            for _ in range(5):
                late.update(key, appended("x"))
        late.delete(B)
        late.create(session("b", "LATE:"))
        restart(server, on_disk)
        open_again(other)
        other.delete(A)
        other.update(B, appended("y"))
        open_again(late)
        for store in (late, other):
            with pytest.raises(SessionNotFound):
                store.load(A)
        assert text_of(other, B) == "ROMEO:y"
        with pytest.raises(SessionLost):
            late.load(B)


def test_late_replica__cannot_save_with_the_lease_that_it_had(server: RedisProcess) -> None:
    with replicas(server, 2) as (late, other):
        late.create(session())
        on_disk = server.on_disk()
        lease, _ = late.begin(A, appended("x"))
        assert lease is not None
        is_ended = threading.Event()
        lease.on_takeover = is_ended.set
        restart(server, on_disk)
        open_again(other)
        assert other.update(A, appended("y")) == 7
        with pytest.raises(GruServeError) as caught:  # before its thread has noticed anything
            lease.save(appended("z")(lease.session)[0])
        assert caught.value.code in ("session_store_unavailable", "outcome_unknown")
        open_again(late)
        assert is_ended.wait(60)
        with pytest.raises(RevisionConflict):
            lease.save(appended("z")(lease.session)[0])
        assert text_of(other) == "ROMEO:y"


def test_late_replica__that_missed_two_recoveries_overwrites_nothing(server: RedisProcess) -> None:
    with replicas(server, 2) as (late, other):
        late.create(session())
        on_disk = server.on_disk()
        late.update(A, appended("x" * 3))
        late.update(A, appended("x" * 3))
        restart(server, on_disk)
        open_again(other)
        other.update(A, appended("y"))
        restart(server, server.on_disk())
        open_again(other)
        other.update(A, appended("z"))
        open_again(late)
        with pytest.raises(SessionLost):
            late.load(A)
        assert text_of(other) == "ROMEO:yz"


def test_recovery__with_a_save_whose_answer_was_lost_goes_on(server: RedisProcess) -> None:
    """The lease's next save finds out whether it was done, and doesn't do it again in another epoch."""
    with replicas(server, 1) as (one,):
        one.create(session())
        lease, _ = one.begin(A, appended("x"))
        assert lease is not None
        server.kill()
        with pytest.raises(GruServeError):
            lease.save(appended("y")(lease.session)[0])
        server.start()
        open_again(one)
        lease.save(appended("z")(lease.session)[0], release=True)
        assert text_of(one) == "ROMEO:xz"
        assert one.update(A, appended("!")) == 9


# A replica that is slow


def test_recovery__waits_for_a_replica_that_is_still_restoring(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes, while it makes progress."""
    monkeypatch.setattr(lease_renewer, "_BATCH", 1)
    with replicas(server, 2) as (slow, other):
        on_disk = server.on_disk()
        for number in range(7):
            slow.create(session(f"s{number}"))
        restore_batch = slow._renewer._restore_batch

        def slowly(*arguments: Any) -> None:
            restore_batch(*arguments)
            time.sleep(WINDOW_S)

        monkeypatch.setattr(slow._renewer, "_restore_batch", slowly)
        restart(server, on_disk)
        thread = threading.Thread(target=look, args=(slow,))
        thread.start()
        wait_until(lambda: slow._server._is_recovering())
        while thread.is_alive() and slow._server._has_to_restore():
            assert not look(other) or not slow._server._has_to_restore()
            time.sleep(0.02)
        thread.join()
        open_again(slow, other)
        assert len(other.page("", "", 100)) == 7


def test_recovery__waits_for_no_replica_that_cannot_restore(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "_MAX_RESTORE_S", 3 * WINDOW_S)
    with replicas(server, 2) as (broken, other):
        restart(server, server.on_disk())

        def look_in_vain() -> bool:
            broken._server.ping()
            return look(other)

        assert not look_in_vain()
        wait_until(look_in_vain)
        assert not look(broken) or not broken._server._has_to_restore()


def test_recovery__is_not_stopped_by_a_key_that_has_something_else(server: RedisProcess) -> None:
    with replicas(server, 1) as (one,), redis.Redis.from_url(server.url) as client:
        on_disk = server.on_disk()
        for session_id in "ab":
            one.create(session(session_id))
        server.kill()
        server.lose_what_was_written_since(on_disk)
        server.start()
        client.set("gru-serve:/a", "not a session")
        open_again(one)
        assert text_of(one, B) == "ROMEO:"


# Restarts, one after the other


def test_second_restart__loses_nothing_that_was_restored_after_the_first(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was restored is as new as any other write, although it was made long before."""
    monkeypatch.setattr(lease_renewer, "_AT_RISK_S", 0.5)
    with replicas(server, 1) as (one,):
        one.create(session())
        on_disk = server.on_disk()
        one.update(A, appended("x"))
        for _ in range(2):
            server.kill()
            time.sleep(0.6)  # longer than a write is at risk while the server works
            server.lose_what_was_written_since(on_disk)
            server.start()
            open_again(one)
        assert text_of(one) == "ROMEO:x"


def test_second_restart__during_recovery_begins_another_one(server: RedisProcess) -> None:
    with replicas(server, 2) as (one, other):
        on_disk = server.on_disk()
        one.create(session("a"))
        other.create(session("b"))
        epochs = {one._server.epoch}
        restart(server, on_disk)
        assert not look(one)
        epochs.add(one._server.epoch)
        restart(server, on_disk)
        assert not look(one)
        assert not look(one)
        epochs.add(one._server.epoch)
        open_again(one, other)
        assert len(epochs) == 3
        assert one._server.epoch == other._server.epoch == max(epochs)
        for store in (one, other):
            assert [text_of(store, key) for key in (A, B)] == ["ROMEO:"] * 2


def test_demotion__that_one_replica_saw_makes_all_recover(server: RedisProcess) -> None:
    """The server was a replica for a moment, and may have had the data of another one."""
    with replicas(server, 2) as (one, other), redis.Redis.from_url(server.url) as admin:
        one.create(session())
        admin.replicaof("127.0.0.1", "1")
        wait_until(lambda: not look(one))
        admin.replicaof("NO", "ONE")
        before = other._server.epoch
        open_again(one, other)
        assert before < one._server.epoch == other._server.epoch
        assert [text_of(store) for store in (one, other)] == ["ROMEO:"] * 2


@pytest.mark.parametrize("deletes", [False, True])
def test_replica__that_has_not_noticed_an_epoch_saves_in_it(server: RedisProcess, deletes: bool) -> None:
    """What it saves is later than what was saved in that epoch before."""
    with replicas(server, 2) as (one, other):
        one.create(session())
        begin_epoch(one, other)
        assert one.update(A, appended("x")) == 7
        assert text_of(other) == "ROMEO:x"
        other._server._epoch = other._server._restored_epoch = b"1" * 16  # as if it had noticed nothing
        if deletes:
            other.delete(A)
            other.create(session(characters="JULIET:"))
        else:
            assert other.update(A, appended("y")) == 8
        expected = text_of(other)
        begin_epoch(one, other)
        assert [text_of(store) for store in (one, other)] == [expected] * 2


def begin_epoch(*stores: RedisStore) -> None:
    """Do what a replica does that has seen the server as a replica for a moment, and recover."""
    stores[0]._server._left_epoch, stores[0]._server._probe_at = stores[0]._server.epoch, 0.0
    look(stores[0])
    for store in stores:
        store._server._probe_at = 0.0
    open_again(*stores)


def test_long_outage__restores_over_older_saves_only(server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage that is longer than deletions are remembered, an absent session may have been deleted."""
    monkeypatch.setattr(lease_renewer, "_REMEMBERED_S", 0.0)
    with replicas(server, 1) as (one,):
        one.create(session("a"))
        on_disk = server.on_disk()
        one.update(A, appended("x"))
        one.create(session("b"))
        restart(server, on_disk)
        open_again(one)
        assert text_of(one) == "ROMEO:x"
        with pytest.raises(SessionNotFound):
            when_served(lambda: one.load(B))  # it is looked for once more, after another probe


def test_reader__restores_what_it_read_if_the_writer_is_dead(server: RedisProcess) -> None:
    with replicas(server, 2) as (reader, third):
        with replicas(server, 1) as (writer,):
            writer.create(session())
            on_disk = server.on_disk()
            writer.update(A, appended("x"))
            assert text_of(reader) == "ROMEO:x"
        restart(server, on_disk)
        open_again(third, reader)
        assert [text_of(store) for store in (reader, third)] == ["ROMEO:x"] * 2


@pytest.mark.parametrize("sees", [RedisStore.load, RedisStore.delete])
def test_reader__restores_a_deletion_that_it_has_seen(server: RedisProcess, sees: Callable[..., Any]) -> None:
    """A caller that was told that a session is deleted never meets it again."""
    with replicas(server, 2) as (one, other):
        one.create(session())
        on_disk = server.on_disk()
        with replicas(server, 1) as (deleting,):
            deleting.delete(A)
            with suppress(SessionNotFound):
                sees(other, A)
        assert len(other) == 0
        restart(server, on_disk)
        open_again(one, other)
        for store in (one, other):
            with pytest.raises(SessionNotFound):
                store.load(A)


def test_history__is_known_over_many_restarts(server: RedisProcess) -> None:
    """A copy that is older than all epochs which the server lists is an older copy, and not a lost one."""
    with replicas(server, 2) as (one, other):
        one.create(session())
        other.load(A)
        for number in range(10):
            assert one.update(A, appended("x")) == 7 + number
            restart(server, server.on_disk())
            open_again(one, other)
        with redis.Redis.from_url(server.url) as client:
            assert len(client.hget("gru-serve:/a", "h").split()) <= 8
        assert text_of(other) == "ROMEO:" + 10 * "x"
        assert other.update(A, appended("y")) == 17


# Cached copies


def test_cache__forgets_what_others_have_deleted(server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_renewer, "_SWEEP_S", 0.0)
    with replicas(server, 2) as (one, other):
        for number in range(120):
            other.create(session(f"s{number}"))
            one.load(SessionKey("", f"s{number}"))
        for number in range(119):
            other.delete(SessionKey("", f"s{number}"))
        one._renewer._next_sweep = 0.0

        def is_forgotten() -> bool:
            one._renewer._sweep()
            return len(one) == 1

        wait_until(is_forgotten)
        assert text_of(one, SessionKey("", "s119")) == "ROMEO:"


def test_expirations__are_counted_once_by_the_process_that_saved_last(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_renewer, "_SWEEP_S", 0.0)
    with replicas(server, 2) as (one, other):
        one.create(session("kept"))
        one.create(replace(session("short"), ttl_s=1))
        other.update(SessionKey("", "short"), appended("x"))
        other.create(replace(session("deleted"), ttl_s=1))
        one.load(SessionKey("", "deleted"))
        one.delete(SessionKey("", "deleted"))

        def are_forgotten() -> bool:
            for store in (one, other):
                store._renewer._sweep()
            return (len(one), len(other)) == (1, 0)

        wait_until(are_forgotten)
        assert (one.num_expired, other.num_expired) == (0, 1)

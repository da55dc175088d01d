"""Redis servers that restart, lose writes, are full, or whose clock steps back, and answers that get lost.

Nothing that was acknowledged is lost unless its client gets to know it, and nothing that was deleted comes back.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from service.errors import (
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
from service.sessions.session import SessionKey
from service.sessions.session_store import Operation, SessionStore
from tests.harness.clock import Clock
from tests.harness.lossy_proxy import lossy_proxy
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import LEASE_S, appended, characters, replicas, session, when_served
from tests.harness.wait import wait_until

Answer = TypeVar("Answer")
A, B = SessionKey("", "a"), SessionKey("", "b")
ON_DISK = ("--appendonly", "yes", "--appendfsync", "always")  # a restart loses nothing unless the test truncates files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path, *ON_DISK) as process:
        yield process


def restart(server: RedisProcess, *, lose_since: dict[Path, int] | None = None) -> None:
    """Kill the server and start it again. lose_since: what was on the disk at the last moment that it remembers."""
    server.kill()
    if lose_since is not None:
        server.lose_what_was_written_since(lose_since)
    server.start()


def wait_for_recovery(*stores: SessionStore) -> None:
    """Wait until each replica has noticed the restart and has restored what it wrote."""
    for store in stores:
        with suppress(SessionNotFound):
            when_served(partial(store.load, SessionKey("", "no such session")))


def recover(store: RedisStore) -> None:
    """Do what the store's own thread does after a restart, now. With leases of 60 s it looks every 10 s only."""
    assert when_served(store._server.ping)
    store._renewer._restore()


def is_open(store: RedisStore) -> bool:
    """Return whether the store serves calls, after it has looked whether all others have restored."""
    try:
        assert not store._server.ping()
        store.check()
    except StoreUnavailable:
        return False
    return True


def open_again(*stores: RedisStore) -> None:
    """Wait until stores that have restored serve calls: for others for four recovery windows, which are 0.3 s each."""
    for store in stores:
        wait_until(partial(is_open, store))


def calls_of_a(server: RedisServer) -> Callable[..., list[Any]]:
    """Return a function that runs an operation of session.lua on session A, with a longest lease of 1 s."""
    return lambda operation, *arguments: server.call_all([(operation, "gru-serve:/a", "", 1000, *arguments)])[0]


# A restart that loses nothing


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_clean_restart__deletes_no_session(server: RedisProcess, cache_bytes: int) -> None:
    """Neither one that its writer no longer has in its cache, nor one that another replica wrote last."""
    with replicas(server.url, server.url, cache_bytes=cache_bytes) as (one, other):
        for session_id in "ab":
            one.create(session(session_id))
        one.update(A, appended("x"))
        other.update(B, appended("y"))
        one.load(B)  # then its cached copy isn't the save in its journal
        before = {key: one.load(key).revision for key in (A, B)}
        restart(server)
        wait_for_recovery(one, other)
        for store in (one, other):
            assert {key: store.load(key).revision for key in (A, B)} == before
            assert [characters(store.load(key)) for key in (A, B)] == ["ROMEO:x", "ROMEO:y"]
        assert other.update(A, appended("z")) == one.update(B, appended("z")) == 8


def test_clean_restart__deletes_no_session_that_was_read_while_it_was_written(server: RedisProcess) -> None:
    """The answer to the read arrives last; the save before it must not replace the later one in the cache."""
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        other.update(A, appended("x"))
        proxy.delay_answer("load", lambda: one.update(A, appended("y")))
        assert characters(one.load(A)) == "ROMEO:x"
        assert proxy.num_intercepted == 1
        restart(server)
        wait_for_recovery(one, other)
        for store in (one, other):
            assert characters(store.load(A)) == "ROMEO:xy"


# Deleted sessions


def test_deleted_session__does_not_come_back_after_a_clean_restart(server: RedisProcess) -> None:
    """Even if the replica that deleted it is no longer there: the server itself remembers."""
    with replicas(server.url) as (one,):
        one.create(session())
        one.update(A, appended("x"))
        with replicas(server.url) as (other,):
            other.delete(A)
        restart(server)
        wait_for_recovery(one)
        with pytest.raises(SessionNotFound):
            one.load(A)
        assert one.page("", "", 9) == []


def test_deleted_session__does_not_come_back_from_an_old_journal(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long after its deletion, when Redis has forgotten it as well."""
    with replicas(server.url) as (one,):
        one.create(session())
        with replicas(server.url) as (other,):
            other.delete(A)
        deleted_at = time.monotonic()
        wait_until(lambda: one._renewer._last_contact > deleted_at)
        monkeypatch.setattr(lease_renewer, "_AT_RISK_S", 0.0)  # every write is now longer ago than this
        with redis.Redis.from_url(server.url) as client:
            client.flushall()  # what Redis does 10 minutes after the deletion
        restart(server)
        wait_for_recovery(one)
        with pytest.raises(SessionNotFound):
            one.load(A)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("loses", ["deletion", "last save and deletion", "all"])
def test_deleted_session__does_not_come_back_if_its_deletion_was_lost(
    server: RedisProcess, loses: str, first: int
) -> None:
    """Whichever replica restores first: the one that wrote it last, or the one that deleted it."""
    with replicas(server.url, server.url, lease_s=60) as (one, other):
        on_disk = {"all": server.on_disk()}
        one.create(session())
        on_disk["last save and deletion"] = server.on_disk()
        one.update(A, appended("x"))
        on_disk["deletion"] = server.on_disk()
        other.delete(A)
        restart(server, lose_since=on_disk[loses])
        for store in (one, other) if first == 0 else (other, one):
            recover(store)
        open_again(one, other)
        for store in (one, other):
            with pytest.raises(SessionNotFound):
                store.load(A)


# Histories that parted at equal revisions


def test_lost_lease__cannot_save_over_what_another_replica_did_again(server: RedisProcess) -> None:
    """A restart lost a save, and another replica did the same again: the revisions are equal, the saves are not."""
    with replicas(server.url) as (one,), closing(RedisServer(server.url, recovery_window_s=0)) as raw:
        one.create(session())

        call = calls_of_a(raw)
        _, incarnation, revision, nonce, _, record = call("load", b"", 0, b"")
        known = (incarnation, int(revision), nonce)
        on_disk = server.on_disk()
        assert call("lease", *known, b"lost lease", 60_000, 0)[0] == b"ok"
        assert call("save", b"lost lease", *known, b"lost save", record, 60_000, 60_000)[0] == b"ok"
        restart(server, lose_since=on_disk)
        assert when_served(lambda: raw.ping() or True)
        assert call("claim", *known, b"other lease", b"same again", record, 60_000, "")[0] == b"ok"
        lost = (incarnation, 2, b"lost save")
        assert call("renew", b"lost lease", *lost, 60_000, 1) == [b"lost"]
        assert call("renew", b"lost lease", *lost, 60_000, 0) == [b"lost"]
        assert call("save", b"lost lease", *lost, b"overwriting", record, 60_000, "") == [b"conflict"]
        assert call("claim", *lost, b"token", b"overwriting", record, 60_000, "") == [b"conflict"]
        assert call("load", *lost) == [b"lost"]
        assert call("lease", *lost, b"token", 60_000, 0) == [b"lost"]
        assert call("load", b"", 0, b"")[3] == b"same again"


def test_lost_lease__ends_the_run_of_its_holder(server: RedisProcess) -> None:
    with replicas(server.url, server.url, lease_s=60) as (one, other):
        one.create(session())
        on_disk = server.on_disk()
        lease, _ = one.begin(A, appended("x"))
        assert lease is not None
        is_ended = threading.Event()
        lease.on_takeover = is_ended.set
        restart(server, lose_since=on_disk)
        recover(other)
        open_again(other)
        assert other.update(A, appended("y")) == 7
        recover(one)
        open_again(one)
        assert is_ended.wait(60)
        with pytest.raises(RevisionConflict):
            lease.save(appended("z")(lease.session)[0])
        with pytest.raises(SessionLost):
            one.load(A)
        assert characters(other.load(A)) == "ROMEO:y"


def test_parted_lease__cannot_save_even_if_it_has_the_token(server: RedisProcess) -> None:
    """The server remembers the lease but not its last save, and has another one at that revision."""
    with closing(RedisServer(server.url, recovery_window_s=0)) as raw:
        call = calls_of_a(raw)
        _, incarnation, *_ = call("create", b"created", b"record", 60_000)
        assert call("lease", incarnation, 1, b"created", b"token", 900, 0)[0] == b"ok"
        assert call("save", b"token", incarnation, 1, b"created", b"one", b"record 1", 60_000, 900)[0] == b"ok"
        assert call("save", b"token", incarnation, 2, b"other", b"two", b"record 2", 60_000, 900) == [b"conflict"]
        assert call("renew", b"token", incarnation, 2, b"other", 900, 1) == [b"lost"]
        assert call("save", b"token", incarnation, 2, b"one", b"two", b"record 2", 60_000, 900)[0] == b"ok"


# A lost write that nobody can restore


def test_lost_write__of_a_record_that_nobody_has_is_reported_as_lost(server: RedisProcess) -> None:
    """Older text must not be served, and a client that made it must not think that it was deleted."""
    with replicas(server.url, server.url, cache_bytes=0) as (one, other):
        one.create(session())
        on_disk = server.on_disk()
        assert one.update(A, appended("x")) == 7
        restart(server, lose_since=on_disk)
        wait_for_recovery(one, other)
        for store in (one, other):
            with pytest.raises(SessionLost):
                store.load(A)
            with pytest.raises(SessionLost):
                store.update(A, appended("y"))
            with pytest.raises(SessionLost):
                store.delete(A)
        assert one.page("", "", 9) == []


def test_lost_write__is_restored_from_the_writers_cache(server: RedisProcess) -> None:
    with replicas(server.url, server.url) as (one, other):
        one.create(session())
        on_disk = server.on_disk()
        assert one.update(A, appended("x")) == 7
        one.create(session("b"))
        restart(server, lose_since=on_disk)
        wait_for_recovery(one, other)
        for store in (one, other):
            assert [characters(store.load(key)) for key in (A, B)] == ["ROMEO:x", "ROMEO:"]
        assert other.update(A, appended("y")) == 8


# A server that is full


def test_server_that_forgets_everything__is_restored_before_a_session_counts_as_missing(server: RedisProcess) -> None:
    """Also at a replica that has never met the session."""
    stores = replicas(server.url, server.url, recovery_window_s=2)  # longer than until the next probe of each
    with stores as (one, other), redis.Redis.from_url(server.url) as client:
        one.create(session())
        one.update(A, appended("x"))
        due = other._server._probe_at
        wait_until(lambda: other._server._probe_at > due)  # the next one is due in a second
        client.flushall()
        for store in (other, one):
            for call in (
                partial(store.page, "", "", 9),
                partial(store.load, A),
                partial(store.update, A, appended("y")),
                partial(store.delete, A),
            ):
                with pytest.raises(StoreUnavailable):
                    call()
        for store in (other, one):
            assert characters(when_served(partial(store.load, A))) == "ROMEO:x"
            assert [each.id for each in when_served(partial(store.page, "", "", 9))] == ["a"]


def test_session_that_the_server_alone_has_lost__counts_as_missing(server: RedisProcess) -> None:
    with replicas(server.url) as (one,), redis.Redis.from_url(server.url) as client:
        one.create(session())
        for key in client.scan_iter("*/a"):
            client.delete(key)
        with pytest.raises(SessionNotFound):
            one.load(A)
        one.create(session("a", "anew"))
        assert characters(one.load(A)) == "anew"


def used_memory(server: RedisProcess) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("memory")["used_memory"])


def fill(store: SessionStore, prefix: str = "s") -> int:
    """Create sessions until there is no room; return how many were created."""
    for number in range(10_000):
        try:
            store.create(session(f"{prefix}{number}", f"{number:05d}" * 4000))  # equal texts would share memory
        except Overloaded:
            return number
    raise AssertionError("the server is never full")


MAX_BYTES = 5 * 2**20


@pytest.fixture
def full(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server with little memory, which a test fills."""
    with redis_process(
        tmp_path, *ON_DISK, "--maxmemory", str(MAX_BYTES), "--maxmemory-policy", "noeviction"
    ) as process:
        yield process


def test_full_server__refuses_new_sessions_at_its_limit(full: RedisProcess) -> None:
    with replicas(full.url) as (one,):
        num_created = fill(one)
        assert num_created > 50
        for number in range(200):  # hardly one of them fits into what the first one that was refused has given back
            with suppress(Overloaded):
                one.create(session(f"more{number}", f"{number:04d}+" * 4000))
                num_created += 1
        assert used_memory(full) < MAX_BYTES * 1.1
        one.check()  # it is not the server's absence
        assert len(one.page("", "", 10_000)) == num_created < 250


def test_full_server__goes_on_with_the_sessions_that_it_has(full: RedisProcess) -> None:
    with replicas(full.url, full.url) as (one, other):
        fill(one)
        keys = [SessionKey("", f"s{number}") for number in range(6)]
        assert one.update(keys[0], appended("y")) == 20_001
        assert other.update(keys[0], appended("z")) == 20_002
        assert other.update(keys[0], lambda one: (one, one.position)) == 20_002  # takes the lease and releases it
        lease, _ = one.begin(keys[1], appended("y"))
        assert lease is not None
        with redis.Redis.from_url(full.url) as client:
            first = client.hget("gru-serve:/s1", "u")
            wait_until(lambda: client.hget("gru-serve:/s1", "u") != first)  # it is renewed
        with pytest.raises(SessionBusy):
            other.update(keys[1], appended("z"))
        lease.save(appended("z")(lease.session)[0])
        lease.release()
        assert other.load(keys[1]).position == 20_002
        with pytest.raises(Overloaded):
            one.create(session("new", "x" * 20_000))
        for number in range(30):  # more than the buffers of connections take, which come and go
            other.delete(SessionKey("", f"s{number}"))
        one.create(session("new", "x" * 20_000))
        assert one.load(SessionKey("", "new")).position == 20_000


def test_full_server__recovers_from_a_restart(full: RedisProcess) -> None:
    with replicas(full.url) as (one,):
        fill(one)
        on_disk = full.on_disk()
        assert one.update(SessionKey("", "s0"), appended("y")) == 20_001
        restart(full, lose_since=on_disk)
        wait_for_recovery(one)
        assert one.load(SessionKey("", "s0")).position == 20_001
        assert one.update(SessionKey("", "s1"), appended("y")) == 20_001
        fill(one, "more")
        for number in range(20):
            one.delete(SessionKey("", f"s{number}"))
        assert fill(one, "new") > 5


# Answers that are lost


def test_lost_answer__of_an_update_that_was_done_is_asked_for_again(server: RedisProcess) -> None:
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        one.update(A, appended("x"))
        proxy.lose_answer("claim")
        assert one.update(A, appended("y")) == 8
        assert proxy.num_intercepted == 1
        assert characters(other.load(A)) == "ROMEO:xy"


def test_lost_answer__of_an_update_that_another_followed_is_an_unknown_outcome(server: RedisProcess) -> None:
    """The repeated attempt finds another save. To answer that nothing has changed would make the client feed again."""
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        one.update(A, appended("x"))
        proxy.lose_answer("claim", lambda: other.update(A, appended("z")))
        with pytest.raises(OutcomeUnknown):
            one.update(A, appended("y"))
        assert proxy.num_intercepted == 1
        assert characters(one.load(A)) == "ROMEO:xyz"
        proxy.lose_answer("claim", lambda: other.update(A, appended("z")))
        with pytest.raises(StoreUnavailable):  # idempotent: repeating it is harmless
            one.update(A, lambda session: (replace(session, seed=8), None), idempotent=True)
        assert proxy.num_intercepted == 2


@pytest.mark.parametrize("release", [False, True])
def test_lost_answer__of_a_save_that_another_followed_is_an_unknown_outcome(
    server: RedisProcess, release: bool
) -> None:
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        lease, _ = one.begin(A, appended("x"))
        assert lease is not None
        lease.save(appended("y")(lease.session)[0])

        def followed() -> None:
            if not release:
                with redis.Redis.from_url(server.url) as client:
                    client.hset("gru-serve:/a", "u", 0)  # the lease has run out
            other.update(A, appended("!"))

        proxy.lose_answer("save", followed)
        with pytest.raises(OutcomeUnknown):
            lease.save(appended("z")(lease.session)[0], release=release)
        assert proxy.num_intercepted == 1
        lease.release()
        assert characters(one.load(A)) == "ROMEO:xyz!"
        assert one.update(A, appended("?")) == 11  # not leased


def test_lost_answer__of_a_deletion_that_was_done_is_asked_for_again(server: RedisProcess) -> None:
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        for _ in range(2):
            one.create(session())
            proxy.lose_answer("delete")
            one.delete(A)
            with pytest.raises(SessionNotFound):
                other.load(A)
        assert proxy.num_intercepted == 2


def test_lost_answer__of_a_deletion_and_of_its_repetition_is_safe_to_repeat(server: RedisProcess) -> None:
    """The caller may delete again, and gets to know that it is done."""
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        proxy.lose_answer("delete", lambda: proxy.lose_answer("delete"))
        with pytest.raises(StoreUnavailable):
            one.delete(A)
        assert proxy.num_intercepted == 2
        when_served(partial(one.delete, A))
        other.delete(A)
        for store in (one, other):
            with pytest.raises(SessionNotFound):
                store.load(A)


def test_lost_answer__of_a_creation_that_was_done_is_asked_for_again(server: RedisProcess) -> None:
    with lossy_proxy(server.url) as proxy, replicas(proxy.url, server.url) as (one, other):
        one.create(session())
        proxy.lose_answer("create")
        assert one.create(session("b")).revision == 1
        assert proxy.num_intercepted == 1

        def create_anew() -> None:
            other.delete(SessionKey("", "c"))
            other.create(session("c"))

        proxy.lose_answer("create", create_anew)
        with pytest.raises(OutcomeUnknown):
            one.create(session("c"))


# Connections that were closed while nobody used them


def test_idle_connection__that_was_closed_is_not_used(server: RedisProcess) -> None:
    """By the server, its administrator or a proxy. What the calls answer is the same as without that."""
    with replicas(server.url, server.url, lease_s=60) as (one, other), redis.Redis.from_url(server.url) as admin:
        one.create(session())

        def close_connections() -> None:
            admin.client_kill_filter(_type="normal", skipme=True)
            wait_until(lambda: len(admin.client_list()) == 1)

        other.update(A, appended("x"))
        close_connections()
        assert one.update(A, appended("y")) == 8  # its copy was stale: a conflict
        close_connections()
        with pytest.raises(SessionExists):
            one.create(session())
        lease, _ = one.begin(A, appended("z"))
        assert lease is not None
        admin.hset("gru-serve:/a", "u", 0)
        other.update(A, appended("!"))
        close_connections()
        with pytest.raises(RevisionConflict):
            lease.save(appended("?")(lease.session)[0])
        close_connections()
        one.delete(A)
        close_connections()
        one.create(session())
        one.check()
        assert characters(other.load(A)) == "ROMEO:"


# A clock that steps back


def test_clock_set_back__ends_the_lease_of_a_dead_replica_in_its_own_time(server: RedisProcess, clock: Clock) -> None:
    with replicas(server.url, clock=clock) as (other,):
        with replicas(server.url, clock=clock) as (dead,):
            dead.create(session())
            lease, _ = dead.begin(A, appended("x"))
            assert lease is not None
        with pytest.raises(SessionBusy):
            other.update(A, appended("y"))
        clock.now -= 20
        clock.now += LEASE_S
        assert other.update(A, appended("y")) == 8


def test_clock_set_back__serves_a_session_that_was_made_anew(server: RedisProcess) -> None:
    """Its incarnation is greater than that of the one before, which was created when the clock was ahead."""
    with replicas(server.url, server.url) as (one, other), closing(RedisServer(server.url, recovery_window_s=0)) as raw:
        one.create(session())

        call = calls_of_a(raw)
        _, incarnation, revision, nonce, _, record = call("load", b"", 0, b"")
        ahead = b"%016d" % (int(incarnation[:16]) + 20_000_000) + incarnation[16:]
        assert call("restore", ahead, int(revision), nonce[:16] + nonce[:15:-1], record, 600_000, 600_000) == [b"ok"]
        assert characters(one.load(A)) == "ROMEO:"
        other.delete(A)
        other.create(session(characters="JULIET:"))
        assert [characters(store.load(A)) for store in (one, other)] == ["JULIET:", "JULIET:"]
        assert one.update(A, appended("x")) == 8
        assert call("load", b"", 0, b"")[1] > ahead


# What an operator sees


class Failures(Counter[str]):
    """Counts the failures of calls by their operation."""

    def observe(self, operation: Operation, duration_s: float) -> None:
        """See StoreObserver."""

    def count_failure(self, operation: Operation) -> None:
        self[operation] += 1


def test_failures__are_counted_throughout_an_outage(server: RedisProcess) -> None:
    """Also those of calls that are refused without asking the server, and, while nobody calls, those of pings."""
    failures = Failures()
    with closing(RedisStore(RedisServer(server.url, observer=failures), 4096)) as store:
        when_served(partial(store.create, session()))
        failures.clear()
        assert store.load(A).position == 6
        assert failures == {}
        server.kill()
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                store.load(A)
        assert failures["load"] == 5
        pings = failures["ping"]
        wait_until(lambda: failures["ping"] >= pings + 3)

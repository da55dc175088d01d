"""Sessions with Sentinels, in a cluster, and by TLS: real servers that fail, move and refuse."""

from __future__ import annotations

import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from service.errors import OutcomeUnknown, SessionNotFound, StoreUnavailable
from service.sessions import redis_server
from service.sessions.redis_connections import RedisConnections
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.redis_url import parse
from service.sessions.session import SessionKey
from tests.harness.certificates import Authority
from tests.harness.programs import free_port
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import TIMEOUT_S, appended, characters, replicas, session, when_served
from tests.harness.redis_topologies import (
    SERVICE,
    SentinelGroup,
    SentinelProcess,
    admin_of,
    move_slot,
    redis_cluster,
    sentinel_group,
    stop_replicating,
)
from tests.harness.wait import wait_until

MANY = [SessionKey("", f"s{number}") for number in range(30)]  # more than enough for every master to have some


def is_refusing(store: RedisStore) -> bool:
    return not is_open(store._server)


def advice_of(url: str) -> str:
    """Return what a process that starts with this URL logs, and what /readyz answers."""
    with (
        capture_logs() as logs,
        closing(RedisServer(url, timeout_s=1)) as server,
        pytest.raises(StoreUnavailable) as caught,
    ):
        server.check(explain=True)
    assert "a-password" not in f"{logs}{caught.value}"
    (line,) = logs
    assert line["advice"] in str(caught.value)
    return str(line["advice"])


# Sentinels


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with sentinel_group(tmp_path_factory.mktemp("sentinels")) as group:
        yield group


def test_sentinels__lead_to_the_new_master_and_no_acknowledged_write_is_lost(group: SentinelGroup) -> None:
    """The master dies, and its successor lacks the last writes: their writers restore them."""
    with replicas(group.url, group.url) as (one, other):
        for key in MANY:
            one.create(session(key.id))
        old = group.master()
        stop_replicating(old)
        for number, key in enumerate(MANY):
            (one, other)[number % 2].update(key, appended("x"))
        one.create(session("late"))
        old.kill()
        for number, key in enumerate(MANY):
            assert characters(when_served(partial((other, one)[number % 2].load, key))) == "ROMEO:x"
        assert characters(other.load(SessionKey("", "late"))) == "ROMEO:"
        assert one.update(MANY[0], appended("y")) == other.update(MANY[1], appended("y")) == 8
        assert group.master() is not old
        old.start()  # its Sentinels make it a replica
        group.wait_until_whole()
        assert [characters(store.load(MANY[0])) for store in (one, other)] == ["ROMEO:xy"] * 2
        for key in (*MANY, SessionKey("", "late")):
            when_served(partial(one.delete, key))


def test_sentinels__orderly_failover_under_writes_loses_none(group: SentinelGroup) -> None:
    """The old master accepts writes until it becomes a replica, seconds later; and one of the Sentinels hangs."""
    group.wait_until_whole()
    hanging, key, num_written = group.sentinels[0], SessionKey("", "a"), 0
    with replicas(group.url, group.url) as stores:
        stores[0].create(session())
        old, changes = group.master(), [store._server._change for store in stores]

        def write() -> bool:
            """Write with each store; return whether both have noticed the failover."""
            nonlocal num_written
            for store in stores:
                now_written = when_served(partial(store.update, key, appended("x"), idempotent=True)) - 6
                assert num_written < now_written
                num_written = now_written
            return all(store._server._change > change for store, change in zip(stores, changes, strict=True))

        hanging.send(signal.SIGSTOP)
        try:
            stores[0]._server.ping()
            began = time.monotonic()
            for _ in range(20):  # it is not waited for each time, so that leases are renewed in time
                stores[0]._server._connections.discover()
            assert time.monotonic() - began < 4 * TIMEOUT_S  # each wait for it takes as long as a call may
            group.fail_over()
            wait_until(write)
        finally:
            hanging.send(signal.SIGCONT)
        assert group.master() is not old
        for _ in range(10):
            write()
        assert [characters(store.load(key)) for store in stores] == ["ROMEO:" + "x" * num_written] * 2
        with admin_of(group.master()) as client:
            assert client.hget("gru-serve:/a", "r") == b"%d" % stores[0].load(key).revision
        group.wait_until_whole()
        assert stores[0].load(key).position == 6 + num_written
        # They never went back, not even when the Sentinel that hung woke up with what it knew.
        assert [store._server._change for store in stores] == [change + 1 for change in changes]
        stores[0].delete(key)


def test_sentinels__are_told_apart_from_what_is_wrong(group: SentinelGroup) -> None:
    ports = [sentinel.port for sentinel in group.sentinels]
    assert "no master of the name" in advice_of(f"redis+sentinel://127.0.0.1:{ports[0]}/another")
    assert "no Sentinel's" in advice_of(f"redis+sentinel://127.0.0.1:{group.servers[0].port}/{SERVICE}")
    login = "sentinel_username=someone&sentinel_password=a-password"
    assert "sentinel_password" in advice_of(f"redis+sentinel://127.0.0.1:{ports[0]}/{SERVICE}?{login}")
    login = "redis+sentinel://someone:a-password@"
    assert "correct the user and the password" in advice_of(f"{login}127.0.0.1:{ports[0]}/{SERVICE}")
    with closing(RedisServer(f"redis+sentinel://127.0.0.1:{free_port()}/{SERVICE}")) as server:
        assert not is_open(server)
    # One that can't be reached is no obstacle.
    with closing(RedisServer(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{ports[1]}/{SERVICE}")) as server:
        wait_until(lambda: is_open(server))


def is_open(server: RedisServer) -> bool:
    with suppress(StoreUnavailable):
        server.check()
        return True
    return False


class SentinelStandIn(socketserver.ThreadingTCPServer):
    """Answers like a Sentinel with a configuration of this epoch. A real one has an old one for milliseconds only."""

    daemon_threads = True

    def __init__(self, epoch: int, master_port: int) -> None:
        self.state = [b"config-epoch", b"%d" % epoch]
        self.address = [b"127.0.0.1", b"%d" % master_port]
        super().__init__(("127.0.0.1", 0), _AnsweringAsSentinel)

    @property
    def host(self) -> str:
        """Its address, for a URL."""
        return f"127.0.0.1:{self.server_address[1]}"


class _AnsweringAsSentinel(socketserver.BaseRequestHandler):
    server: SentinelStandIn

    def handle(self) -> None:
        while data := self.request.recv(4096):
            if b"SETNAME" in data:
                self.request.sendall(b"+OK\r\n")
            if b"GET-MASTER" in data:  # sent together with the question for the state
                for words in (self.server.state, self.server.address):
                    self.request.sendall(b"*2\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))


@contextmanager
def sentinel_stand_in(epoch: int, master_port: int) -> Iterator[SentinelStandIn]:
    with SentinelStandIn(epoch, master_port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_sentinels__that_disagree_are_told_by_the_epoch() -> None:
    """Wherever in the URL the one is that knows the latest failover."""
    with sentinel_stand_in(7, 1007) as late, sentinel_stand_in(6, 1006) as early, sentinel_stand_in(5, 1005) as earlier:
        for order in permutations([late, early, earlier]):
            url = f"redis+sentinel://{','.join(sentinel.host for sentinel in order)}/{SERVICE}"
            with closing(RedisConnections(parse(url), 1)) as connections:
                assert connections.discover() == [("127.0.0.1", 1007)]
                assert connections.address_of("any key") == ("127.0.0.1", 1007)


def test_sentinels__have_passwords_of_their_own(tmp_path: Path) -> None:
    with ExitStack() as ending:
        master = ending.enter_context(redis_process(tmp_path))
        with admin_of(master) as client:
            client.execute_command("ACL", "SETUSER", "sessions", "on", ">one-password", "~*", "+@all")
        settings = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1\n"
            "user sentinels on >other-password +sentinel|master +sentinel|get-master-addr-by-name +client|setname\n"
        )
        sentinel = SentinelProcess(tmp_path, settings)
        ending.callback(sentinel.send, signal.SIGKILL)
        sentinel.start()
        url = f"redis+sentinel://sessions:one-password@127.0.0.1:{sentinel.port}/{SERVICE}/2"
        login = "?sentinel_username=sentinels&sentinel_password=other-password"
        with replicas(url + login) as (store,):
            store.create(session())
        with redis.Redis("127.0.0.1", master.port, db=2) as client:
            assert client.exists("gru-serve:/a")


# A cluster


def test_cluster__spreads_sessions_and_leaves_their_keys_as_with_one_server(redis_cluster_url: str) -> None:
    """So that a tool that copies keys can move sessions from a server to a cluster."""
    with replicas(redis_cluster_url) as (store,):
        for key in MANY:
            store.create(session(key.id))
        found: dict[int, set[bytes]] = {}
        for address in store._server._run_ids:
            with redis.Redis(*address) as client:
                found[address[1]] = set(client.keys("gru-serve:/s*"))
        assert len(found) == 3
        assert all(found.values())
        assert sorted(set().union(*found.values())) == sorted(b"gru-serve:/" + key.id.encode() for key in MANY)
        assert [one.id for one in store.page("", "", 100)] == sorted(key.id for key in MANY)
        for key in MANY:
            store.delete(key)


def test_cluster__restores_writes_that_a_master_has_lost(tmp_path: Path) -> None:
    """It is started again before another one could take its place; the other masters lost nothing."""
    with (
        redis_cluster(tmp_path, "--appendonly", "yes", "--appendfsync", "always", node_timeout_ms=30_000) as cluster,
        replicas(cluster.url, cluster.url) as (one, other),
    ):
        for key in MANY:
            one.create(session(key.id, "ROMEO:" * 1000))
        victim = cluster.owner_of("gru-serve:/s0")
        on_disk = victim.on_disk()
        for number, key in enumerate(MANY):
            (one, other)[number % 2].update(key, appended("x" * 5000))
        one.create(session("late"))
        victim.kill()
        for store in (one, other):
            wait_until(partial(is_refusing, store))
        victim.lose_what_was_written_since(on_disk)
        victim.start()
        for number, key in enumerate(MANY):
            store = (other, one)[number % 2]
            assert when_served(partial(store.load, key)).position == 11_000
        assert other.update(MANY[0], appended("y")) == one.update(MANY[1], appended("y")) == 11_001
        assert len(other.page("", "", 100)) == len(MANY) + 1


def test_cluster__continues_with_the_replica_of_a_master_that_dies(tmp_path: Path) -> None:
    """Its replica lacks the last writes, and no other node refuses calls meanwhile."""
    with (
        redis_cluster(tmp_path, "--cluster-require-full-coverage", "no", has_replicas=True) as cluster,
        replicas(cluster.url, cluster.url) as (one, other),
    ):
        for key in MANY:
            one.create(session(key.id))
        victim = cluster.owner_of("gru-serve:/s0")
        stop_replicating(victim)
        for number, key in enumerate(MANY):
            (one, other)[number % 2].update(key, appended("x"))
        victim.kill()
        for number, key in enumerate(MANY):
            store = (other, one)[number % 2]
            assert characters(when_served(partial(store.load, key))) == "ROMEO:x"
        assert other.update(MANY[0], appended("y")) == 8
        assert cluster.owner_of("gru-serve:/s0") is not victim

        # An orderly failover back: nothing is lost, and the old connections are redirected.
        victim.start()
        cluster.wait_until_ok()
        with admin_of(victim) as client:
            wait_until(lambda: client.info("replication").get("master_link_status") == "up")
            for _ in range(5):
                client.execute_command("CLUSTER", "FAILOVER")
                with suppress(AssertionError):  # the nodes give up if it takes them longer than 5 s
                    wait_until(lambda: client.info("replication")["role"] == "master", 10)
                    break
            assert client.info("replication")["role"] == "master"
        with suppress(OutcomeUnknown):  # the call may have been sent on a connection from before the failover
            when_served(lambda: one.update(MANY[0], appended("z")))
        if when_served(partial(one.load, MANY[0])).position == 8:  # as a client finds out whether to repeat it
            assert when_served(lambda: one.update(MANY[0], appended("z"))) == 9
        for store in (one, other):
            assert characters(when_served(partial(store.load, MANY[0]))) == "ROMEO:xyz"


def test_cluster__moves_slots_without_a_recovery(tmp_path: Path) -> None:
    """Calls are redirected while a slot moves, with its session and without, to masters that are known."""
    with redis_cluster(tmp_path) as cluster, replicas(cluster.url, cluster.url) as stores:
        one, other = stores
        one.create(session())
        one.create(session("b"))
        key, num_written = SessionKey("", "a"), 0
        source = cluster.owner_of("gru-serve:/a")
        target = next(node for node in cluster.masters if node is not source)
        change = one._server._change
        for _ in move_slot(redis.crc.key_slot(b"gru-serve:/a"), source, target, cluster.masters):
            for store in stores:
                num_written += 1
                assert store.update(key, appended("x")) == 6 + num_written
                assert [summary.position for summary in store.page("", "", 9)] == [6 + num_written, 6]
                with pytest.raises(SessionNotFound):
                    store.load(SessionKey("", "no such session"))
            lease, _ = one.begin(key, appended("x"))
            assert lease is not None
            one._renewer._renew(again=True)
            lease.release()
            num_written += 1
        assert cluster.owner_of("gru-serve:/a") is target
        assert other.load(key).position == 6 + num_written
        assert (one._server._change, is_refusing(one)) == (change, False)


def test_cluster__that_does_not_have_all_slots_is_told(tmp_path: Path) -> None:
    with redis_cluster(tmp_path, num_masters=1) as cluster:
        plain = f"redis://127.0.0.1:{cluster.masters[0].port}/0"
        assert "write redis+cluster://" in advice_of(plain)
        with admin_of(cluster.masters[0]) as client:
            client.execute_command("CLUSTER", "DELSLOTS", 7)
        assert "slots that no master serves" in advice_of(cluster.url)
    with redis_process(tmp_path) as process:
        assert "write redis://" in advice_of(f"redis+cluster://127.0.0.1:{process.port}")


# TLS


@contextmanager
def encrypted(directory: Path, *options: str) -> Iterator[tuple[Authority, int, RedisProcess]]:
    """Run a server that speaks TLS. Yields the authority of the certificates, and the port."""
    authority, port = Authority(directory / "authority"), free_port()
    certificate, key = authority.sign("server", "DNS:localhost")
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file"]
    with redis_process(directory, "--tls-port", str(port), *files, str(authority.certificate), *options) as process:
        yield authority, port, process


def test_tls__with_certificates_of_both_sides(tmp_path: Path) -> None:
    login = "sessions:a-password"
    with encrypted(tmp_path) as (authority, port, process):
        with admin_of(process) as client:
            client.execute_command("ACL", "SETUSER", "sessions", "on", ">a-password", "~*", "+@all")
        certificate, key = authority.sign("client")
        ours = f"ssl_certfile={certificate}&ssl_keyfile={key}"
        url = f"rediss://{login}@localhost:{port}/0?ssl_ca_certs={authority.certificate}"
        with replicas(f"{url}&{ours}") as (store,):
            store.create(session())
            assert store.update(SessionKey("", "a"), appended("x")) == 7
        with admin_of(process) as client:
            assert client.exists("gru-serve:/a")

        other = Authority(tmp_path / "other")
        stranger, strangers_key = other.sign("client")
        assert "refuses this client's certificate" in advice_of(url)
        assert "refuses this client's certificate" in advice_of(
            f"{url}&ssl_certfile={stranger}&ssl_keyfile={strangers_key}"
        )
        wrong = url.replace(str(authority.certificate), str(other.certificate))
        assert "not signed by an authority in ssl_ca_certs" in advice_of(f"{wrong}&{ours}")
        assert "another name" in advice_of(f"{url}&{ours}".replace("@localhost", "@127.0.0.1"))
        any_name = f"{url}&{ours}&ssl_check_hostname=false".replace("@localhost", "@127.0.0.1")
        with replicas(any_name) as (store,):
            assert store.load(SessionKey("", "a")).position == 7
        assert "speaks no TLS" in advice_of(f"{url}&{ours}".replace(str(port), str(process.port)))


def test_tls__with_sentinels(tmp_path: Path) -> None:
    """Sentinels and servers are both spoken to by TLS."""
    with encrypted(tmp_path, "--tls-auth-clients", "no") as (authority, port, _), ExitStack() as ending:
        sentinel_port = free_port()
        (home := tmp_path / "sentinel").mkdir()
        files = [tmp_path / "authority" / name for name in ("server.crt", "server.key", "ca.crt")]
        settings = (
            "sentinel resolve-hostnames yes\nsentinel announce-hostnames yes\n"
            f"sentinel monitor {SERVICE} localhost {port} 1\ntls-replication yes\ntls-port {sentinel_port}\n"
            f"tls-cert-file {files[0]}\ntls-key-file {files[1]}\ntls-ca-cert-file {files[2]}\ntls-auth-clients no\n"
        )
        sentinel = SentinelProcess(home, settings)
        ending.callback(sentinel.send, signal.SIGKILL)
        sentinel.start()
        query = f"?ssl_ca_certs={authority.certificate}"
        with replicas(f"rediss+sentinel://localhost:{sentinel_port}/{SERVICE}{query}") as (store,):
            assert store.create(session()).revision == 1


def test_tls__with_a_cluster(tmp_path: Path) -> None:
    authority, port = Authority(tmp_path / "authority"), free_port()
    certificate, key = authority.sign("server", "IP:127.0.0.1")
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", "no", "--tls-cluster", "yes"]
    with redis_cluster(tmp_path, *options, num_masters=1):
        url = f"rediss+cluster://127.0.0.1:{port}?ssl_ca_certs={authority.certificate}"
        with replicas(url) as (store,):
            assert store.create(session()).revision == 1
            assert [*store._server._run_ids] == [("127.0.0.1", port)]


# Servers that lack something


def test_old_protocol__suffices(tmp_path: Path) -> None:
    """No HELLO, RESP3, notices of maintenance, or information about the client's library."""
    with redis_process(tmp_path, "--rename-command", "HELLO", "") as process:
        with redis.Redis.from_url(process.url) as client, pytest.raises(redis.ResponseError, match="HELLO"):
            client.ping()  # what the library does by itself
        with replicas(process.url) as (store,):
            store.create(session())
            store.update(SessionKey("", "a"), appended("x"))
        with redis.Redis.from_url(process.url, protocol=2) as client:
            statistics = client.info("commandstats")
        assert {"cmdstat_evalsha", "cmdstat_client|setname"} <= statistics.keys()
        assert not [name for name in statistics if "hello" in name or "maint" in name]


VALKEY = (
    b"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.1\r\nserver_mode:%b\r\nrun_id:a\r\n"
)


@pytest.mark.parametrize("mode", [b"standalone", b"sentinel", b"cluster"])
def test_valkey__is_known_by_its_own_fields(redis_url: str, monkeypatch: pytest.MonkeyPatch, mode: bytes) -> None:
    """A stand-in: a Redis whose INFO has the fields that Valkey's has."""
    lines = dict(line.split(b":", 1) for line in (VALKEY % mode).splitlines()[1:])
    monkeypatch.setattr(redis_server, "facts", lambda _answer: lines)
    if mode == b"standalone":
        with capture_logs() as logs, closing(RedisServer(redis_url)):
            assert not logs
    else:
        assert f"write redis+{mode.decode()}://" in advice_of(redis_url)

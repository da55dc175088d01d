"""Redis servers that refuse, change and fill up, and what a process notices of it."""

from __future__ import annotations

import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from service.errors import GruServeError, OutcomeUnknown, Overloaded, StoreUnavailable
from service.sessions import redis_connections, redis_server, redis_url
from service.sessions.redis_connections import Link
from service.sessions.redis_server import RedisServer
from tests.harness.programs import free_port, program
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.wait import wait_until

TEXT = b"the text of a session"
KEY = "gru-serve:an owner/a session's id"
Act = Callable[[Any], Any]


def create(server: RedisServer, key: str = KEY, record: bytes = TEXT) -> bytes:
    """Create a session in the server, and return the answer."""
    word: bytes = server.call("create", key, "", 1000, secrets.token_bytes(12), record, 60_000)[0]
    return word


def load(server: RedisServer, key: str = KEY) -> bytes:
    word: bytes = server.call("load", key, "", 1000, b"", 0, b"")[0]
    return word


@contextmanager
def connected(url: str, recovery_window_s: float = 0.0, **options: Any) -> Iterator[RedisServer]:
    with closing(RedisServer(url, recovery_window_s=recovery_window_s, **options)) as server:
        yield server


@contextmanager
def administering(server: RedisProcess) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as admin:
        yield admin


def is_open(server: RedisServer) -> bool:
    with suppress(StoreUnavailable):
        server.check()
        return True
    return False


def is_refused_by_ping(server: RedisServer) -> bool:
    try:
        server.ping()
    except StoreUnavailable:
        return True
    return False


def recover(server: RedisServer) -> None:
    """Do what the renewer's thread does after a change of the server."""
    assert server.ping()
    assert not is_open(server)
    server.mark_restored()
    server.check()


def test_check__refuses_a_server_that_was_just_started_until_others_have_restored(tmp_path: Path) -> None:
    """It refuses from the first moment on: a replica that was ready for a moment would be sent requests."""
    with redis_process(tmp_path) as process, connected(process.url, recovery_window_s=3) as server:
        with pytest.raises(StoreUnavailable):
            server.check()
        wait_until(lambda: is_open(server))


def test_check__refuses_at_once_if_no_server_listens() -> None:
    with connected(f"redis://127.0.0.1:{free_port()}/0") as server, pytest.raises(StoreUnavailable):
        server.check()


# Servers that refuse to work


def lose_the_disk(admin: Any) -> None:
    """Make the server's snapshots fail."""
    shutil.rmtree(admin.config_get("dir")["dir"])
    admin.config_set("save", "3600 1")
    admin.bgsave()
    wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")


REFUSALS: dict[str, tuple[Act, Act]] = {
    "READONLY": (
        lambda admin: admin.replicaof("127.0.0.1", str(free_port())),
        lambda admin: admin.replicaof("NO", "ONE"),
    ),
    "MISCONF": (lose_the_disk, lambda admin: admin.config_set("save", "")),
    "NOREPLICAS": (
        lambda admin: admin.config_set("min-replicas-to-write", 1),
        lambda admin: admin.config_set("min-replicas-to-write", 0),
    ),
    "NOPERM": (
        lambda admin: admin.execute_command("ACL SETUSER default -hset"),
        lambda admin: admin.execute_command("ACL SETUSER default +hset"),
    ),
}


@pytest.mark.parametrize("word", REFUSALS)
def test_call__refused_by_the_server_closes_it_until_it_works_again(tmp_path: Path, word: str) -> None:
    """As after an orderly failover: the connections live, and the server behind them has become a replica."""
    refuse, work = REFUSALS[word]
    with redis_process(tmp_path) as process, connected(process.url) as server, administering(process) as admin:
        create(server)
        refuse(admin)
        with capture_logs() as logs, pytest.raises(StoreUnavailable):
            create(server, f"{KEY}2")
        assert [line["answer"] for line in logs] == [word]
        assert not is_open(server)
        assert is_refused_by_ping(server)
        work(admin)
        recover(server)
        assert load(server) == b"ok"
        assert not server.ping()


@pytest.mark.parametrize("word", REFUSALS)
def test_ping__finds_a_server_that_refuses_before_a_call_does(tmp_path: Path, word: str) -> None:
    refuse, work = REFUSALS[word]
    with redis_process(tmp_path) as process, connected(process.url) as server, administering(process) as admin:
        refuse(admin)
        wait_until(lambda: is_refused_by_ping(server))
        assert not is_open(server)
        work(admin)
        recover(server)


def test_call__with_an_unusable_key_says_nothing_about_the_server(tmp_path: Path) -> None:
    with redis_process(tmp_path) as process, connected(process.url) as server, administering(process) as admin:
        admin.set(KEY, "not a session")
        with capture_logs() as logs, pytest.raises(StoreUnavailable):
            load(server)
        with capture_logs() as more_logs, pytest.raises(StoreUnavailable):
            server.call_all([("lacks", KEY, "", 1000, b"1", 1)])
        assert [line["answer"] for line in logs + more_logs] == ["WRONGTYPE"] * 2
        server.check()


def test_full_server__refuses_new_sessions_only(tmp_path: Path) -> None:
    with redis_process(tmp_path) as process, connected(process.url) as server, administering(process) as admin:
        create(server)
        admin.config_set("maxmemory", 1)
        server.ping()
        with pytest.raises(Overloaded):
            create(server, f"{KEY}2")
        assert load(server) == b"ok"
        assert server.call("lease", KEY, "", 1000, b"", 0, b"", b"token", 1000, 0)[0] == b"ok"
        assert server.call("delete", KEY, "", 1000, b"token")[0] == b"ok"
        server._probe_at = 0
        server.ping()
        server.check()


# Servers that can't store sessions


@contextmanager
def sentinel(directory: Path) -> Iterator[str]:
    """Run a Sentinel, and return its address."""
    port, settings = free_port(), directory / "sentinel.conf"
    settings.write_text(f"port {port}\nbind 127.0.0.1\ndir {directory}\n")
    process = subprocess.Popen([program("redis-server"), str(settings), "--sentinel"], stdout=subprocess.DEVNULL)

    def answers() -> bool:
        with suppress(redis.ConnectionError), redis.Redis("127.0.0.1", port) as client:
            return bool(client.ping())
        return False

    try:
        wait_until(answers)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


@contextmanager
def unsuitable(kind: str, directory: Path) -> Iterator[str]:
    """Run a server that can't store sessions, and return the URL to give."""
    if kind == "sentinel":
        with sentinel(directory) as url:
            yield url
        return
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())] if kind == "cluster" else []
    with redis_process(directory, *options) as process, administering(process) as admin:
        url = process.url
        if kind == "replica":
            admin.replicaof("127.0.0.1", str(free_port()))
        elif kind == "database":
            url = url.removesuffix("0") + "99"
        elif kind in ("INFO", "HSET"):
            admin.execute_command("ACL", "SETUSER", "someone", "on", ">a-password", "~*", "+@all", f"-{kind}")
            url = url.replace("//", "//someone:a-password@")
        elif kind == "password":
            admin.execute_command("ACL", "SETUSER", "someone", "on", ">another", "~*", "+@all")
            url = url.replace("//", "//someone:a-password@")
        elif kind == "prefix":
            admin.execute_command("ACL", "SETUSER", "someone", "on", ">a-password", "~other:*", "+@all")
            url = url.replace("//", "//someone:a-password@")
        yield url


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("sentinel", "write redis+sentinel://"),
        ("cluster", "write redis+cluster://"),
        ("replica", "has to lead to the master"),
        ("database", "correct the number of the database"),
        ("INFO", "permissions"),
        ("HSET", "permissions"),
        ("prefix", "permissions"),
        ("password", "correct the user and the password"),
    ],
)
def test_unsuitable_server__is_told_at_the_start(tmp_path: Path, kind: str, advice: str) -> None:
    with unsuitable(kind, tmp_path) as url, capture_logs() as logs, connected(url) as server:
        assert not is_open(server)
        assert is_refused_by_ping(server)
        (line,) = logs
        assert (line["log_level"], line["event"]) == ("error", "the session store refuses to work")
        assert advice in line["advice"]
        assert "a-password" not in str(logs)


def test_old_server__is_told_at_the_start(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_connections, "_MIN_VERSION", 99)
    with capture_logs() as logs, connected(redis_url) as server:
        assert not is_open(server)
    assert "sessions need Redis" in logs[0]["advice"]


def test_server_that_evicts__is_told_at_the_start(tmp_path: Path) -> None:
    options = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]
    with redis_process(tmp_path, *options) as process, capture_logs() as logs, connected(process.url) as server:
        server.check()
    (line,) = logs
    assert "maxmemory-policy" in line["advice"]
    assert line["maxmemory_policy"] == "allkeys-lru"


def test_server_that_begins_to_evict__is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "_INSPECTED_S", 0)
    with redis_process(tmp_path, "--maxmemory", "100mb") as process, closing(RedisServer(process.url)) as server:
        with redis.Redis.from_url(process.url) as client, capture_logs() as logs:
            for policy in ("noeviction", "allkeys-lru", "allkeys-lru", "volatile-ttl"):
                client.config_set("maxmemory-policy", policy)
                server._probe_at = 0
                server.ping()
        policies = [line["maxmemory_policy"] for line in logs if "may evict" in line["event"]]
    assert policies == ["allkeys-lru", "volatile-ttl"]


def test_server__needs_no_more_permissions_than_the_documentation_lists(tmp_path: Path) -> None:
    documentation = Path(redis_server.__file__).parents[2] / "docs" / "redis.md"
    rule = re.findall("^ACL SETUSER sessions on .*$", documentation.read_text(), re.MULTILINE)[0]
    with redis_process(tmp_path) as process, administering(process) as admin:
        admin.execute_command(*rule.replace("a-password", "pass").split())
        with connected(process.url.replace("//", "//sessions:pass@")) as server:
            create(server)
            assert load(server) == b"ok"
            assert server.call("lease", KEY, "", 1000, b"", 0, b"", b"token", 1000, 0)[0] == b"ok"
            server.call_all([("renew", KEY, "", 1000, b"token", b"", 0, b"", 1000, 0)])
            assert list(server.keys("gru-serve:an*")) == [KEY]
            assert not server.ping()


def test_server__refuses_without_a_break_while_its_user_lacks_any_permission(tmp_path: Path) -> None:
    """Else it would serve until the first call that needs the permission, recover, and so on, for all sessions."""
    documentation = Path(redis_server.__file__).parents[2] / "docs" / "redis.md"
    rule = re.findall("^ACL SETUSER sessions on .*$", documentation.read_text(), re.MULTILINE)[0]
    # Needed for another database, once by each process of Redis, by the rate limit, and by lists.
    needless = {"select", "script|load", "get", "scan"}
    commands = [word[1:] for word in rule.split() if word.startswith("+") and word[1:] not in needless]
    with redis_process(tmp_path) as process, administering(process) as admin, connected(process.url) as server:
        for command in commands:
            admin.execute_command("ACL", "SETUSER", "default", f"-{command}")
            with capture_logs() as logs:
                server._probe_at = 0  # a probe is due
                assert [is_refused_by_ping(server) for _ in range(3)] == [True] * 3, command
            (line,) = (line for line in logs if line["log_level"] == "error")
            assert "permissions" in line["advice"], command
            admin.execute_command("ACL", "SETUSER", "default", f"+{command}")
            if server.ping():
                server.mark_restored()
            wait_until(lambda: is_open(server))


# Several servers, one after the other


@pytest.fixture
def two_masters(tmp_path: Path) -> Iterator[tuple[str, list[Path], Path]]:
    """Two servers, and an address that leads to the first until somebody changes it."""
    with ExitStack() as ending:
        sockets = []
        for name in "ab":
            directory = tmp_path / name
            directory.mkdir()
            sockets.append(directory / "socket")
            ending.enter_context(redis_process(directory, "--unixsocket", str(sockets[-1])))
        address = tmp_path / "socket"
        address.symlink_to(sockets[0])
        yield f"unix://{address}", sockets, address


def lead(address: Path, socket: Path) -> None:
    other = address.with_suffix(".new")
    other.symlink_to(socket)
    os.replace(other, address)


def test_check__refuses_a_server_that_was_promoted_until_others_have_restored(tmp_path: Path) -> None:
    """A process that starts after a failover can't know how long ago that was: the standby has run for long."""
    with ExitStack() as ending:
        for name in "ab":
            (tmp_path / name).mkdir()
        master = ending.enter_context(redis_process(tmp_path / "a"))
        standby = ending.enter_context(redis_process(tmp_path / "b"))
        admin = ending.enter_context(administering(standby))
        admin.replicaof("127.0.0.1", str(master.port))
        wait_until(lambda: admin.info("replication")["master_link_status"] == "up")
        admin.replicaof("NO", "ONE")
        wait_until(lambda: admin.info("server")["uptime_in_seconds"] >= 2)
        server = ending.enter_context(connected(standby.url, recovery_window_s=0.5))
        assert not is_open(server)
        wait_until(lambda: is_open(server))


def test_connections__to_a_former_server_are_used_no_more(two_masters: tuple[str, list[Path], Path]) -> None:
    """Two masters at once: the connections that exist stay on the old one, which still works."""
    url, sockets, address = two_masters
    with connected(url) as server:
        create(server)
        lead(address, sockets[1])
        assert load(server) == b"ok"  # nobody can know yet
        wait_until(server.ping)
        server.mark_restored()
        assert load(server) == b"none"
        create(server)
        with redis.Redis(unix_socket_path=str(sockets[1])) as admin:
            assert admin.exists(KEY)


def test_call__that_a_former_server_answers_is_not_acknowledged(
    two_masters: tuple[str, list[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is noticed while the call is under way."""
    url, sockets, address = two_masters
    with connected(url) as server:
        create(server)
        lead(address, sockets[1])
        run = Link.run

        def answers_late(link: Link, commands: Sequence[Any], *options: Any, **more: Any) -> list[Any]:
            answers = run(link, commands, *options, **more)
            if "create" in commands[0]:
                wait_until(server.ping)
            return answers

        monkeypatch.setattr(Link, "run", answers_late)
        with pytest.raises(OutcomeUnknown):
            create(server, f"{KEY}2")


def test_connections__that_the_server_has_closed_are_replaced(redis_url: str) -> None:
    """As a server does that has the setting `timeout`."""
    with connected(redis_url, probe_key="probe of closed") as server, redis.Redis.from_url(redis_url) as admin:
        wait_until(lambda: is_open(server))
        calls: list[Act] = [
            lambda server: load(server, "no such session"),
            lambda server: server.call_all([("lacks", "no such session", "", 1000, b"1", 1)]),
            lambda server: server.execute([("EXISTS", "no such session")]),
            lambda server: server.ping(),
        ]
        for call in calls * 2:
            call(server)
            admin.client_kill_filter(_type="normal", skipme=True)
            call(server)
            assert is_open(server)


def test_mark_restored__does_not_count_for_a_server_that_was_replaced_meanwhile(tmp_path: Path) -> None:
    """A second restart while the writes of the first are being restored."""
    with redis_process(tmp_path) as process, connected(process.url) as server:
        create(server)
        for _ in range(2):
            process.kill()
            process.start()
            with suppress(StoreUnavailable):
                server.ping()
        assert server.ping()
        process.kill()
        process.start()
        with suppress(StoreUnavailable):
            server.call_all([("lacks", KEY, "", 1000, b"1", 1)])
        server.mark_restored()
        assert not is_open(server)
        wait_until(lambda: not is_refused_by_ping(server))
        recover(server)


# Many callers


def test_call__by_many_threads_at_once_is_answered(tmp_path: Path) -> None:
    """300 calls that the server keeps waiting: more than the connections that a client has by default."""
    with redis_process(tmp_path) as process, connected(process.url, timeout_s=10) as server:
        create(server)
        barrier = threading.Barrier(301)

        def call() -> bytes:
            barrier.wait()
            return load(server)

        with administering(process) as admin, ThreadPoolExecutor(300) as threads:
            answers = [threads.submit(call) for _ in range(300)]
            admin.client_pause(1000)
            barrier.wait()
            assert {answer.result() for answer in answers} == {b"ok"}
        server.check()


def test_call__without_a_connection_left_says_nothing_about_the_server(tmp_path: Path) -> None:
    with redis_process(tmp_path) as process, connected(process.url, timeout_s=5) as server:
        create(server)
        with administering(process) as admin, ThreadPoolExecutor(5) as threads:
            admin.client_pause(1000)
            with no_new_files():
                answers = [threads.submit(load, server) for _ in range(5)]
                errors = [answer.exception() for answer in answers]
        assert errors.count(None) == 1
        assert {str(error) for error in errors if error} == {redis_server._NO_CONNECTION}
        server.check()
        assert load(server) == b"ok"


@contextmanager
def no_new_files() -> Iterator[None]:
    """Let this process open no more files and sockets than it has."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as first_free:
        number = first_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Secrets


def test_logs__hold_no_key_token_or_record(tmp_path: Path) -> None:
    with ExitStack() as ending:
        process = ending.enter_context(redis_process(tmp_path))
        admin, logs = ending.enter_context(administering(process)), ending.enter_context(capture_logs())
        with connected(process.url) as server:
            create(server)
            admin.config_set("maxmemory", 1)
            with pytest.raises(Overloaded):
                create(server, f"{KEY}2")
            admin.config_set("maxmemory", 0)
            admin.set(f"{KEY}3", "not a session")
            for key in (KEY, f"{KEY}3"):
                with suppress(StoreUnavailable):
                    server.call_all([("renew", key, "", 1000, b"a lease's token", b"", 0, b"", 1000, 0)])
            admin.replicaof("127.0.0.1", str(free_port()))
            with pytest.raises(StoreUnavailable):
                server.call_all([("renew", KEY, "", 1000, b"a lease's token", b"", 0, b"", 1000, 1)])
    assert {"the session store is full", "the session store refuses to work"} <= {line["event"] for line in logs}
    for secret in ("session's id", "owner", "token", "text of", "EVALSHA"):
        assert secret not in str(logs)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:{}@host:port/0",
        "redis://user:{}#@host/0",
        "redis://user:{}@host/0?socket_timeout=soon",
        "redis://user:{}@host/0?nonsense=1",
        "http://user:{}@host/0",
    ],
)
def test_url__that_is_invalid_is_not_shown(url: str) -> None:
    password = secrets.token_hex()
    with pytest.raises(ValueError, match="must be redis://") as caught:
        RedisServer(url.format(password))
    assert password not in "".join(traceback.format_exception(caught.value))


def test_ping__disturbs_no_batch_of_another_thread(tmp_path: Path) -> None:
    """A probe makes a new connection each second. Those on which other threads wait for answers stay open."""
    with redis_process(tmp_path) as redis, closing(RedisServer(redis.url, recovery_window_s=0)) as server:
        wait_until(lambda: is_served(server))
        errors_found: list[GruServeError] = []
        is_over = threading.Event()

        def batches() -> None:
            try:
                while not is_over.is_set():
                    server.call_all([("unlink", "a", "", 0, "x")] * 50)
                    server.execute([("EXISTS", "a")] * 50, in_recovery=True)
            except GruServeError as error:
                errors_found.append(error)

        threads = [threading.Thread(target=batches) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            server._probe_at = 0.0  # each ping is a probe
            server.ping()
        is_over.set()
        for thread in threads:
            thread.join()
        assert errors_found == []


def is_served(server: RedisServer) -> bool:
    """Return whether calls are served."""
    try:
        server.check()
    except StoreUnavailable:
        return False
    return True


@pytest.mark.parametrize("how", ["tcp", "unix"])
def test_link__to_a_server_that_hangs_times_out(tmp_path: Path, how: str) -> None:
    """While it waits for an answer, and while it sends more than fits into the buffers. A time-out is not repeated."""
    path = tmp_path / "redis.sock"
    with redis_process(tmp_path, "--unixsocket", str(path)) as server, ExitStack() as ending:
        url = redis_url.parse(server.url if how == "tcp" else f"unix://{path}?db=0")
        connections = redis_connections.RedisConnections(url, 0.2)
        (address,) = connections.discover()
        links = [connections.connect(address) for _ in range(2)]
        for link in links:
            ending.callback(link.close)
        assert [link.run([("PING",)]) for link in links] == [[b"PONG"]] * 2
        server.send(signal.SIGSTOP)
        ending.callback(server.send, signal.SIGCONT)
        for link, command in zip(links, [("PING",), ("SET", "key", bytes(2 * 10**7))], strict=True):
            with pytest.raises(redis.TimeoutError):
                link.run([command])

"""Look-ups of the session store's host: a name server that is silent, slow or mistaken."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import exceptions as errors

from service.errors import StoreUnavailable
from service.host_names import HostNames
from service.sessions.redis_connections import RedisConnections
from service.sessions.redis_server import RedisServer
from service.sessions.redis_url import parse
from tests.harness.redis_process import redis_process
from tests.harness.redis_stores import when_served
from tests.harness.wait import wait_until

ASK = socket.getaddrinfo


class Names:
    """Stands for the name server: it knows the names in `.test`, until it is told to be silent or to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[tuple[str, int]] | None = None  # of the name; None: this machine, with the port of the query
        self.failure: OSError | None = None
        self.num_asked = 0
        self.answers = threading.Event()
        self.answers.set()
        monkeypatch.setattr(socket, "getaddrinfo", self._ask)

    def _ask(self, host: str, port: int, *options: Any, **named: Any) -> list[Any]:
        if not host.endswith(".test") or named.get("flags", 0) & socket.AI_NUMERICHOST:
            return ASK(host, port, *options, **named)
        self.num_asked += 1
        self.answers.wait()
        if self.failure is not None:
            raise self.failure
        places = self.places or [("127.0.0.1", port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    server = Names(monkeypatch)
    yield server
    server.answers.set()


@pytest.fixture
def filled_port() -> Iterator[int]:
    """A port that answers no attempt to connect, as one of a host that has vanished."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            waiting.append(client)
        yield listener.getsockname()[1]
        for client in waiting:
            client.close()


def test_places__of_an_address_ask_nobody(names: Names) -> None:
    names.answers.clear()
    assert HostNames(60).places("127.0.0.1", 7)[0] == (socket.AF_INET, ("127.0.0.1", 7))
    assert HostNames(60).places("::1", 7)[0][0] == socket.AF_INET6


def test_places__are_those_before_while_the_name_server_is_silent(names: Names) -> None:
    looked_up = HostNames(0.05)
    before = looked_up.places("redis.test", 7)
    names.answers.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(looked_up.places, ["redis.test"] * 40, [7] * 40)) == [before] * 40
    assert names.num_asked == 2  # one look-up at a time
    names.places = [("127.0.0.2", 7)]
    names.answers.set()
    while looked_up.places("redis.test", 7) == before:
        pass  # the look-up that was silent ends, or the next one is answered
    assert looked_up.places("redis.test", 7) == [(socket.AF_INET, ("127.0.0.2", 7))]


@pytest.mark.parametrize("number", [socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM, socket.EAI_MEMORY])
def test_places__are_those_before_while_the_name_server_fails(names: Names, number: int) -> None:
    looked_up = HostNames(60)
    before = looked_up.places("redis.test", 7)
    names.failure = socket.gaierror(number, "try again")
    assert looked_up.places("redis.test", 7) == before


def test_places__of_a_name_that_no_longer_exists_are_not_those_before(names: Names) -> None:
    """Its addresses may be somebody else's by now."""
    looked_up = HostNames(60)
    looked_up.places("redis.test", 7)
    names.failure = socket.gaierror(socket.EAI_NONAME, "no such name")
    with pytest.raises(socket.gaierror):
        looked_up.places("redis.test", 7)


@pytest.mark.parametrize(
    ("name", "port"), [("a" * 64, 7), ("a..b", 7), ("a\0b", 7), ("\udcff", 7), ("localhost", 2**70)]
)
def test_places__of_what_is_no_name_are_an_error(name: str, port: int) -> None:
    """A server may name such a host. No look-up of it stays behind."""
    looked_up = HostNames(60)
    for _ in range(2):
        with pytest.raises(socket.gaierror):
            looked_up.places(name, port)


def test_places__of_one_look_up_fail_with_an_error_for_each_thread(names: Names) -> None:
    """An exception that several threads raise has the traces of all of them, and grows."""
    names.failure = socket.gaierror(socket.EAI_AGAIN, "later")
    names.answers.clear()
    looked_up = HostNames(60)
    with ThreadPoolExecutor(4) as pool:
        failed = [pool.submit(looked_up.places, "redis.test", 7) for _ in range(4)]
        wait_until(lambda: names.num_asked == 1)
        names.answers.set()
        raised = [each.exception() for each in failed]
    assert len(set(map(id, raised))) == 4
    assert all(isinstance(each, socket.gaierror) and each.errno == socket.EAI_AGAIN for each in raised)


def test_places__of_many_names_have_a_limit_of_threads(names: Names) -> None:
    """A cluster can name thousands of hosts, and a name server can be silent about each."""
    names.answers.clear()
    looked_up, before = HostNames(0.001), threading.active_count()
    for number in range(200):
        with pytest.raises(OSError):  # noqa: PT011
            looked_up.places(f"node-{number}.test", 7)
    assert threading.active_count() - before <= 64


@pytest.mark.usefixtures("names")
def test_places__without_a_thread_left_are_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    looked_up = HostNames(60)
    before = looked_up.places("redis.test", 7)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert looked_up.places("redis.test", 7) == before
    with pytest.raises(OSError, match="can't start new thread"):
        looked_up.places("redis.test", 8)


def test_server__serves_calls_on_new_connections_while_the_name_server_is_silent(tmp_path: Path, names: Names) -> None:
    """A network of containers may have no name server for half a minute, after a container has been killed."""
    with (
        redis_process(tmp_path) as process,
        closing(RedisServer(process.url.replace("127.0.0.1", "redis.test"), 2.0, 0.3)) as server,
    ):
        when_served(lambda: server.call("load", "a", "", "", ""))
        names.answers.clear()
        server._probe_at = 0.0  # the next ping is a probe, which makes a new connection
        assert not server.ping()
        with ThreadPoolExecutor(8) as pool:  # more connections than are idle
            answers = pool.map(lambda _: server.call("load", "a", "", "", ""), range(40))
            assert list(answers) == [[b"none"]] * 40


def test_server__without_a_name_server_at_the_start_is_found_later(tmp_path: Path, names: Names) -> None:
    names.answers.clear()
    with (
        redis_process(tmp_path) as process,
        closing(RedisServer(process.url.replace("127.0.0.1", "redis.test"), 0.4, 0.3)) as server,
    ):
        with pytest.raises(StoreUnavailable):
            server.call("load", "a", "", "", "")
        names.answers.set()

        def load() -> list[Any]:
            server.ping()
            return server.call("load", "a", "", "", "")

        assert when_served(load) == [b"none"]


def test_connect__tries_all_places_within_one_limit(tmp_path: Path, names: Names, filled_port: int) -> None:
    with redis_process(tmp_path) as process:
        port = urlsplit(process.url).port or 0
        names.places = [("127.0.0.1", filled_port), ("127.0.0.1", port)]
        connections = RedisConnections(parse(f"redis://redis.test:{port}/0"), 2.0)
        with closing(connections.connect(("redis.test", port))) as link:
            assert link.require([("PING",)]) == [b"PONG"]
        names.places = [("127.0.0.1", filled_port)] * 40
        with pytest.raises(errors.TimeoutError):
            RedisConnections(parse(f"redis://redis.test:{port}/0"), 0.2).connect(("redis.test", port))


def test_connect__tries_the_next_place_if_this_machine_has_no_such_addresses(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example one whose kernel has no IPv6."""

    def refuse(family: int, *options: Any) -> socket.socket:
        refused.append(family)
        if len(refused) == 1:
            raise OSError(errno.EAFNOSUPPORT, "no such addresses")
        return make(family, *options)

    make, refused = socket.socket, list[int]()
    with redis_process(tmp_path) as process:
        port = urlsplit(process.url).port or 0
        names.places = [("127.0.0.1", port)] * 2
        connections = RedisConnections(parse(f"redis://redis.test:{port}/0"), 2.0)
        monkeypatch.setattr(socket, "socket", refuse)
        with closing(connections.connect(("redis.test", port))) as link:
            assert link.require([("PING",)]) == [b"PONG"]


@pytest.mark.usefixtures("names")
def test_connect__without_a_descriptor_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RedisServer` tells by the number that this says nothing about the server."""

    def refuse(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        RedisConnections(parse("redis://redis.test:7/0"), 2.0).connect(("redis.test", 7))
    assert getattr(caught.value.__context__, "errno", None) == errno.EMFILE

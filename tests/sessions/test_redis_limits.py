"""Redis servers that take their time, or answer with something else than Redis does: no caller waits for long.

A real server answers through a proxy that misbehaves.
"""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from redis import exceptions as errors

from service.errors import StoreUnavailable
from service.sessions.redis_connections import RedisConnections
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.redis_url import parse
from service.web.gate.shared_counts import SharedCounts
from tests.harness.lossy_proxy import LossyProxy, lossy_proxy
from tests.harness.redis_process import redis_process
from tests.harness.redis_stores import appended, characters, session, when_served

TIMEOUT_S = 0.4
LONG_S = 15  # a call that takes longer has no limit
MANY = 2_000_000_000
Deliver = Callable[[socket.socket, bytes], Any]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyProxy]:
    with redis_process(tmp_path_factory.mktemp("redis")) as process, lossy_proxy(process.url) as proxy:
        yield proxy


@contextmanager
def delivering(proxy: LossyProxy, deliver: Deliver) -> Iterator[None]:
    proxy.deliver = deliver
    try:
        yield
    finally:
        proxy.deliver = socket.socket.sendall


def instead(answer: bytes) -> Deliver:
    """Answer this, and say no more."""
    return lambda sock, _data: sock.sendall(answer)


def drip(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        time.sleep(0.1)  # shorter than any limit
        sock.sendall(bytes([byte]))


def pour(sock: socket.socket, _data: bytes) -> None:
    """Announce much and send it, as fast as it is read."""
    sock.sendall(b"$%d\r\n" % MANY)
    while True:
        sock.sendall(bytes(2**16))


MISBEHAVIOUR: dict[str, Deliver] = {
    "drips": drip,
    "says nothing": lambda _sock, _data: None,
    "closes": lambda sock, _data: sock.shutdown(socket.SHUT_RDWR),
    "sends a half": lambda sock, data: sock.sendall(data[: len(data) // 2]),
    "announces a huge string": instead(b"$%d\r\n" % MANY),
    "sends a huge string": pour,
    "announces a huge array": instead(b"*%d\r\n:1\r\n" % MANY),
    "announces a negative length": instead(b"$-7\r\n"),
    "nests arrays": instead(b"*1\r\n" * 100_000),
    "sends an endless line": instead(b"-ERR " + b"x" * 2**22),
    "sends a huge number": instead(b":" + b"9" * 5000 + b"\r\n"),
    "pushes messages": instead(b">2\r\n$10\r\ninvalidate\r\n*0\r\n"),
    "speaks HTTP": instead(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "answers a number": instead(b":7\r\n"),
    "answers nothing": instead(b"$-1\r\n"),
    "answers an empty array": instead(b"*0\r\n"),
    "answers with a redirection to nowhere": instead(b"-MOVED 7\r\n"),
}


@pytest.mark.parametrize("deliver", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_call__on_a_server_that_misbehaves_fails_in_time(proxy: LossyProxy, deliver: Deliver) -> None:
    with closing(RedisStore(RedisServer(proxy.url, TIMEOUT_S, 0.1), 4096)) as store, ThreadPoolExecutor(3) as pool:
        when_served(store.check)
        one = when_served(lambda: store.create(session("misbehaving")))
        tracemalloc.start()
        try:
            with delivering(proxy, deliver):
                for failed in [pool.submit(store.load, one.key) for _ in range(3)]:
                    assert isinstance(failed.exception(LONG_S), StoreUnavailable)
            assert tracemalloc.get_traced_memory()[1] < 2**28
        finally:
            tracemalloc.stop()
        assert when_served(lambda: store.update(one.key, appended("x"), idempotent=False)) == 7
        assert characters(when_served(lambda: store.load(one.key))) == "ROMEO:x"
        when_served(lambda: store.delete(one.key))


@pytest.mark.parametrize("deliver", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_server__that_misbehaves_at_the_start_is_found_later(proxy: LossyProxy, deliver: Deliver) -> None:
    with ThreadPoolExecutor(1) as pool:
        with delivering(proxy, deliver):
            server = pool.submit(RedisServer, proxy.url, TIMEOUT_S, 0.1).result(LONG_S)
        with closing(server):
            with pytest.raises(StoreUnavailable):
                server.check()

            def check() -> None:
                if server.ping():
                    server.mark_restored()
                server.check()

            when_served(check)


@pytest.mark.parametrize("is_late", [False, True])
def test_link__with_an_answer_too_many_is_used_no_more(proxy: LossyProxy, is_late: bool) -> None:
    """The next command on it would get the answer of the one before: another session's text."""
    with closing(RedisConnections(parse(proxy.url), 5.0).connect(("127.0.0.1", proxy.server_address[1]))) as link:
        link.require([("SET", "mine", "my text"), ("SET", "yours", "your text")])

        def twice(sock: socket.socket, data: bytes) -> None:
            sock.sendall(data if is_late else data + data)
            proxy.deliver = socket.socket.sendall
            if is_late:
                assert not link.is_closed()
                sock.sendall(data)

        proxy.deliver = twice
        if is_late:
            assert link.require([("GET", "mine")]) == [b"my text"]
            while not link.is_closed():
                time.sleep(0.01)
        else:
            with pytest.raises(errors.ConnectionError):
                link.require([("GET", "mine")])
            with pytest.raises(errors.ConnectionError):
                link.require([("GET", "yours")])


def test_call__after_an_answer_too_many_gets_its_own(proxy: LossyProxy) -> None:
    with closing(RedisStore(RedisServer(proxy.url, 2.0, 0.1), 4096, cache_bytes=0)) as store:
        when_served(store.check)
        keys = [store.create(session(name, f"the text of {name}")).key for name in ("mine", "yours")]
        with delivering(proxy, lambda sock, data: sock.sendall(data + data)):
            for key in keys:
                with suppress(StoreUnavailable):
                    assert characters(store.load(key)) == f"the text of {key.id}"
        for key in keys:
            assert characters(when_served(partial(store.load, key))) == f"the text of {key.id}"
            when_served(partial(store.delete, key))


def test_store__on_a_slow_network_serves(proxy: LossyProxy) -> None:
    """Each answer takes three quarters of the limit, so what has to be done in turn is what takes time."""

    def late(sock: socket.socket, data: bytes) -> None:
        time.sleep(0.75)
        sock.sendall(data)

    with closing(RedisServer(proxy.url, 1.0, 0.0)) as server, delivering(proxy, late):
        server._close_idle()
        assert server.call("load", "nobody", "", "", "") == [b"none"]


def test_link__takes_longer_for_texts_of_megabytes(proxy: LossyProxy) -> None:
    link = RedisConnections(parse(proxy.url), 0.5).connect(("127.0.0.1", proxy.server_address[1]))
    text = bytes(2**24)

    def slowly(sock: socket.socket, data: bytes) -> None:
        time.sleep(0.002)  # at most 32 MiB/s
        sock.sendall(data)

    with closing(link), delivering(proxy, slowly):
        assert link.require([("SET", "long", text), ("GET", "long"), ("DEL", "long")]) == [b"OK", text, 1]


SLOTS = b"*3\r\n:%d\r\n:%d\r\n*2\r\n$%d\r\n%b\r\n:%d\r\n"


def slots(first: int = 0, last: int = 16383, host: bytes = b"127.0.0.1", port: int = 7) -> bytes:
    return SLOTS % (first, last, len(host), host, port)


CLUSTERS = {
    "no array": b":7\r\n",
    "numbers": b"*1\r\n:7\r\n",
    "a range without nodes": b"*1\r\n*2\r\n:0\r\n:16383\r\n",
    "a node without a port": b"*1\r\n*3\r\n:0\r\n:16383\r\n*1\r\n$1\r\na\r\n",
    "a port that does not exist": b"*1\r\n" + slots(port=65_536),
    "a negative port": b"*1\r\n" + slots(port=-1),
    "a huge range": b"*1\r\n" + slots(last=2**62),
    "a negative range": b"*1\r\n" + slots(first=-20_000),
    "a range that ends before it begins": b"*1\r\n" + slots(first=9, last=3),
    "a host with a NUL": b"*1\r\n" + slots(host=b"a\0b"),
    "a long host": b"*1\r\n" + slots(host=b"a" * 10_000),
    "bytes that are no text": b"*1\r\n" + slots(host=b"\xff\xfe"),
    "many nodes": b"*5000\r\n" + b"".join(slots(port=1 + number) for number in range(5000)),
    "ranges that overlap": b"*2\r\n" + slots() + slots(first=5, last=7, port=8),
}


@pytest.mark.parametrize("answer", CLUSTERS.values(), ids=CLUSTERS.keys())
def test_cluster__with_impossible_slots_is_unavailable(proxy: LossyProxy, answer: bytes) -> None:
    def deliver(sock: socket.socket, data: bytes) -> None:
        sock.sendall(answer if b"cluster support" in data else data)

    url = proxy.url.replace("redis://", "redis+cluster://").removesuffix("/0")
    with (
        ThreadPoolExecutor(1) as pool,
        delivering(proxy, deliver),
        closing(pool.submit(RedisServer, url, 0.2, 0.1).result(LONG_S)) as server,
    ):
        with pytest.raises(StoreUnavailable):
            server.ping()
        with pytest.raises(StoreUnavailable):
            server.call("load", "nobody", "", "", "")


def test_cluster__with_nodes_that_hang_is_asked_for_a_limited_time(
    proxy: LossyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread looks for the masters and renews leases. In the end it has tried every node."""
    nodes = [b"node-%d.test" % number for number in range(300)]
    asked, answers, ask = set[str](), threading.Event(), socket.getaddrinfo

    def look_up(host: str, *options: Any, **named: Any) -> list[Any]:
        if not host.endswith(".test") or named.get("flags", 0) & socket.AI_NUMERICHOST:
            return ask(host, *options, **named)
        asked.add(host)
        answers.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    def deliver(sock: socket.socket, data: bytes) -> None:
        found = b"*%d\r\n" % len(nodes) + b"".join(slots(host=node) for node in nodes)
        sock.sendall(found if b"cluster support" in data else data)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    connections = RedisConnections(parse(proxy.url.replace("redis://", "redis+cluster://").removesuffix("/0")), 0.02)
    with delivering(proxy, deliver), ThreadPoolExecutor(1) as pool, closing(connections):
        connections.discover()
        for _ in range(100):
            before = len(asked)
            with suppress(errors.RedisError):
                pool.submit(connections.discover, elsewhere=True).result(LONG_S)
            assert len(asked) - before < 10
            if len(asked) >= 64:
                break
        assert threading.active_count() < 100
        answers.set()


SENTINELS = {
    "no array": b":7\r\n" * 2,
    "an odd array": b"*1\r\n$4\r\nname\r\n*2\r\n$9\r\n127.0.0.1\r\n$1\r\n7\r\n",
    "an epoch that is no number": b"*2\r\n$12\r\nconfig-epoch\r\n$1\r\nx\r\n*2\r\n$9\r\n127.0.0.1\r\n$1\r\n7\r\n",
    "no port": b"*2\r\n$12\r\nconfig-epoch\r\n$1\r\n9\r\n*1\r\n$9\r\n127.0.0.1\r\n",
    "a port that does not exist": b"*2\r\n$12\r\nconfig-epoch\r\n$1\r\n9\r\n*2\r\n$9\r\n127.0.0.1\r\n$5\r\n65536\r\n",
}


@pytest.mark.parametrize("answer", SENTINELS.values(), ids=SENTINELS.keys())
def test_sentinel__with_impossible_answers_counts_as_absent(proxy: LossyProxy, answer: bytes) -> None:
    """The others say where the master is."""
    right = b"*2\r\n$12\r\nconfig-epoch\r\n$1\r\n1\r\n*2\r\n$9\r\n127.0.0.1\r\n$4\r\n6379\r\n"

    upstream = f"redis://{proxy.upstream[0]}:{proxy.upstream[1]}/0"
    with lossy_proxy(upstream) as liar:
        addresses = f"127.0.0.1:{proxy.server_address[1]},127.0.0.1:{liar.server_address[1]}"
        url = f"redis+sentinel://{addresses}/service"
        proxy.deliver = lambda sock, data: sock.sendall(right if b"unknown command" in data else data)
        liar.deliver = lambda sock, data: sock.sendall(answer if b"unknown command" in data else data)
        try:
            with closing(RedisConnections(parse(url), 5.0)) as connections:
                assert connections.discover() == [("127.0.0.1", 6379)]
        finally:
            proxy.deliver = socket.socket.sendall


def test_counts__on_a_server_that_drips_fail_in_time(proxy: LossyProxy) -> None:
    with closing(SharedCounts("", proxy.url, "counts")) as counts, ThreadPoolExecutor(8) as pool:
        assert counts.acquire_sliding_window_entry("a", 1000, 60)
        with delivering(proxy, drip):
            for failed in [pool.submit(counts.acquire_sliding_window_entry, "a", 1000, 60) for _ in range(8)]:
                assert isinstance(failed.exception(LONG_S), errors.RedisError)
            assert not pool.submit(counts.check).result(LONG_S)
        assert counts.check()
        assert counts.acquire_sliding_window_entry("a", 1000, 60)


def test_server__whose_tls_handshake_drips_is_given_up() -> None:
    """Each byte arrives in time, and the handshake never ends."""

    def drip_record() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(b"\x16\x03\x03\x40\x00")
            while True:
                connection.sendall(b"\x02")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
        dripping = pool.submit(drip_record)
        url = f"rediss://127.0.0.1:{listener.getsockname()[1]}/0"
        with closing(pool.submit(RedisServer, url, 0.3, 0.1).result(LONG_S)) as server, pytest.raises(StoreUnavailable):
            server.check()
        dripping.result(LONG_S)

"""The client against servers that take their time or send what no server of this service sends: each call ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from service.client import AsyncClient, Client, ServerError
from service.client.transport import StreamBroken
from tests.harness.played_server import is_whole

LONG_S = 15  # a call that takes longer has no limit
TIMEOUT_S, RETRY_S = 0.5, 0.1
Send = Callable[[socket.socket], Any]
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextmanager
def sending(send: Send) -> Iterator[str]:
    """Answer each request with what `send` sends until the client closes the connection; yield the URL."""
    is_over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = b""
            while not is_whole(request):
                request += connection.recv(65_536)
            send(connection)
            while not is_over.is_set() and connection.recv(65_536):
                pass

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threads.submit(answer, listener.accept()[0])

    with ThreadPoolExecutor(32) as threads, socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=serve, args=(listener,))
        accepting.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            is_over.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()


def whole(data: bytes) -> Send:
    return lambda connection: connection.sendall(data)


def drip(before: bytes, dripped: bytes) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        for byte in itertools.cycle(dripped):
            time.sleep(0.05)  # much shorter than the time-out
            connection.sendall(bytes([byte]))

    return send


def pour(before: bytes, poured: bytes) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            connection.sendall(poured)

    return send


HOSTILE: dict[str, Send] = {
    "silent": lambda _connection: None,
    "a head that drips": drip(b"", JSON),
    "a body that drips": drip(JSON + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunks that drip": drip(JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "trailers that drip": drip(JSON + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    "endless headers": pour(JSON, b"a: b\r\n" * 1000),
    "an endless header": pour(JSON + b"a: ", b"b" * 2**16),
    "endless interim answers": pour(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless trailers": pour(JSON + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 100),
    "a huge length": whole(JSON + b"Content-Length: 99999999999999\r\n\r\n{}"),
    "a length that no number has": whole(JSON + b"Content-Length: -7x\r\n\r\n{}"),
    "a chunk of negative size": whole(JSON + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n12345\r\n0\r\n\r\n"),
    "a redirection": whole(
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    ),
    "a redirection in a circle": whole(b"HTTP/1.1 307 X\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
    "something compressed": whole(JSON + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"),
    "deep JSON": whole(JSON + b"Connection: close\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000),
    "deep JSON in an error": whole(
        JSON.replace(b"200 OK", b"500 Oh") + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000
    ),
    "a time to wait that no calendar has": whole(
        JSON.replace(b"200 OK", b"503 Oh")
        + b"Retry-After: Mon, 01 Jan 99999 00:00:00 GMT\r\nContent-Length: 2\r\n\r\n{}"
    ),
}


@pytest.mark.parametrize("send", HOSTILE.values(), ids=HOSTILE.keys())
def test_call__to_a_hostile_server_fails_in_time(send: Send) -> None:
    """And with an error that is documented."""

    async def call(url: str) -> None:
        async with AsyncClient(url, timeout_s=TIMEOUT_S, retry_s=RETRY_S) as client:
            await client.complete("ROMEO:")

    with (
        sending(send) as url,
        ThreadPoolExecutor(2) as pool,
        Client(url, timeout_s=TIMEOUT_S, retry_s=RETRY_S) as client,
    ):
        calls: list[Future[Any]] = [pool.submit(client.complete, "ROMEO:"), pool.submit(asyncio.run, call(url))]
        for error in [each.exception(LONG_S) for each in calls]:
            assert isinstance(error, OSError | StreamBroken | ServerError)


def test_call__reserves_no_memory_for_a_length_that_is_announced() -> None:
    send = whole(JSON + b"Content-Length: 1073741824\r\n\r\n{}")
    with sending(send) as url, Client(url, timeout_s=0.1, retry_s=0) as client:
        tracemalloc.start()
        try:
            with pytest.raises(TimeoutError):
                client.complete("ROMEO:")
            assert tracemalloc.get_traced_memory()[1] < 2**26
        finally:
            tracemalloc.stop()


ENDLESS: dict[str, Send] = {
    "an endless line": pour(EVENTS + b"data: ", b"x" * 2**20),
    "an endless event": pour(EVENTS, b"data: x\n" * 2**16),
    "deep JSON": whole(EVENTS + b"data: " + b"[" * 200_000 + b"\n\n"),
}


@pytest.mark.parametrize("send", ENDLESS.values(), ids=ENDLESS.keys())
def test_stream__of_a_hostile_server_has_limits(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.transport._MAX_EVENT_BYTES", 2**20)

    async def read(url: str) -> None:
        async with AsyncClient(url, timeout_s=TIMEOUT_S, retry_s=RETRY_S) as client:
            async for _ in client.stream("ROMEO:"):
                pass

    with sending(send) as url, ThreadPoolExecutor(2) as pool, Client(url, timeout_s=1, retry_s=RETRY_S) as client:
        calls: list[Future[Any]] = [pool.submit(list, client.stream("ROMEO:")), pool.submit(asyncio.run, read(url))]
        for error in [each.exception(LONG_S) for each in calls]:
            assert isinstance(error, StreamBroken)


def test_call__while_the_name_server_is_silent_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's look-up of a name takes up to half a minute."""
    answers, ask = threading.Event(), socket.getaddrinfo

    def look_up(host: str, *options: Any, **named: Any) -> list[Any]:
        if host != "server.test" or named.get("flags", 0) & socket.AI_NUMERICHOST:
            return ask(host, *options, **named)
        answers.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with ThreadPoolExecutor(1) as pool, closing(Client("http://server.test", timeout_s=0.2, retry_s=0.1)) as client:
        call = pool.submit(client.complete, "ROMEO:")
        try:
            assert isinstance(call.exception(LONG_S), OSError)
        finally:
            answers.set()


def test_connection__is_used_again_after_a_whole_body() -> None:
    """Whatever the way in which its length is told."""
    document = json.dumps({"data": [], "object": "list"}).encode()
    bodies = [
        JSON + b"Content-Length: %d\r\n\r\n%b" % (len(document), document),
        JSON + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(document), document),
    ]
    num_connections = 0

    def answer(connection: socket.socket) -> None:
        nonlocal num_connections
        num_connections += 1
        connection.settimeout(0.2)
        with suppress(TimeoutError):
            for body in itertools.cycle(bodies):
                connection.sendall(body)
                connection.recv(65_536)

    with sending(answer) as url, Client(url, timeout_s=5, retry_s=0) as client:
        for _ in range(4):
            assert client.models() == []
    assert num_connections == 1

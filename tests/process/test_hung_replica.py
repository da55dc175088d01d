"""A replica that hangs, behind the real balancer: its streams and calls end, and other replicas have its sessions."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from service.web.api.sse import PING_S
from tests.harness.balancer import Balancer, balancing, replicas, served_by
from tests.harness.redis_process import redis_process
from tests.harness.server import Server, ask
from tests.harness.wait import wait_until

# Other replicas answer for the sessions of one that hangs within this time, which is less than that after which the
# balancer ends a silent answer (15 s). It takes 2 s on an idle machine: benchmarks.survival measures it.
ANSWERED_S = 10
NUM_CHARS = 400_000


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with redis_process(tmp_path_factory.mktemp("redis")) as redis:
        yield {
            "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
            "GRU_SERVE_MODEL": "tiny",
            "GRU_SERVE_ENGINE_THREADS": "1",
            "GRU_SERVE_MAX_TOKENS": "10000000",
            "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
            "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
            "GRU_SERVE_SESSION_STORE": redis.url,
            "GRU_SERVE_DRAIN_S": "5",
            "GRU_SERVE_DRAIN_NOTICE_S": "1",
        }


def url(server: Server | Balancer) -> str:
    return f"http://127.0.0.1:{server.port}"


@contextmanager
def hanging(server: Server) -> Iterator[None]:
    """Stop both processes of a replica, and let them continue after the block."""
    pids = [server.process.pid, int(server.worker.name)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def server_of(balancer: Balancer, session_id: str) -> int:
    """Return the index of the replica to which the balancer sends a session's requests."""
    return int(served_by(balancer, "GET", f"/v1/sessions/{session_id}").removeprefix("sessions/app")) - 1


def test_hung_replica__costs_a_few_seconds_and_no_character(environment: dict[str, str]) -> None:
    """It hangs while it streams. The stream resumes by itself, and every session is fed by the other replicas.

    After it has woken up, what it had not saved overwrites nothing.
    """
    with replicas(3, environment) as servers, balancing([server.port for server in servers]) as balancer:
        with Client(url(servers[0])) as direct:
            whole = "".join(direct.create("ROMEO:", seed=7).generate(NUM_CHARS))
        with Client(url(balancer)) as client, ThreadPoolExecutor(12) as pool:
            session = client.create("ROMEO:", seed=7, id="streamed")
            others = [client.create("", id=f"fed{number}") for number in range(12)]
            hung = server_of(balancer, "streamed")
            pieces = session.generate(NUM_CHARS)
            text = next(pieces)
            with hanging(servers[hung]):
                stopped_at = time.monotonic()

                def feed(number: int) -> float:
                    with Client(url(balancer)) as own:
                        assert own.open(others[number].id).feed("ab").position == 2
                    return time.monotonic() - stopped_at

                fed = [pool.submit(feed, number) for number in range(12)]
                text += next(pieces)
                while time.monotonic() - stopped_at < 0.1:  # what had been sent before the replica was stopped
                    text += next(pieces)
                text += next(pieces)
                resumed_s = time.monotonic() - stopped_at
                assert max(each.result(30) for each in fed) < ANSWERED_S
                text += "".join(pieces)
                assert text == whole
                assert resumed_s < ANSWERED_S
            wait_until(lambda: balancer.up("sessions") == {1, 2, 3})
            assert client.open("streamed").text() == f"ROMEO:{whole}"
            assert all(other.text() == "ab" for other in others)


def test_hung_replica__ends_a_call_whose_outcome_nobody_knows(environment: dict[str, str]) -> None:
    """Its balancer must not say that nothing was done, nor do it again at another replica.

    Nor does the replica that wakes up: the client was told long ago that its call has ended.
    """
    with replicas(2, environment) as servers, balancing([server.port for server in servers]) as balancer:
        with Client(url(balancer)) as client:
            client.create("", id="fed")
        hung = server_of(balancer, "fed")
        with hanging(servers[hung]):
            started = time.monotonic()
            status, answer = balancer.call("POST", "/v1/sessions/fed/feed", {"text": "a"})
            assert time.monotonic() - started < ANSWERED_S
        assert (status, answer["error"]["code"]) in ((502, "outcome_unknown"), (504, "outcome_unknown"))
        with Client(url(balancer)) as client:
            wait_until(lambda: any(line["status"] == 499 for line in servers[hung].logged("request")))
            assert client.open("fed").position == 0


def test_draining_replica__ends_its_streams_itself(environment: dict[str, str]) -> None:
    """The balancer sends it nothing new, and lets its stream continue until the replica hands the session over."""
    # With the C++ kernel an idle machine generates the whole text in less than the drain time.
    with (
        replicas(2, environment | {"GRU_SERVE_KERNEL": "torch"}) as servers,
        balancing([server.port for server in servers]) as balancer,
    ):
        with Client(url(balancer)) as client:
            client.create("ROMEO:", seed=7, id="drained")
        draining = server_of(balancer, "drained")
        with closing(balancer.connect()) as connection:
            ask(connection, "POST", "/v1/sessions/drained/generate", {"max_tokens": 9_000_000, "stream": True})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.readline()
            servers[draining].process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            wait_until(lambda: balancer.up("sessions") == {2 - draining})
            events = [line for line in response if line.startswith(b"event: ")]
            assert events[-1] == b"event: reconnect\n"
            assert time.monotonic() - started > 2  # GRU_SERVE_DRAIN_S less the time in which runs are handed over


class SilentReplica(threading.Thread):
    """Passes the balancer's checks, sends the head of each stream and then nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []

    def run(self) -> None:
        """Answer until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(connection)
            connection.settimeout(5)
            if connection.recv(65_536).startswith(b"GET /readyz"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                connection.close()
            else:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(head)

    def close(self) -> None:
        """End everything."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(30)
        for connection in self.open:
            connection.close()


def test_silent_streams__end_after_the_time_of_one_ping_and_whole_answers_do_not() -> None:
    """A replica passes its checks and sends the head of each answer, but then nothing, not even pings."""
    streams: list[tuple[str, str, object]] = [
        ("GET", "/v1/sessions/a/generate", None),
        ("POST", "/v1/sessions/a/generate", {"stream": True}),
        ("POST", "/v1/completions", {"stream": True}),
    ]
    wholes: list[tuple[str, str, object]] = [
        ("POST", "/v1/sessions/a/generate", {"stream": False}),
        ("POST", "/v1/completions", {}),
    ]

    def wait(request: tuple[str, str, object]) -> None:
        """Check that an answer ends after the time in which a ping had to arrive, or has not ended until later."""
        is_stream, started = request in streams, time.monotonic()
        with closing(balancer.connect()) as connection:
            connection.timeout = 120.0 if is_stream else 18.0
            ask(connection, *request)
            end = http.client.IncompleteRead if is_stream else TimeoutError
            with connection.getresponse() as response, pytest.raises(end):
                response.read()
        assert time.monotonic() - started > PING_S + 4

    replica = SilentReplica()
    replica.start()
    try:
        with balancing([replica.port]) as balancer, ThreadPoolExecutor(len(streams) + len(wholes)) as pool:
            list(pool.map(wait, streams + wholes))
    finally:
        replica.close()

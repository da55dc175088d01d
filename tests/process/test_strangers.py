"""Strangers who need no key: idle connections, begun requests, and clients that never close their side.

Each attack runs against the real server. A session in its memory survives, others are answered meanwhile, and
afterwards descriptors and threads are what they were. `benchmarks.strangers` measures how long others wait meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from service.api_keys import new_key
from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.programs import program
from tests.harness.server import BODY, ENDLESS, SERVE, Server, ask, serving
from tests.harness.wait import wait_until

NUM_THREADS = 20  # the minimum for two texts that run and two that wait
NUM_STRANGERS = 3 * NUM_THREADS
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PING = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module", autouse=True)
def many_descriptors() -> Iterator[None]:
    """Let this process open the connections of all strangers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"the hard limit of descriptors is {hard}, and the strangers need 4,096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_MAX_BATCH": "2",
        "GRU_SERVE_MAX_QUEUE": "2",
        "GRU_SERVE_HTTP_THREADS": str(NUM_THREADS),
        "GRU_SERVE_MAX_BODY_BYTES": "3000000",
        "GRU_SERVE_SEND_TIMEOUT_S": "1",
    }


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[Server]:
    with serving(SERVE, environment) as server:
        yield server


def limited(num_descriptors: int, hard: int) -> list[str]:
    """Return the command of a server with a soft and a hard limit of descriptors."""
    code = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({num_descriptors}, {hard})); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", code, *SERVE]


def connect(server: Server, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """Return a connection on which `data` has been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30, source_address=(source, 0))
    if data:
        connection.sendall(data)
    return connection


@contextmanager
def strangers(
    server: Server, number: int, data: bytes = b"", source: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """Connections on which each client has sent `data`, and sends and reads nothing more."""
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server, data, source)) for _ in range(number)]


def num_files(server: Server) -> int:
    return len(os.listdir(server.worker / "fd"))


def num_threads(server: Server) -> int:
    return len(os.listdir(server.worker / "task"))


def cpu_s(server: Server) -> float:
    """Return the processor time that the worker has used."""
    fields = (server.worker / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed its side of a connection."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def peek(connection: socket.socket) -> bytes:
    """Return what has arrived, and leave it there."""
    try:
        return connection.recv(100, socket.MSG_PEEK) if select.select([connection], [], [], 0)[0] else b""
    except ConnectionResetError:
        return b""


@contextmanager
def unharmed(server: Server) -> Iterator[None]:
    """Check that an attack inside the block costs no session, and that it leaves no descriptor and no thread."""
    server.text()  # starts threads that the process starts when they are needed first
    with Client(f"http://127.0.0.1:{server.port}") as client:
        session = client.create("ROMEO:", seed=7)
        client.close()
        worker, files, threads = server.worker, num_files(server), num_threads(server)
        yield
        assert server.worker == worker
        assert client.open(session.id).text() == "ROMEO:"
        session.delete()
        client.close()
    wait_until(lambda: num_files(server) <= files)
    wait_until(lambda: num_threads(server) <= threads)  # idle threads end
    assert "Traceback" not in "".join(server.log)


def test_idle_connections__beyond_the_soft_limit_end_no_process(environment: dict[str, str]) -> None:
    with serving(limited(1024, 4096), environment) as server, unharmed(server), strangers(server, 1600) as held:
        assert len(server.text()) == 50
        assert not any(map(is_closed, held))


def test_idle_connections__delay_no_other(server: Server) -> None:
    with unharmed(server), strangers(server, 1600) as held:
        for _ in range(10):
            assert server.call("GET", "/healthz")[0] == 200
        assert len(server.text()) == 50
        assert not any(map(is_closed, held))


def test_idle_connections__beyond_the_hard_limit_displace_the_oldest_of_their_own_address(
    environment: dict[str, str],
) -> None:
    with serving(limited(300, 300), environment) as server, unharmed(server):
        honest = server.connect()
        ask(honest, "GET", "/healthz")
        assert honest.getresponse().read()
        with strangers(server, 600, source="127.0.0.2") as held:
            assert server.call("GET", "/healthz")[0] == 200
            wait_until(lambda: is_closed(held[0]))
            assert not is_closed(held[-1])
            ask(honest, "GET", "/healthz")
            assert honest.getresponse().read() == b'{"status":"ok"}'
        honest.close()


def test_descriptors__that_run_out_stop_nothing_but_accepting(server: Server) -> None:
    """The limit of the running process is lowered, as if other parts of it had opened many files."""
    with unharmed(server):
        idle = server.connect()
        ask(idle, "GET", "/healthz")
        assert idle.getresponse().read()
        pid = int(server.worker.name)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_files(server), limits[1]))
        with strangers(server, 10, PING) as waiting:
            began, used = time.monotonic(), cpu_s(server)
            time.sleep(1)  # the subject is what the process does in this time
            assert cpu_s(server) - used < 0.5 * (time.monotonic() - began)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            for connection in waiting:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        idle.close()


def test_threads__that_can_not_start_leave_the_others_working(environment: dict[str, str]) -> None:
    with serving([*as_user(), *SERVE], environment) as server, unharmed(server):
        limit_threads(server, 1)
        busy = [server.open(ENDLESS) for _ in range(4)]  # all places
        with strangers(server, NUM_STRANGERS, PING) as asking:
            for connection in asking:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with ExitStack() as stack:
            for _ in range(NUM_STRANGERS):
                connection = stack.enter_context(server.open(ENDLESS))
                assert connection.recv(100).startswith(b"HTTP/1.1 429")
        for connection in busy:
            connection.close()
        wait_until(lambda: server.call("POST", "/v1/completions", BODY)[0] == 200)
        limit_threads(server, 10_000)


def limit_threads(server: Server, number: int) -> None:
    """Set the soft limit of the threads of the worker's user."""
    command = [program("prlimit"), "--pid", server.worker.name, f"--nproc={number}:"]
    subprocess.run([*as_user(), *command], check=True)


def as_user() -> list[str]:
    """Return the beginning of a command that runs as a user whose number of threads can be limited, unlike root's."""
    if os.getuid() != 0:
        return []
    return [
        program("setpriv"), "--reuid=64321", "--clear-groups",
        "--inh-caps=-all,+dac_override", "--ambient-caps=+dac_override", "--bounding-set=-all,+dac_override",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [b"GET /healthz HTTP/1.1\r\nHo", HEAD + b"Content-Length: 100\r\n\r\n{", HEAD + b"Content-Length: 100\r\n\r\n"],
)
def test_begun_requests__hold_no_thread(server: Server, data: bytes) -> None:
    with unharmed(server), strangers(server, NUM_STRANGERS, data):
        for _ in range(3):
            assert len(server.text()) == 50
        with ExitStack() as stack:  # honest clients whose bodies arrive in two parts
            halves = [stack.enter_context(connect(server, HEAD + b"Content-Length: 16\r\n\r\n{")) for _ in range(8)]
            for connection in halves:
                connection.sendall(b'"prompt": "a" }')
                assert connection.recv(100).startswith((b"HTTP/1.1 200", b"HTTP/1.1 429"))


def test_bodies__have_a_budget_for_all_together(server: Server) -> None:
    """Bodies of 1.5 MB of which the last byte is missing: the oldest ones are refused when all take 16 MiB."""
    size = 1_500_000
    data = HEAD + f"Content-Length: {size}\r\n\r\n".encode() + b" " * (size - 1)
    with unharmed(server), strangers(server, 60, data) as held:
        wait_until(lambda: b"429" in peek(held[0]) or is_closed(held[0]))
        memory = int((server.worker / "statm").read_text().split()[1]) * resource.getpagesize()
        assert len(server.text()) == 50
        assert not is_closed(held[-1])
        held[-1].sendall(b" ")
        assert held[-1].recv(100).startswith(b"HTTP/1.1 400")
        assert memory < 400_000_000


def test_body_of_a_stranger__is_not_waited_for(environment: dict[str, str]) -> None:
    key, entry = new_key("alice")
    with serving(SERVE, environment | {"GRU_SERVE_API_KEYS": entry}) as server:
        for authorization in (b"", b"Authorization: Bearer nonsense\r\n"):
            length = b"Content-Length: 100\r\n"
            for framing in (length, b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n" + length):
                with connect(server, HEAD + authorization + framing + b"\r\n") as connection:
                    connection.settimeout(10)
                    assert connection.recv(100).startswith(b"HTTP/1.1 401")
        body = json.dumps(BODY).encode()
        head = HEAD + f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with connect(server, head) as connection:
            connection.sendall(body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_clients_that_never_close__hold_no_thread(server: Server) -> None:
    with unharmed(server), ExitStack() as stack:
        held, idle = [], num_threads(server)
        for _ in range(NUM_STRANGERS):
            held.append(stack.enter_context(connect(server, PING)))
            assert held[-1].recv(1000).startswith(b"HTTP/1.1 200")
        assert len(server.text()) == 50
        assert num_threads(server) <= idle
        wait_until(lambda: num_files(server) < NUM_STRANGERS)  # the server closes them, although the clients do not


def test_client_that_reads_slowly__is_dropped(server: Server) -> None:
    """It reads a byte now and then, so that it never is silent."""
    with unharmed(server):
        body = ENDLESS | {"prompt": "ROMEO" * 5000, "logprobs": 5, "echo": True, "max_tokens": 1000, "stream": False}
        with server.open(body, receive_bytes=4096) as connection:
            connection.settimeout(0.1)

            def is_reset() -> bool:
                try:
                    return connection.recv(1) == b""
                except TimeoutError:
                    return False
                except ConnectionResetError:
                    return True

            wait_until(lambda: is_reset() or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0)

"""Streams of sessions over real sockets, broken anywhere, half open and resumed; and the client that resumes them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import pytest

from service.client import Client, ServerError, Session
from service.store.model_store import ModelStore
from tests.harness.server import SERVE, Server, serving
from tests.harness.sse import Event
from tests.harness.wait import wait_until

NUM_STREAMS = int(os.environ.get("CUT_STREAMS", "1000"))
NUM_CHARS = 300


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    environment |= {"GRU_SERVE_ENGINE_THREADS": "1", "GRU_SERVE_MAX_TOKENS": "400000"}
    environment |= {"GRU_SERVE_SESSION_TEXT_CHARS": "500000"}
    with serving(SERVE, environment) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


@dataclass
class Received:
    """What has arrived of a stream in whole events."""

    position: int  # after the last event
    text: str = ""
    done: dict[str, Any] | None = None  # the data of the event `done`


def take_part(
    server: Server, path: str, body: object, received: Received, num_bytes: int | None, stack: ExitStack | None
) -> None:
    """Request a stream and read part of it. Only whole events count: the rest of an event that was cut off is dropped.

    Args:
        server: The server.
        path: Of the run.
        body: To begin the run; None to resume it after `received.position`.
        received: What has arrived so far; this adds to it.
        num_bytes: How many bytes are read; None for all.
        stack: Closes the connection when it ends; None to close it at once.
    """
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    if stack is not None:
        stack.enter_context(connection)
    try:
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{'POST' if body is not None else 'GET'} {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
        if body is None:
            head += f"Last-Event-ID: {received.position}\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        raw = b""
        while num_bytes is None or len(raw) < num_bytes:
            part = connection.recv(65_536 if num_bytes is None else num_bytes - len(raw))
            if not part:
                break
            raw += part
    finally:
        if stack is None:
            connection.close()
    head_bytes, _, rest = raw.partition(b"\r\n\r\n")
    if rest and b" 200 " not in head_bytes.split(b"\r\n")[0]:
        # Another connection has the run, or the request that begins it was cut off before the server had read it.
        assert b" 409 " in head_bytes.split(b"\r\n")[0], raw
        return
    for block in rest.split(b"\n\n")[:-1]:
        event = Event.parse(block.decode())
        if event.kind == "text":
            received.text += event.data["text"]
            received.position = event.id
        elif event.kind == "done":
            received.done = event.data
        else:
            assert event.data["error"]["code"] == "run_taken_over"


def test_broken_streams__lose_double_and_change_no_character(server: Server) -> None:
    """Streams break at random bytes, also inside events; they are closed or left half open, and resumed."""
    whole = {}
    for seed in range(8):
        status, answer = server.call("PUT", f"/v1/sessions/whole{seed}", {"text": "ROMEO:", "seed": seed})
        assert status == 201, answer
        answer = server.call("POST", f"/v1/sessions/whole{seed}/generate", {"max_tokens": NUM_CHARS})[1]
        whole[seed] = answer["text"]

    def stream(number: int) -> list[str]:
        chance = random.Random(number)
        seed, path = number % 8, f"/v1/sessions/cut{number}"
        assert server.call("PUT", path, {"text": "ROMEO:", "seed": seed})[0] == 201
        received, begin = Received(6), {"max_tokens": NUM_CHARS, "stream": True, "position": 6}
        with ExitStack() as stack:
            for _ in range(chance.randint(1, 3)):
                # From nothing to more than the whole stream.
                num_bytes = chance.choice([0, 200, 450, 700, 1000, 2000]) + chance.randrange(250)
                half_open = stack if chance.random() < 0.4 else None
                # A client without a character repeats its first request: the server may never have received it.
                body = begin if received.position == 6 else None
                take_part(server, f"{path}/generate", body, received, num_bytes, half_open)
            while received.done is None:
                body = begin if received.position == 6 else None
                take_part(server, f"{path}/generate", body, received, None, None)
        wrong = []
        if received.text != whole[seed]:
            wrong.append(f"{number}: {received.text!r}")
        if received.done["sha256"] != hashlib.sha256(whole[seed].encode()).hexdigest():
            wrong.append(f"{number}: {received.done}")
        if server.call("GET", f"{path}/text")[1]["text"] != "ROMEO:" + whole[seed]:
            wrong.append(f"{number}: text")
        return wrong

    with ThreadPoolExecutor(6) as pool:
        wrong = [one for found in pool.map(stream, range(NUM_STREAMS)) for one in found]
    assert wrong == []


def test_client_that_leaves__stops_the_run(server: Server, client: Client) -> None:
    session = client.create("ROMEO:", seed=7)
    pieces = session.generate(60_000)
    first = next(pieces)
    pieces.close()
    assert session.position == 6 + len(first)
    assert session.text() == "ROMEO:" + first  # characters that the client has not read are dropped
    rest = "".join(session.generate(50))
    again = client.create("ROMEO:", seed=7)
    assert "".join(again.generate(len(first) + 50)) == first + rest
    assert server.call("GET", f"/v1/sessions/{session.id}")[1]["position"] == session.position


def test_two_clients_of_a_stream__both_get_all_of_it_and_take_it_from_each_other_once(
    server: Server, client: Client
) -> None:
    num_chars = 200_000
    whole = "".join(client.create("ROMEO:", seed=7).generate(num_chars))
    first = client.create("ROMEO:", seed=7, id="shared")
    second = client.open("shared")
    num_before = len(server.logged("session stream ended"))
    pieces, others = first.generate(num_chars), second.generate(num_chars)
    text, other_text = next(pieces), next(others)
    with ThreadPoolExecutor(2) as pool:
        rest, other_rest = pool.submit("".join, pieces), pool.submit("".join, others)
        assert text + rest.result(60) == whole
        assert other_text + other_rest.result(60) == whole

    def endings() -> list[str]:
        return [line["ending"] for line in server.logged("session stream ended")[num_before:]]

    wait_until(lambda: "run_taken_over" in endings())
    assert endings().count("run_taken_over") == 1


class Proxy:
    """A proxy that breaks each connection after a random number of bytes of the answer."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._chance, self.num_cuts = port, random.Random(seed), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with closing(connection):
                self._forward(connection, self._chance.choice([0, 30, 300, 500, 800, 1500, 10_000]))

    def _forward(self, connection: socket.socket, num_bytes: int) -> None:
        """Forward one request, and `num_bytes` of its answer."""
        connection.settimeout(5)
        request = b""
        try:
            while b"\r\n\r\n" not in request:
                request += _received(connection)
            head, _, body = request.partition(b"\r\n\r\n")
            size = next(
                (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            while len(body) < size:
                body += _received(connection)
        except OSError:
            return
        with socket.create_connection(("127.0.0.1", self._port), timeout=20) as upstream:
            upstream.sendall(head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n" + body)
            while num_bytes > 0 and (data := upstream.recv(min(num_bytes, 65_536))):
                connection.sendall(data)
                num_bytes -= len(data)
        self.num_cuts += num_bytes == 0


def _received(connection: socket.socket) -> bytes:
    """Return the next bytes. Raise ConnectionError if the other side has closed."""
    part = connection.recv(65_536)
    if not part:
        raise ConnectionError("closed before the request was whole")
    return part


def test_client__gets_everything_through_a_connection_that_keeps_breaking(server: Server) -> None:
    with Client(f"http://127.0.0.1:{server.port}") as steady:
        twin = steady.create("ROMEO:", seed=7)
        whole = "".join(twin.generate(600, temperature=0.9))
        fed = twin.feed("and then", logprobs=0)
        later = "".join(twin.generate(100))
        with closing(Proxy(server.port, 1)) as proxy, Client(f"http://127.0.0.1:{proxy.port}", retry_s=60) as client:
            session = client.create("ROMEO:", seed=7)
            assert "".join(session.generate(600, temperature=0.9)) == whole
            assert session.feed("and then", logprobs=0) == fed
            fork = session.fork()
            assert "".join(session.generate(100)) == "".join(fork.generate(100)) == later
            session.rewind(300)
            assert session.text() == ("ROMEO:" + whole)[:300]
            moved = client.load(session.save())
            assert (moved.position, moved.seed) == (300, 7)
            session.delete()
            session.delete()
            assert proxy.num_cuts > 10
        assert steady.open(fork.id).text() == "ROMEO:" + whole + "and then" + later


def test_client__raises_refusals_with_their_code(client: Client) -> None:
    session = client.create("ROMEO:")
    with pytest.raises(ServerError) as error:
        session.feed("é")
    assert (error.value.status, error.value.code, error.value.param) == (400, "unknown_characters", "text")
    other = client.open(session.id)
    other.feed("abc")
    with pytest.raises(ServerError) as error:
        session.feed("xyz")
    assert (error.value.status, error.value.code, error.value.position) == (409, "position_conflict", 9)
    with pytest.raises(ServerError) as error:
        next(session.generate(10))
    assert error.value.code == "position_conflict"
    with pytest.raises(ServerError):
        session.feed("xyz")
    assert other.text() == "ROMEO:abc"  # the refused feed removed nothing that the other client wrote
    with pytest.raises(ServerError):
        client.open("nobody")
    with pytest.raises(ServerError):
        next(session.generate(10**9))
    with pytest.raises(ValueError, match="address"):
        Client("somewhere")


def test_sessions_side_by_side__keep_their_own_texts(client: Client) -> None:
    texts = {f"side{number}": "".join(random.Random(number).choices("abcdefgh ", k=40)) for number in range(16)}

    def write(name: str) -> Session:
        session = client.create(id=name)
        for char in texts[name]:
            session.feed(char)
        return session

    with ThreadPoolExecutor(16) as pool:
        for session in pool.map(write, texts):
            assert session.text() == texts[session.id]

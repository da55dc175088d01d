"""Measures a million sessions in memory, and feeds over HTTP.

    python -m benchmarks.sessions [--sessions 1000000] [--clients 32] [--rounds 7] [--only store|feeds] [--json FILE]

- memory: what a million open sessions take, and how fast they are created in the store. They get random states, so that
  the network computes nothing.
- constant time: loading a session, feeding it a character, and expiry, in a store of 10,000 sessions and in one of a
  million.
- feeds: concurrent clients feed a character to a session each. They are compared with an empty Flask route of the same
  server that gets the same requests, and with GETs of that route.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.http import is_ready, report
from benchmarks.pairs import in_turns
from benchmarks.table import machine, summary
from service.engine.kernels import choose_kernel
from service.generation.session_service import FeedRequest, SessionService
from service.registry.loaded_models import EngineSettings, LoadedModel, LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.session import Session, SessionKey
from service.sessions.text import Retention, Text
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.gunicorn.server import Server
from tests.harness.clock import Clock
from tests.harness.programs import free_port

GIB = 2**30
NUM_CHARS = 64
FEW = 10_000
Figures = dict[str, object]


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure a million sessions in memory, and feeds over HTTP.")
    parser.add_argument("--sessions", type=int, default=1_000_000, help="sessions in the large store  [1000000]")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients of the feeds  [32]")
    parser.add_argument("--seconds", type=float, default=2, help="seconds of each round of feeds  [2]")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds  [7]")
    parser.add_argument("--only", choices=["store", "feeds"], help="run only this part  [both]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: Figures = {"machine": machine()}
    if options.only != "feeds":
        connection, worker_connection = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=store_main, args=(options.sessions, options.rounds, worker_connection)
        )
        process.start()  # a process of its own, whose memory holds nothing else
        figures["store"] = connection.recv()
        process.join()
    if options.only != "store":
        with serving_with_empty_route() as port:
            figures["feeds"] = feeds(port, options.clients, options.seconds, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


class Bench:
    """A store with sessions of the shipped model and a clock that is set by hand."""

    def __init__(self, models: LoadedModels, model: LoadedModel) -> None:
        self.clock = Clock()
        self.store = MemoryStore(10**8, 2**44, self.clock, self.clock)
        self.sessions = SessionService(models, self.store, StateSealer(["k" * 16]), 3600, Retention(), self.clock)
        self.model, self.chance = model, random.Random(1)
        self.ids: list[str] = []
        self._letters = "".join(self.chance.choices(model.charset.characters, k=100_000))
        generator = np.random.default_rng(1)
        self.states = generator.uniform(-1, 1, (64, *model.state_shape)).astype(np.float32)

    def put(self, ttl_s: float = 10**7) -> str:
        """Create a session with a text of 64 characters, and return its id."""
        session_id = f"{self.chance.getrandbits(128):032x}"
        start = self.chance.randrange(len(self._letters) - NUM_CHARS)
        self.store.create(
            Session(
                id=session_id,
                owner="",
                model=self.model.version.ref,
                identity=self.model.identity,
                seed=self.chance.getrandbits(53),
                ttl_s=ttl_s,
                created_at=0,
                expires_at=0,
                text=Text(self.states[len(self.ids) % 64], tail=self._letters[start : start + NUM_CHARS]),
            )
        )
        return session_id

    def fill(self, num_sessions: int) -> float:
        """Create sessions up to a number of them. Return how many were created a second."""
        began, before = time.perf_counter(), len(self.ids)
        while len(self.ids) < num_sessions:
            self.ids.append(self.put())
        return (num_sessions - before) / (time.perf_counter() - began)

    def get_us(self, num_calls: int = 3000) -> float:
        """Return the microseconds that loading a session takes."""
        ids = self.chance.choices(self.ids, k=num_calls)
        began = time.perf_counter()
        for session_id in ids:
            self.sessions.get(SessionKey("", session_id))
        return (time.perf_counter() - began) / num_calls * 1e6

    def feed_us(self, num_calls: int = 300) -> float:
        """Return the microseconds that feeding a character to a session takes."""
        ids = self.chance.choices(self.ids, k=num_calls)
        began = time.perf_counter()
        for session_id in ids:
            self.sessions.feed(SessionKey("", session_id), FeedRequest("e", num_next=20))
        return (time.perf_counter() - began) / num_calls * 1e6

    def expire_us(self, num_sessions: int = 1000) -> float:
        """Return the microseconds that removing an expired session takes."""
        for _ in range(num_sessions):
            self.put(ttl_s=1)
        self.clock.now += 3
        num_removed, began = 0, time.perf_counter()
        while removed := self.store.sweep(256):
            num_removed += removed
        assert num_removed == num_sessions
        return (time.perf_counter() - began) / num_sessions * 1e6


def store_main(num_sessions: int, rounds: int, results: Connection) -> None:
    """Measure the store, in a process of its own, and send the figures."""
    settings = Settings()
    kernel = choose_kernel(settings.kernel, settings.num_engine_threads)
    models = LoadedModels(ModelStore(settings.store_root), 1, EngineSettings(kernel))
    model = models.get(settings.model)
    few, many = Bench(models, model), Bench(models, model)
    few.fill(FEW)
    before = resident_bytes()
    rate = many.fill(num_sessions)
    resident = resident_bytes()
    print(f"{num_sessions:,} open sessions with {NUM_CHARS} characters of text each:")
    report("  resident memory of the process", resident / GIB, "GiB", "at most 5.5 for a million")
    counted = many.store.num_bytes / num_sessions
    print(f"    {(resident - before) / num_sessions:,.0f} bytes a session; the store counts {counted:,.0f}")
    report("  created in the store", rate, "a second", "at least 20,000")
    figures: Figures = {"resident_bytes": resident, "put_per_s": rate}
    for what, description in (("get", "loading a session"), ("feed", "feeding a character"), ("expire", "expiry")):
        measures: list[Callable[[], float]] = [getattr(bench, f"{what}_us") for bench in (few, many)]
        small, large = in_turns(measures, rounds)
        ratios = [large_us / small_us for large_us, small_us in zip(large, small, strict=True)]
        times = f"{statistics.median(small):.1f} us with {FEW:,}, {statistics.median(large):.1f} with {num_sessions:,}"
        print(f"{description}: {times}")
        report("  ratio", statistics.median(ratios), f"times ({min(ratios):.2f} to {max(ratios):.2f})", "at most 1.5")
        figures[what] = {"few_us": summary(small), "many_us": summary(large), "ratio": summary(ratios)}
    models.close()
    results.send(figures)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def feeds(port: int, num_clients: int, seconds: float, rounds: int) -> Figures:
    """Measure the requests a second of feeds and of an empty route, in turns."""
    names = [f"/v1/sessions/bench{number}" for number in range(num_clients)]
    body = {"text": "e"}
    kinds = {
        "feed": [request("POST", f"{name}/feed", body) for name in names],
        "same": [request("POST", "/empty", body)] * num_clients,
        "get": [request("GET", "/empty")] * num_clients,
    }
    with Clients(port, num_clients) as clients:
        clients.repeat([request("PUT", name, {"text": "ROMEO:"}) for name in names], 0)
        measures = [lambda requests=requests: clients.repeat(requests, seconds) for requests in kinds.values()]
        rates = dict(zip(kinds, in_turns(measures, rounds), strict=True))
    fed = rates["feed"]
    print(f"requests/s of {num_clients} clients, {rounds} rounds: feeds of a character {statistics.median(fed):,.0f}")
    figures: Figures = {"feeds": summary(fed)}
    for kind, what in (("same", "an empty route with the same requests"), ("get", "GETs of an empty route")):
        ratios = [feed_rate / rate for feed_rate, rate in zip(fed, rates[kind], strict=True)]
        print(f"  {what}: {statistics.median(rates[kind]):,.0f}")
        spread = f"% ({100 * min(ratios):.0f} to {100 * max(ratios):.0f})"
        report("    feeds / empty route", 100 * statistics.median(ratios), spread, "at least 60")
        figures[kind] = {"rate": summary(rates[kind]), "ratio": summary(ratios)}
    return figures


@contextmanager
def serving_with_empty_route() -> Iterator[int]:
    """Run the server with the shipped model and an additional, empty route, on a free port, until the block ends."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve_main, args=(port,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not is_ready(port):
            assert process.is_alive(), "the server has ended"
            assert time.monotonic() < deadline, "the server doesn't become ready"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.join(60)


def serve_main(port: int) -> None:
    """Run the server, in a process of its own."""

    class WithEmptyRoute(Server):
        def load(self) -> Any:
            app = super().load()
            app.add_url_rule("/empty", view_func=lambda: "", methods=["GET", "POST"])
            return app

    WithEmptyRoute(Settings(port=port, log_level="warning")).run()


def request(method: str, path: str, body: object = None) -> bytes:
    """Return all bytes of a request."""
    data = json.dumps(body) if body is not None else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()


class Clients:
    """Persistent connections with one request at a time on each. One thread runs all of them."""

    def __init__(self, port: int, number: int) -> None:
        self._stack = ExitStack()
        connect = socket.create_connection
        self._sockets = [self._stack.enter_context(connect(("127.0.0.1", port))) for _ in range(number)]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def repeat(self, requests: list[bytes], seconds: float) -> float:
        """Let each client repeat its request, at least once, for a number of seconds. Return the responses a second."""
        num_responses, num_open, began = 0, len(requests), time.perf_counter()
        parts = dict.fromkeys(self._sockets, b"")
        with selectors.DefaultSelector() as selector:
            for connection, data in zip(self._sockets, requests, strict=True):
                selector.register(connection, selectors.EVENT_READ, (connection, data))
                connection.sendall(data)
            while num_open:
                for key, _ in selector.select():
                    connection, data = key.data
                    parts[connection] += connection.recv(65_536)
                    if not is_complete(parts[connection]):
                        continue
                    assert parts[connection].startswith(b"HTTP/1.1 20"), parts[connection]
                    parts[connection] = b""
                    num_responses += 1
                    if time.perf_counter() - began < seconds:
                        connection.sendall(data)
                    else:
                        num_open -= 1
        return num_responses / (time.perf_counter() - began)


def is_complete(response: bytes) -> bool:
    """Whether the bytes are a whole response, with all headers and the whole body."""
    head, separator, body = response.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = head.lower().index(b"content-length:") + len(b"content-length:")
    return len(body) >= int(head[length:].split(b"\r\n", 1)[0])


if __name__ == "__main__":
    main()

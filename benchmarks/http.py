"""Measures the server from the side of its clients: throughput, the first character, refusals and fairness.

    python -m benchmarks.http [--streams 64] [--seconds 20] [--rounds 5] [--json FILE]

Server, engine and clients share the cores of this machine and connect over 127.0.0.1. One thread runs all clients on
plain sockets; it looks only for the ends of streams and parses nothing else.

- throughput: characters/s of concurrent streams, compared with the engine alone, which generates as many texts in a
  process of its own.
- first character: the time from sending a request with a new prompt of 16 characters to its first event, beside the
  round trip of an empty request (/healthz).
- refusals: the time until a client is refused when the server is full. There are ten clients for each text that the
  server can hold; they try once a second, as Retry-After says, or all at once.
- fairness: the time between two events of a stream, for 50 streams, with and without a concurrent prompt of 100,000
  characters.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.pairs import in_turns
from benchmarks.table import machine, summary
from service.engine.kernels import choose_kernel
from service.engine.request import Request
from service.registry.loaded_models import EngineSettings, LoadedModel
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.programs import free_port

PROMPT = "ROMEO:"
DONE = b"data: [DONE]\n\n"
ENDLESS = 10_000_000
LETTERS = "abcdefghijklmnopqrstuvwxyz    "
Figures = dict[str, object]


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure the server from the side of its clients.")
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams of the throughput  [64]")
    parser.add_argument("--seconds", type=float, default=20, help="approximate seconds of each measurement  [20]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of throughput and fairness  [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: Figures = {"machine": machine(), "streams": options.streams}
    with serving() as port:
        figures["throughput"] = throughput(port, options.streams, options.seconds, options.rounds)
        figures["first_character_ms"] = first_character(port, options.seconds)
        figures["fairness"] = fairness(port, options.seconds, options.rounds)
    with serving(GRU_SERVE_MAX_BATCH="8", GRU_SERVE_MAX_QUEUE="8") as port:
        figures["refusals_ms"] = refusals(port, 16, options.seconds)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def throughput(port: int, num_streams: int, seconds: float, rounds: int) -> Figures:
    """Measure the characters/s of the engine alone and of streams, in turns."""
    round_s = seconds / rounds
    with engine_process() as count_characters:
        num_chars = max(50, int(count_characters(num_streams, 200) * round_s / num_streams))

        def streamed() -> float:
            began = time.perf_counter()
            bodies = [body(max_tokens=num_chars, seed=seed) for seed in range(num_streams)]
            with Streams(port, bodies) as streams:
                streams.run(60 + 20 * round_s)
                assert streams.num_done == num_streams, "a stream was not finished in time"
            return num_streams * num_chars / (time.perf_counter() - began)

        engine, served = in_turns([lambda: count_characters(num_streams, num_chars), streamed], rounds)
    ratios = [http_rate / engine_rate for http_rate, engine_rate in zip(served, engine, strict=True)]
    print(f"characters/s of {num_streams} concurrent texts of {num_chars} characters, {rounds} rounds:")
    print(f"  engine alone {statistics.median(engine):,.0f}, over HTTP {statistics.median(served):,.0f}")
    report("  over HTTP / engine alone", 100 * statistics.median(ratios), "%", "at least 70")
    return {"engine": summary(engine), "http": summary(served), "ratio": summary(ratios)}


def first_character(port: int, seconds: float) -> Figures:
    """Measure the milliseconds to the first event, and of an empty round trip."""
    chance = random.Random(1)
    firsts: list[float] = []
    empties: list[float] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    until = time.perf_counter() + seconds / 2
    while time.perf_counter() < until and len(firsts) < 300:
        prompt = "".join(chance.choices(LETTERS, k=16))
        began = time.perf_counter()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        empties.append(time.perf_counter() - began)
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", *posted(body(prompt=prompt, max_tokens=32)))
        response = connection.getresponse()
        event = response.readline()
        firsts.append(time.perf_counter() - began)
        assert json.loads(event[6:])["choices"][0]["text"]
        response.read()
    connection.close()
    print(f"time to the first character of a 16-character prompt, idle server, {len(firsts)} requests:")
    report("  median", 1000 * statistics.median(firsts), "ms", "at most 10")
    print(f"  median of an empty round trip (/healthz): {1000 * statistics.median(empties):.1f} ms")
    return {"first": percentiles(firsts), "empty": percentiles(empties)}


def refusals(port: int, capacity: int, seconds: float) -> Figures:
    """Measure the milliseconds to a refusal by a server that already has as many texts as its capacity."""
    accepted = [body(max_tokens=8192, seed=seed) for seed in range(capacity)]
    with Streams(port, accepted) as streams:
        streams.run(30, until=lambda: min(streams.num_bytes) > 0)
        calm = refused(port, 10 * capacity, min(seconds, 5), spread_s=1.0)
        burst = refused(port, 10 * capacity, 0, spread_s=0.0)
    print(f"time to a refusal, {10 * capacity} clients of a server with {capacity} texts:")
    report("  each client tries once a second: median", statistics.median(calm) * 1000, "ms", "under 50")
    print(f"    99 %: {percentile(calm, 99) * 1000:.1f} ms, of {len(calm)} refusals")
    median_ms, p99_ms = statistics.median(burst) * 1000, percentile(burst, 99) * 1000
    print(f"  all clients at once: median {median_ms:.1f} ms, 99 % {p99_ms:.1f} ms")
    return {"once_a_second": percentiles(calm), "all_at_once": percentiles(burst)}


def refused(port: int, num_clients: int, seconds: float, spread_s: float) -> list[float]:
    """Return the seconds from sending to the response, for each refusal.

    The clients start at random moments within `spread_s`, and each tries once a second.
    """
    chance = random.Random(1)
    began = time.perf_counter()
    due = sorted(began + chance.uniform(0, spread_s) + second for second in range(int(seconds) + 1)
                 for _ in range(num_clients))  # fmt: skip
    sent: dict[socket.socket, float] = {}
    answered = []
    data = request(body(max_tokens=10))
    with selectors.DefaultSelector() as selector:
        while due or sent:
            now = time.perf_counter()
            while due and due[0] <= now:
                due.pop(0)
                connection = socket.create_connection(("127.0.0.1", port))
                sent[connection] = time.perf_counter()
                connection.sendall(data)
                selector.register(connection, selectors.EVENT_READ, connection)
            for key, _ in selector.select(max(0.0, due[0] - now) if due else 1):
                connection = key.data
                is_refused = connection.recv(65_536).startswith(b"HTTP/1.1 429")
                latency = time.perf_counter() - sent.pop(connection)
                if is_refused:
                    answered.append(latency)
                selector.unregister(connection)
                connection.close()
    return answered


def fairness(port: int, seconds: float, rounds: int, num_streams: int = 50) -> Figures:
    """Measure the 99th percentile of the time between two events, without and with a concurrent long prompt, in ms."""
    chance = random.Random(2)

    def gap(num_prompts: int) -> float:
        bodies = [body(max_tokens=8192, seed=seed) for seed in range(num_streams)]
        with Streams(port, bodies) as streams:
            streams.run(30, until=lambda: min(streams.num_bytes) > 0)
            # Each prompt is a new one, because the states after earlier prompts are cached.
            long = [body(prompt="".join(chance.choices(LETTERS, k=100_000)), max_tokens=1) for _ in range(num_prompts)]
            with Streams(port, long) as reading:
                streams.gaps.clear()
                streams.run(seconds / rounds / 2)
                assert reading.num_done == 0
            return percentile(streams.gaps, 99) * 1000

    alone, beside = in_turns([lambda: gap(0), lambda: gap(1)], rounds)
    ratios = [with_prompt / without for with_prompt, without in zip(beside, alone, strict=True)]
    print(f"99th percentile of the time between events of {num_streams} streams, {rounds} rounds:")
    print(f"  alone {statistics.median(alone):.1f} ms, beside a prompt of 100,000 {statistics.median(beside):.1f} ms")
    report("  beside the prompt / alone", statistics.median(ratios), "times", "at most 2")
    return {"alone_ms": summary(alone), "beside_ms": summary(beside), "ratio": summary(ratios)}


@dataclass
class Streams:
    """Concurrent streams, which the thread that calls `run` reads."""

    port: int  # of the server
    bodies: Sequence[dict[str, object]]  # a request for each stream
    num_done: int = 0  # streams that have ended as they should
    gaps: list[float] = field(default_factory=list)  # seconds between two readings of the same stream, of all streams
    num_bytes: list[int] = field(default_factory=list)  # received so far, for each stream

    def __enter__(self) -> Streams:
        self._stack = ExitStack()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._last = [time.perf_counter()] * len(self.bodies)
        self._tails = [b""] * len(self.bodies)
        self.num_bytes = [0] * len(self.bodies)
        for index, request_body in enumerate(self.bodies):
            connection = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
            connection.sendall(request(request_body))
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, (connection, index))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Read for a number of seconds, or until `until()` is true or all streams have ended."""
        deadline = time.perf_counter() + seconds
        while self.num_done < len(self.bodies) and (now := time.perf_counter()) < deadline and not until():
            for key, _ in self._selector.select(deadline - now):
                self._read(*key.data)

    def _read(self, connection: socket.socket, index: int) -> None:
        data, now = connection.recv(262_144), time.perf_counter()
        if self.num_bytes[index] == 0:
            assert data.startswith(b"HTTP/1.1 200"), data[:500]
        self.gaps.append(now - self._last[index])
        self._last[index] = now
        self.num_bytes[index] += len(data)
        self._tails[index] = (self._tails[index] + data)[-64:]
        is_done = DONE in self._tails[index]
        if is_done or not data:
            self.num_done += is_done
            self._selector.unregister(connection)


@contextmanager
def serving(**settings: str) -> Iterator[int]:
    """The real server with the shipped model, on a free port."""
    port = free_port()  # at its log level the server does not report a port of its own choice
    command = [sys.executable, "-m", "service", "serve", "--port", str(port)]
    environment = os.environ | {"GRU_SERVE_LOG_LEVEL": "warning"} | settings
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not is_ready(port):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server doesn't become ready"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def is_ready(port: int) -> bool:
    """Whether the server takes requests."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def engine_process() -> Iterator[Callable[[int, int], float]]:
    """Start a process with only the engine, until the block ends.

    Yields a function that takes a number of texts and a number of characters for each, and returns characters/s.
    """
    context = multiprocessing.get_context("spawn")
    connection, worker_connection = context.Pipe()
    process = context.Process(target=engine_main, args=(worker_connection,))
    process.start()

    def measure(num_texts: int, num_chars: int) -> float:
        connection.send((num_texts, num_chars))
        rate: float = connection.recv()
        return rate

    try:
        yield measure
    finally:
        connection.send(None)
        process.join(30)


def engine_main(orders: Connection) -> None:
    """Generate as the server does, but without HTTP."""
    settings = Settings()
    kernel = choose_kernel(settings.kernel, settings.num_engine_threads)
    engine_settings = EngineSettings(kernel, settings.integer_precision, settings.max_batch, settings.max_queue)
    model = LoadedModel(*ModelStore(settings.store_root).load(settings.model), engine_settings)
    prompt = model.charset.encode(PROMPT)
    while (order := orders.recv()) is not None:
        num_texts, num_chars = order
        began = time.perf_counter()
        for handle in model.engine.submit([Request(prompt, num_chars, seed) for seed in range(num_texts)]):
            handle.wait()
        orders.send(num_texts * num_chars / (time.perf_counter() - began))
    model.engine.close()


def body(**changes: object) -> dict[str, object]:
    """Return the body of a request for a streamed completion."""
    return {"prompt": PROMPT, "stream": True} | changes


def posted(request_body: dict[str, object]) -> tuple[str, dict[str, str]]:
    """Return the body and the headers of a request."""
    return json.dumps(request_body), {"Content-Type": "application/json"}


def request(request_body: dict[str, object], **more_headers: str) -> bytes:
    """Return all bytes of a request for a completion."""
    data, headers = posted(request_body)
    head = "".join(f"{name}: {value}\r\n" for name, value in (headers | more_headers).items())
    first = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    return f"{first}{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of some values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """Return the number, the median and the 99th percentile of some times, in milliseconds, for JSON."""
    return {"num": len(values_s), "median": 1000 * statistics.median(values_s), "p99": 1000 * percentile(values_s, 99)}


def report(what: str, value: float, unit: str, target: str) -> None:
    """Print a figure with its target."""
    print(f"{what}: {value:.1f} {unit} (target: {target})", flush=True)


if __name__ == "__main__":
    main()

"""Measures what a shared session store costs, and what several replicas gain.

    python -m benchmarks.deploy [--clients 32] [--streams 48] [--seconds 2] [--rounds 7] [--json FILE]

Needs `redis-server`.

- store: session requests a second of a server that stores sessions in Redis, compared with one that stores them in
  memory: feeds of a character, runs of 20 characters, and reads of the session's description.
- memory: what a session takes of Redis' memory, with 64 characters and with 60,000 of a text of its own.
- replicas: characters/s of streams on three servers, compared with one server on the same cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
from redis import Redis

from benchmarks.http import is_ready, report
from benchmarks.pairs import in_turns
from benchmarks.sessions import Clients, request
from benchmarks.table import machine, summary
from service.arrays import Float32
from service.errors import StoreUnavailable
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session
from service.sessions.text import Retention, Text
from service.settings import Settings
from service.web.gunicorn.server import Server
from tests.harness.programs import free_port
from tests.harness.redis_process import redis_process

Figures = dict[str, object]


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure sessions in Redis, and several replicas.")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients of sessions  [32]")
    parser.add_argument("--streams", type=int, default=48, help="concurrent streams of the replicas  [48]")
    parser.add_argument("--seconds", type=float, default=2, help="seconds of each round  [2]")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds  [7]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: Figures = {"machine": machine()}
    with tempfile.TemporaryDirectory() as directory, redis_process(Path(directory), "--appendonly", "yes") as redis:
        with serving() as memory, serving(session_store=redis.url) as shared:
            figures["store"] = store(memory, shared, options.clients, options.seconds, options.rounds)
            figures["memory"] = {str(num_chars): session_bytes(num_chars) for num_chars in (64, 60_000)}
        with ExitStack() as stack:
            ports = [stack.enter_context(serving(session_store=redis.url)) for _ in range(3)]
            figures["replicas"] = replicas(ports, options.streams, options.seconds, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def store(memory: int, shared: int, num_clients: int, seconds: float, rounds: int) -> Figures:
    """Measure the requests a second with both stores, whose servers listen on the ports `memory` and `shared`."""
    # Each kind of request has sessions of its own, so that their texts are equally long with both stores.
    feeds, runs, reads = (
        [f"/v1/sessions/{kind}{number}" for number in range(num_clients)] for kind in ("feed", "run", "read")
    )
    kinds = {
        "feeds of a character": (feeds, [request("POST", f"{name}/feed", {"text": "e"}) for name in feeds]),
        "runs of 20 characters": (runs, [request("POST", f"{name}/generate", {"max_tokens": 20}) for name in runs]),
        "reads of the description": (reads, [request("GET", name) for name in reads]),
    }
    figures: Figures = {}
    with Clients(memory, num_clients) as memory_clients, Clients(shared, num_clients) as redis_clients:
        both = (memory_clients, redis_clients)
        for what, (names, requests) in kinds.items():
            for clients in both:
                clients.repeat([request("PUT", name, {"text": "ROMEO:"}) for name in names], 0)
            measures = [lambda clients=clients, sent=requests: clients.repeat(sent, seconds) for clients in both]
            in_memory, in_redis = in_turns(measures, rounds)
            ratios = [redis_rate / memory_rate for redis_rate, memory_rate in zip(in_redis, in_memory, strict=True)]
            memory_rate, redis_rate = statistics.median(in_memory), statistics.median(in_redis)
            print(f"{what}: {memory_rate:,.0f} a second in memory, {redis_rate:,.0f} with Redis")
            spread = f"% ({100 * min(ratios):.0f} to {100 * max(ratios):.0f})"
            report("  with Redis / in memory", 100 * statistics.median(ratios), spread, "at least 80")
            figures[what] = {"memory": summary(in_memory), "redis": summary(in_redis), "ratio": summary(ratios)}
    return figures


def session_bytes(num_chars: int, num_sessions: int = 200) -> float:
    """Measure by how many bytes a session enlarges the memory of a Redis of its own."""
    chance, retention = np.random.default_rng(1), Retention()

    def state() -> Float32:
        return chance.uniform(-1, 1, (1, 1024)).astype(np.float32)

    def session(number: int) -> Session:
        letters = bytes(chance.integers(97, 123, num_chars, np.uint8)).decode()
        positions = retention.checkpoint_positions(0, num_chars)
        text = Text(state()).extended(letters, state(), {position: state() for position in positions}, retention)
        return Session(f"s{number:04}", "", "shakespeare@1", "0" * 64, 7, 3600.0, 0, 0, text)

    with tempfile.TemporaryDirectory() as directory, redis_process(Path(directory)) as redis, ExitStack() as stack:
        client = stack.enter_context(Redis.from_url(redis.url))
        server = RedisServer(redis.url, recovery_window_s=0)
        store = stack.enter_context(closing(RedisStore(server, retention.segment_chars)))
        while not is_serving(store):
            time.sleep(0.05)
        store.create(session(0))
        before = client.info("memory")["used_memory"]
        for number in range(1, num_sessions + 1):
            store.create(session(number))
        num_bytes: float = (client.info("memory")["used_memory"] - before) / num_sessions
    print(f"a session of {num_chars:,} characters takes {num_bytes:,.0f} bytes of Redis' memory")
    return num_bytes


def is_serving(store: RedisStore) -> bool:
    """Whether the store serves calls."""
    try:
        store.check()
    except StoreUnavailable:
        return False
    return True


def replicas(ports: list[int], num_streams: int, seconds: float, rounds: int) -> Figures:
    """Measure the characters/s of all streams on the first server, and on all servers."""
    on_one, on_all = in_turns(
        [lambda: streamed(ports[:1], num_streams, seconds), lambda: streamed(ports, num_streams, seconds)], rounds
    )
    ratios = [all_rate / one_rate for all_rate, one_rate in zip(on_all, on_one, strict=True)]
    cores = machine()["cores"]
    print(f"{num_streams} streams: {statistics.median(on_one):,.0f} characters/s on one server")
    print(f"  {statistics.median(on_all):,.0f} on {len(ports)}")
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report(f"  {len(ports)} servers / one, on {cores} cores", statistics.median(ratios), spread, "none")
    return {"one": summary(on_one), "all": summary(on_all), "ratio": summary(ratios)}


def streamed(ports: list[int], num_streams: int, seconds: float) -> float:
    """Return the characters/s of streamed completions, which are spread evenly over the servers."""
    num_chars = [0] * num_streams
    ending = threading.Event()

    def read(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", ports[number % len(ports)], timeout=60)
        body = {"prompt": "ROMEO:", "max_tokens": 8192, "stream": True, "seed": number}
        while not ending.is_set():
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            for line in response:
                if line.startswith(b"data: {"):
                    num_chars[number] += len(json.loads(line[6:])["choices"][0]["text"])
                if ending.is_set():
                    break
            connection.close()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    time.sleep(1)  # until all streams have started
    before, began = sum(num_chars), time.perf_counter()
    time.sleep(seconds)
    rate = (sum(num_chars) - before) / (time.perf_counter() - began)
    ending.set()
    for thread in threads:
        thread.join()
    return rate


@contextmanager
def serving(**settings: object) -> Iterator[int]:
    """The real server with the shipped model, on a free port."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve_main, args=(port, settings))
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


def serve_main(port: int, settings: dict[str, object]) -> None:
    """What runs in its process."""
    Server(Settings(port=port, log_level="warning", **settings)).run()  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

"""Several replicas and a Redis server: what sharing sessions costs, and what replicas bring.

- store: requests a second of sessions on a server with Redis against one that keeps them in memory, in turns: feeds of
  a character, whole continuations of 20 characters, and how sessions stand.
- replicas: characters a second of streams on three servers against one, with the cores that there are.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.http import is_ready, report
from benchmarks.pairs import in_turns
from benchmarks.sessions import Clients, request
from benchmarks.table import machine, summary
from service.settings import Settings
from service.web.server import Server
from tests.harness.programs import free_port
from tests.harness.redis_process import redis_process

Figures = dict[str, object]


def main() -> None:
    """Print each figure with its target."""
    parser = argparse.ArgumentParser(description="sessions with Redis, and several replicas")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=2, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    figures: Figures = {"machine": machine()}
    with tempfile.TemporaryDirectory() as directory, redis_process(Path(directory), "--appendonly", "yes") as redis:
        with serving() as memory, serving(session_store=redis.url) as shared:
            figures["store"] = store(memory, shared, options.clients, options.seconds, options.rounds)
        with ExitStack() as stack:
            ports = [stack.enter_context(serving(session_store=redis.url)) for _ in range(3)]
            figures["replicas"] = replicas(ports, options.streams, options.seconds, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def store(memory: int, shared: int, num_clients: int, seconds: float, rounds: int) -> Figures:
    """Requests a second with either store."""
    # Each kind has sessions of its own, so that their texts are equally long with either store.
    feeds, runs, stand = (
        [f"/v1/sessions/{kind}{number}" for number in range(num_clients)] for kind in ("feed", "run", "stand")
    )
    kinds = {
        "feeds of a character": (feeds, [request("POST", f"{name}/feed", {"text": "e"}) for name in feeds]),
        "continuations of 20": (runs, [request("POST", f"{name}/generate", {"max_tokens": 20}) for name in runs]),
        "how they stand": (stand, [request("GET", name) for name in stand]),
    }
    figures: Figures = {}
    with Clients(memory, num_clients) as there, Clients(shared, num_clients) as elsewhere:
        both = (there, elsewhere)
        for what, (names, requests) in kinds.items():
            for clients in both:
                clients.repeat([request("PUT", name, {"text": "ROMEO:"}) for name in names], 0)
            measures = [lambda one=one, sent=requests: one.repeat(sent, seconds) for one in both]
            in_memory, in_redis = in_turns(measures, rounds)
            ratios = [one / other for one, other in zip(in_redis, in_memory, strict=True)]
            there_s, elsewhere_s = statistics.median(in_memory), statistics.median(in_redis)
            print(f"{what}: {there_s:,.0f} a second in memory, {elsewhere_s:,.0f} with Redis")
            spread = f"% ({100 * min(ratios):.0f} to {100 * max(ratios):.0f})"
            report("  with Redis / in memory", 100 * statistics.median(ratios), spread, "at least 60")
            figures[what] = {"memory": summary(in_memory), "redis": summary(in_redis), "ratio": summary(ratios)}
    return figures


def replicas(ports: list[int], num_streams: int, seconds: float, rounds: int) -> Figures:
    """Characters a second of so many streams on the first server, and on all of them."""
    one, all_of_them = in_turns(
        [lambda: streamed(ports[:1], num_streams, seconds), lambda: streamed(ports, num_streams, seconds)], rounds
    )
    ratios = [many / single for many, single in zip(all_of_them, one, strict=True)]
    cores = machine()["cores"]
    print(f"{num_streams} streams: {statistics.median(one):,.0f} characters/s on one server")
    print(f"  {statistics.median(all_of_them):,.0f} on {len(ports)}")
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report(f"  {len(ports)} servers / one", statistics.median(ratios), spread, f"on {cores} cores")
    return {"one": summary(one), "all": summary(all_of_them), "ratio": summary(ratios)}


def streamed(ports: list[int], num_streams: int, seconds: float) -> float:
    """Characters a second that streams of completions bring, spread over servers."""
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
    time.sleep(1)  # until all are under way
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

"""Measures lists of an owner's sessions beside many other sessions, in memory and in Redis.

    python -m benchmarks.lists [--sessions 200000] [--seconds 2] [--rounds 5] [--json FILE]

Needs `redis-server`. Each server has 2,000 sessions of one owner, and in all as many as --sessions, or 2,000.

- page: the time of `GET /v1/sessions` for 100 sessions, beside many others and beside none. Of each round the fastest
  tenth counts: other work on the machine slows down the rest.
- feeds: the times of feeds of a character by two clients of another owner, beside 20 lists a second and without.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from redis import Redis

import service.assembly as assembly
from benchmarks.deploy import is_serving
from benchmarks.http import is_ready, percentile, report
from benchmarks.pairs import in_turns
from benchmarks.table import machine, summary
from service.api_keys import new_key
from service.arrays import read_state
from service.sessions.memory_store import MemoryStore
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session
from service.sessions.text import Retention, Text
from service.settings import Settings
from service.web.gunicorn.server import Server
from tests.harness.programs import free_port
from tests.harness.redis_process import redis_process

OWN = 2000  # sessions of the owner whose list is read
PAGE = 100
LISTS_PER_S = 20
PREFIX = "gru-serve:"
Figures = dict[str, object]


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure lists of sessions beside many others.")
    parser.add_argument("--sessions", type=int, default=200_000, help="sessions in the large stores  [200000]")
    parser.add_argument("--seconds", type=float, default=2, help="seconds of each round  [2]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds  [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: Figures = {"machine": machine()}
    for store, target in (("memory", "under 5"), ("redis", "under 15")):
        with ExitStack() as stack:
            few, many = (
                Service(*stack.enter_context(serving(store, number))) for number in (OWN, max(OWN, options.sessions))
            )
            print(f"sessions in {store}:")
            figures[store] = {
                "page_ms": pages(few, many, options.seconds, options.rounds, target),
                "feed_ms": feeds(many, options.seconds, options.rounds),
            }
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


class Service:
    """A server on a port, and the keys of the owner whose list is read, and of the one who feeds."""

    def __init__(self, port: int, owner_key: str, feeder_key: str) -> None:
        self._port, self._owner_key, self._feeder_key = port, owner_key, feeder_key

    def list_ms(self, seconds: float, pause_s: float = 0.0) -> list[float]:
        """Read pages from everywhere in the list, and return how long each took."""
        number = 0

        def path() -> tuple[str, str, object]:
            nonlocal number
            number += 1
            return "GET", f"/v1/sessions?limit={PAGE}&after={session_id(number * 37 % (OWN - PAGE - 1))}", None

        return self._repeat(self._owner_key, path, seconds, pause_s)

    def feed_ms(self, seconds: float, *, beside_lists: bool) -> list[float]:
        """Feed characters to two sessions, and return how long each feed took."""
        times: list[float] = []

        def feed(name: str) -> None:
            for method, path, body in (("PUT", "", {"text": "ROMEO:"}), ("POST", "/rewind", {"position": 6})):
                self._repeat(self._feeder_key, lambda: (method, f"/v1/sessions/{name}{path}", body), 0)  # noqa: B023 - called at once
            request = "POST", f"/v1/sessions/{name}/feed", {"text": "e"}
            times.extend(self._repeat(self._feeder_key, lambda: request, seconds))

        threads = [threading.Thread(target=feed, args=(f"fed{number}",)) for number in range(2)]
        if beside_lists:
            threads.append(threading.Thread(target=self.list_ms, args=(seconds, 1 / LISTS_PER_S)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times

    def _repeat(
        self, key: str, request: Callable[[], tuple[str, str, object]], seconds: float, pause_s: float = 0.0
    ) -> list[float]:
        """Send requests one after the other, at least one, and return the milliseconds that each took."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        times: list[float] = []
        until = time.perf_counter() + seconds
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
            while not times or time.perf_counter() < until:
                method, path, body = request()
                began = time.perf_counter()
                connection.request(method, path, json.dumps(body) if body is not None else None, headers)
                response = connection.getresponse()
                answer = response.read()
                times.append(1000 * (time.perf_counter() - began))
                assert response.status in (200, 201), answer
                assert "limit" not in path or answer.count(b'"object"') >= PAGE
                time.sleep(pause_s)
        return times


def pages(few: Service, many: Service, seconds: float, rounds: int, target: str) -> Figures:
    """Measure the time of a page with few and with many sessions."""
    alone, beside = in_turns([lambda: fastest(few.list_ms(seconds)), lambda: fastest(many.list_ms(seconds))], rounds)
    ratios = [large / small for small, large in zip(alone, beside, strict=True)]
    report("  a page of 100 beside many sessions", statistics.median(beside), "ms", target)
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report("    beside many / beside none", statistics.median(ratios), spread, "at most 1.5")
    return {"beside_none": summary(alone), "beside_many": summary(beside), "ratio": summary(ratios)}


def feeds(many: Service, seconds: float, rounds: int) -> Figures:
    """Measure the times of feeds with and without lists beside them."""
    alone, beside = in_turns(
        [partial(many.feed_ms, seconds, beside_lists=False), partial(many.feed_ms, seconds, beside_lists=True)], rounds
    )
    figures: Figures = {}
    for share in (50, 99):
        without, with_lists = ([percentile(times, share) for times in measured] for measured in (alone, beside))
        ratios = [b / a for a, b in zip(without, with_lists, strict=True)]
        medians = statistics.median(without), statistics.median(with_lists)
        print(f"  {share} % of feeds: {medians[0]:.1f} ms, beside lists {medians[1]:.1f}")
        spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
        report("    beside lists / without", statistics.median(ratios), spread, "at most 1.5")
        figures[f"p{share}"] = {"alone": summary(without), "beside": summary(with_lists), "ratio": summary(ratios)}
    return figures


def fastest(times: list[float]) -> float:
    """Return the time within which a tenth of them are."""
    return percentile([*times, *times], 10)  # twice: a quantile needs two


def session_id(number: int) -> str:
    """Return an id. Their order is that of the numbers."""
    return f"s{number:07}"


def sessions(num_sessions: int) -> Iterator[Session]:
    """Yield OWN sessions of the owner `mine`, and others of nine others, with small states to save memory."""
    states = {size: read_state(np.full((1, size), 0.5, np.float32)) for size in (16, 1024)}
    for number in range(num_sessions):
        owner, size = ("mine", 1024) if number < OWN else (f"other{number % 9}", 16)
        text = Text(states[size], tail="x" * 64)
        yield Session(session_id(number), owner, "shakespeare@1", "none", 7, 3600.0, 0, 0, text)


def fill_redis(url: str, some: Iterable[Session]) -> None:
    """Write sessions as the store does: the first of each size by the store, and the others as its copies."""
    store = RedisStore(RedisServer(url, recovery_window_s=0), Retention().segment_chars, prefix=PREFIX)
    while not is_serving(store):
        time.sleep(0.05)
    copies: dict[int, dict[bytes, bytes]] = {}
    with closing(store), Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        for number, session in enumerate(some):
            key, size = f"{PREFIX}{session.owner}/{session.id}", session.hidden.size
            if size not in copies:
                store.create(session)
                copies[size] = client.hgetall(key)
            pipeline.hset(key, mapping=copies[size])
            pipeline.pexpire(key, 3_600_000)
            pipeline.zadd(f"{PREFIX}ids:{session.owner}", {session.id: 0})
            if number % 1000 == 999:
                pipeline.execute()
        pipeline.set(f"{PREFIX}indexed", 1)
        pipeline.execute()


@contextmanager
def serving(store: str, num_sessions: int) -> Iterator[tuple[int, str, str]]:
    """Run a server whose store has sessions. Yields its port, and the keys of `mine` and of another owner."""
    keys = dict(new_key(name) for name in ("mine", "feeder"))
    settings: dict[str, Any] = {"port": free_port(), "api_keys": SecretStr(",".join(keys.values()))}
    with ExitStack() as stack:
        if store == "redis":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            redis = stack.enter_context(redis_process(directory))
            fill_redis(redis.url, sessions(num_sessions))
            settings["session_store"] = SecretStr(redis.url)
        process = multiprocessing.get_context("spawn").Process(target=serve_main, args=(settings, num_sessions))
        process.start()
        stack.callback(process.join, 60)
        stack.callback(process.terminate)
        deadline = time.monotonic() + 120
        while not is_ready(settings["port"]):
            assert process.is_alive(), "the server has ended"
            assert time.monotonic() < deadline, "the server doesn't become ready"
            time.sleep(0.1)
        yield settings["port"], *keys


def serve_main(settings: dict[str, Any], num_sessions: int) -> None:
    """Run the server, in a process of its own. A store in memory has sessions from the start."""

    def full_store(_max_sessions: int, _max_bytes: int) -> MemoryStore:
        store = MemoryStore(10**7, 2**40)
        for session in sessions(num_sessions):
            store.create(session)
        return store

    assembly.MemoryStore = full_store  # type: ignore[assignment,attr-defined]
    Server(Settings(log_level="warning", max_sessions=10**7, **settings)).run()


if __name__ == "__main__":
    main()

"""Measures what a greedy client costs the others: the time until their first character, with it and without it.

    python -m benchmarks.fairness [--others 4] [--seconds 10] [--rounds 5] [--json FILE]

Each client has an API key of its own. The greedy one has four requests at a time, each for 128 texts of 8,192
characters: as many texts as one client may have. Each of the others sends one short request after the other, for a
stream with a new prompt of 16 characters. Server, engine and clients share the cores of this machine, and connect over
127.0.0.1. Undisturbed and disturbed times are measured in turns on the same server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

from benchmarks.http import LETTERS, Figures, body, percentile, percentiles, posted, report, request, serving
from benchmarks.pairs import in_turns
from benchmarks.table import machine, summary
from service.api_keys import new_key

NUM_GREEDY, NUM_TEXTS, NUM_CHARS = 4, 128, 8192
MAX_PAUSE_S = 0.1  # between two requests of one client
KINDS = {
    "whole answers": {"stream": False},
    "streams": {"stream": True},
}


def main() -> None:
    """Measure, and print the ratio of the 99th percentiles with its target."""
    parser = argparse.ArgumentParser(description="Measure what a greedy client costs the others.")
    parser.add_argument("--others", type=int, default=4, help="clients beside the greedy one  [4]")
    parser.add_argument("--seconds", type=float, default=10, help="seconds of each measurement  [10]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds  [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    keys = [new_key(f"client{number}") for number in range(options.others + 1)]
    others = [key for key, _ in keys[1:]]
    figures: Figures = {"machine": machine(), "others": options.others}
    with serving(GRU_SERVE_API_KEYS=",".join(entry for _, entry in keys)) as port:
        for kind, fields in KINDS.items():

            def beside(fields: dict[str, bool] = fields) -> list[list[float]]:
                with greedy(port, keys[0][0], fields):
                    return firsts(port, others, options.seconds)

            undisturbed, disturbed = in_turns([lambda: firsts(port, others, options.seconds), beside], options.rounds)
            figures[kind] = compare(kind, undisturbed, disturbed)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(kind: str, undisturbed: list[list[list[float]]], disturbed: list[list[list[float]]]) -> Figures:
    """Print and return the times: of each client in each round, without and with the greedy client."""
    per_round = [
        percentile(joined(busy), 99) / percentile(joined(calm), 99)
        for calm, busy in zip(undisturbed, disturbed, strict=True)
    ]
    calm_of = [joined(times) for times in zip(*undisturbed, strict=True)]  # of each client
    busy_of = [joined(times) for times in zip(*disturbed, strict=True)]
    ratios = [percentile(busy, 99) / percentile(calm, 99) for calm, busy in zip(calm_of, busy_of, strict=True)]
    calm, busy = percentiles(joined(calm_of)), percentiles(joined(busy_of))
    print(f"first character beside a greedy client with {kind}, {calm['num']} and {busy['num']} requests:")
    print(f"  undisturbed: median {calm['median']:.1f} ms, 99th percentile {calm['p99']:.1f} ms")
    print(f"  disturbed: median {busy['median']:.1f} ms, 99th percentile {busy['p99']:.1f} ms")
    print(f"  ratio of the 99th percentiles by round: {', '.join(f'{ratio:.2f}' for ratio in per_round)}")
    report("  ratio of the 99th percentiles, of the client with the largest", max(ratios), "times", "at most 2")
    return {
        "undisturbed_ms": calm, "disturbed_ms": busy, "ratio_by_round": summary(per_round),
        "ratio_by_client": summary(ratios),
    }  # fmt: skip


def joined(times: Iterable[list[float]]) -> list[float]:
    """Return the times of all clients, or of all rounds."""
    return list(chain.from_iterable(times))


def firsts(port: int, keys: list[str], seconds: float) -> list[list[float]]:
    """Return the seconds until the first event of each request, for each key."""
    times: list[list[float]] = [[] for _ in keys]
    threads = [
        threading.Thread(target=send_some, args=(port, key, seconds, found))
        for key, found in zip(keys, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def send_some(port: int, key: str, seconds: float, times: list[float]) -> None:
    """Send one request after the other, with pauses."""
    chance = random.Random(key)
    until = time.perf_counter() + seconds
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        while time.perf_counter() < until:
            data, headers = posted(body(prompt="".join(chance.choices(LETTERS, k=16)), max_tokens=64))
            began = time.perf_counter()
            connection.request("POST", "/v1/completions", data, headers | {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            event = response.readline()
            times.append(time.perf_counter() - began)
            assert response.status == 200, (response.status, event)
            response.read()
            time.sleep(chance.uniform(0, MAX_PAUSE_S))


@contextmanager
def greedy(port: int, key: str, fields: dict[str, bool]) -> Iterator[None]:
    """Keep the greedy client's requests open, and read what arrives."""
    ended = threading.Event()
    threads = [threading.Thread(target=want_all, args=(port, key, seed, fields, ended)) for seed in range(NUM_GREEDY)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # so that all texts are in the engine
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        time.sleep(1.0)  # the server notices within half a second that the client has left


def want_all(port: int, key: str, seed: int, fields: dict[str, bool], ended: threading.Event) -> None:
    """Have one request for many long texts open until `ended`: again if it is answered or refused."""
    wanted = request(body(n=NUM_TEXTS, max_tokens=NUM_CHARS, seed=seed) | fields, Authorization=f"Bearer {key}")
    while not ended.is_set():
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(wanted)
            is_open = True
            while is_open and not ended.wait(0.05):  # reads seldom, to leave the processor to the server
                if select.select([connection], [], [], 0.1)[0]:
                    is_open = bool(connection.recv(2**20))


if __name__ == "__main__":
    main()

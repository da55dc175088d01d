"""Measures how long honest clients wait beside strangers who need no key, compared with the same clients undisturbed.

    python -m benchmarks.strangers [--seconds 4] [--rounds 5] [--only NAME] [--json FILE]

Server, strangers and honest clients share the cores of this machine and connect over 127.0.0.1. A process of its own
runs the strangers and replaces each connection that the server closes. Each round measures the honest clients before,
during and after the attack; the difference between before and after shows how noisy the machine is.

- idle: 1,600 connections on which nothing is sent.
- heads: 1,600 connections with half of a request's head.
- bodies: 530 requests without the last byte of their bodies.
- unclosed: 700 clients that read their answer and do not close their connection for 2.5 s.

After the attacks it checks that a session in memory is as it was, and reports what the process uses, before and after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import multiprocessing
import os
import resource
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.http import percentile, report
from benchmarks.table import machine, spread, summary
from tests.harness.server import SERVE, Server, serving

Figures = dict[str, object]
NUM_CLIENTS = 4
_TICK_S = 0.01
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True)
class Attack:
    """What strangers do."""

    num_strangers: int
    data: bytes  # which each of them sends
    unclosed_s: float = 0.0  # seconds after which a stranger closes its connection that the server has ended


ATTACKS = {
    "idle": Attack(1600, b""),
    "heads": Attack(1600, HEAD),
    "bodies": Attack(530, HEAD + b"Content-Length: 100\r\n\r\n" + b" " * 99),
    "unclosed": Attack(700, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 2.5),
}


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure honest clients beside strangers who need no key.")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement  [4]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of each attack  [5]")
    parser.add_argument("--only", choices=ATTACKS, help="only this attack  [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    figures: Figures = {"machine": machine()}
    with serving(SERVE, {"GRU_SERVE_LOG_LEVEL": "info"}) as server:
        assert server.call("PUT", "/v1/sessions/kept", {"text": "ROMEO:"})[0] == 201
        measure(server, options.seconds)  # fills caches and starts threads
        before, worker = usage(server), server.worker
        for name, attack in ATTACKS.items():
            if options.only in (None, name):
                figures[name] = attacked(server, name, attack, options.seconds, options.rounds)
        assert server.worker == worker, "the worker has died"
        assert server.call("GET", "/v1/sessions/kept")[1]["position"] == 6
        time.sleep(11)  # threads that are idle end after 10 s
        figures["usage"] = {"before": before, "after": usage(server)}
        print("the process before and after:")
        for what, number in usage(server).items():
            print(f"  {what}: {before[what]:,} and {number:,}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def attacked(server: Server, name: str, attack: Attack, seconds: float, rounds: int) -> Figures:
    """Measure the waits of honest clients with and without an attack, in turns."""
    undisturbed, ratios, noise = [], [], []
    for _ in range(rounds):
        first = percentile(measure(server, seconds), 99)
        with strangers(server, attack):
            during = percentile(measure(server, seconds), 99)
        last = percentile(measure(server, seconds), 99)
        undisturbed.append((first + last) / 2)
        ratios.append(during / undisturbed[-1])
        noise.append(last / first)
    print(f"{name}: {attack.num_strangers:,} strangers; 99 % of the honest clients' requests, {rounds} rounds:")
    print(f"  undisturbed: {1000 * statistics.median(undisturbed):.1f} ms")
    print(f"  undisturbed after / before the attack: {spread(noise)}")
    report(f"  attacked / undisturbed: {spread(ratios)}; median", statistics.median(ratios), "times", "at most 2")
    facts: dict[str, object] = {"undisturbed_s": summary(undisturbed), "ratio": summary(ratios)}
    return facts | {"noise": summary(noise)}


def measure(server: Server, seconds: float) -> list[float]:
    """Return the seconds that each request of some honest clients takes, half of them on new connections."""
    found: list[float] = []
    until = time.perf_counter() + seconds

    def work(seed: int) -> None:
        body = json.dumps({"prompt": "ROMEO:", "max_tokens": 8, "seed": seed})
        headers = {"Content-Type": "application/json"}
        reused = server.connect()
        while time.perf_counter() < until:
            for connection in (reused, server.connect()):
                for request in (("GET", "/healthz"), ("POST", "/v1/completions", body, headers)):
                    began = time.perf_counter()
                    status = answered(connection, *request)
                    found.append(time.perf_counter() - began)
                    assert status == 200, status
            connection.close()
        reused.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def answered(connection: http.client.HTTPConnection, *request: Any) -> int:
    """Send a request and read its answer; return the status."""
    try:
        connection.request(*request)
        response = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError):
        connection.close()  # the server has closed the idle connection: clients try once more, on a new one
        connection.request(*request)
        response = connection.getresponse()
    response.read()
    return response.status


@contextmanager
def strangers(server: Server, attack: Attack) -> Iterator[None]:
    """Keep an attack up inside the block. When it begins, the server has accepted all strangers."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    process = context.Process(target=attack_until, args=(server.port, attack, ready, over))
    process.start()
    try:
        assert ready.wait(60), "the strangers could not connect"
        for _ in range(10):
            assert server.call("GET", "/healthz")[0] == 200
        yield
    finally:
        over.set()
        process.join(60)


def attack_until(port: int, attack: Attack, ready: Event, over: Event) -> None:
    """Hold the strangers' connections, and replace those that the server has closed."""
    selector = selectors.DefaultSelector()
    until: dict[socket.socket, float] = {}  # when a stranger closes its connection
    # Strangers who get answers come evenly, because it is not their requests that are measured.
    num_at_once = math.ceil(attack.num_strangers * _TICK_S / attack.unclosed_s) if attack.unclosed_s else math.inf
    while not over.is_set():
        num_missing = min(attack.num_strangers - len(until), num_at_once)
        if len(until) + num_missing == attack.num_strangers:
            ready.set()
        for _ in range(int(num_missing)):
            with suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", port), timeout=30)
                until[connection] = math.inf
                connection.sendall(attack.data)
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
        for key, _ in selector.select(_TICK_S):
            found = key.fileobj
            assert isinstance(found, socket.socket)
            with suppress(OSError):
                if found.recv(65_536):
                    continue
            selector.unregister(found)  # the server has ended its side
            until[found] = time.monotonic() + attack.unclosed_s
        for connection in [one for one, end in until.items() if end <= time.monotonic()]:
            del until[connection]
            connection.close()
    for connection in until:
        connection.close()


def usage(server: Server) -> dict[str, int]:
    """Return what the process that answers requests uses."""
    pages = int((server.worker / "statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir(server.worker / "fd")),
        "threads": len(os.listdir(server.worker / "task")),
        "memory_bytes": pages * resource.getpagesize(),
    }


if __name__ == "__main__":
    main()

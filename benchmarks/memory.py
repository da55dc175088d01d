"""Measures the resident memory of the real server under the worst mix of allowed requests, with the default settings.

    python -m benchmarks.memory [--seconds N] [--sessions-mb N] [--only NAME ...] [--json FILE]

The server starts with as many sessions as its memory for sessions holds, all of them with long texts. Then clients on
many connections send, as fast as they are answered:

- scores: prompts of 95,000 characters, echoed with 20 alternatives for each character
- many: 128 continuations of 8,192 characters
- best: 64 scored continuations, from which the server returns one
- prompts: ten prompts of 95,000 characters in one body
- feeds: texts of 95,000 characters for sessions, with all their checkpoints
- rebase: sessions with long texts that are read into another model and back
- inspect: 2,048 characters with gates, embeddings and alternatives
- fold: 95,000 characters that all have to be folded, and stop strings
- slow: answers with log-probabilities whose client does not read

It prints the memory at the start, with full sessions, and at the peak, and what the server answered.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.table import machine
from service.store.model_store import ModelStore
from tests.harness.server import Server, serving

CHARS = 95_000
LIMIT_MB = 1638  # what docs/operations.md promises
SHIPPED = Path(__file__).parents[1] / "model_store"
# The server, but its store is full of sessions from the start: to read their texts would take hours.
SERVE_FULL = """
import sys
import numpy as np
import service.assembly as assembly
from service.arrays import read_state
from service.sessions.memory_store import MemoryStore
from service.sessions.session import Session
from service.sessions.text import Segment, Text

def full_store(max_sessions, max_bytes, *more):
    store = MemoryStore(max_sessions, max_bytes, *more)
    number = 0
    while store.num_bytes < min(max_bytes, int(sys.argv.pop() if number < 0 else FILL)) - 2**21:
        states = np.random.default_rng(number).uniform(-1, 1, (257, 1, 1024)).astype(np.float32)
        segments = tuple(
            Segment("%08d" % number * 32, 256 * (index + 1), read_state(states[index])) for index in range(256)
        )
        store.create(Session(f"full{number}", "", "shakespeare@1", "none", 1, 36000.0, 0, 0,
                             Text(read_state(states[256]), 0, segments)))
        number += 1
    return store

assembly.MemoryStore = full_store
from service.__main__ import main
main(["serve", "--port", "0"])
"""
Sender = Callable[[http.client.HTTPConnection, random.Random], tuple[int, int]]


def send(connection: http.client.HTTPConnection, method: str, path: str, body: object) -> tuple[int, int]:
    """Send a request and read its answer; return status and length."""
    data = json.dumps(body, ensure_ascii=False).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    length = 0
    while part := response.read(1 << 16):
        length += len(part)
    return response.status, length


def text(chance: random.Random, num_chars: int = CHARS) -> str:
    """Return a text that no other request has sent."""
    return "".join(chance.choices(string.ascii_lowercase + " ", k=num_chars))


def completion(**changes: object) -> Sender:
    """Return a sender of a completion with these fields; a function makes a field anew for each request."""

    def sender(connection: http.client.HTTPConnection, chance: random.Random) -> tuple[int, int]:
        body = {name: value(chance) if callable(value) else value for name, value in changes.items()}
        return send(connection, "POST", "/v1/completions", body)

    return sender


def feed(connection: http.client.HTTPConnection, chance: random.Random) -> tuple[int, int]:
    """Create a session with a long text and feed it another one, with scores of a part."""
    path = f"/v1/sessions/fed{chance.getrandbits(60)}"
    status, length = send(connection, "PUT", path, {"text": text(chance)})
    if status == 201:
        status, length = send(connection, "POST", f"{path}/feed", {"text": text(chance, 9000), "logprobs": 20})
    return status, length


def rebase(connection: http.client.HTTPConnection, chance: random.Random) -> tuple[int, int]:
    """Move one of a few sessions with long texts to another model and back."""
    path = f"/v1/sessions/moving{chance.randrange(64)}"
    status, length = send(connection, "PUT", path, {"text": text(random.Random(1), 60_000), "seed": 1})
    if status in (200, 201):
        body = {"text": "", "rebase": "shakespeare"}
        status, length = send(connection, "POST", f"{path}/feed", body)
    return status, length


def inspect(connection: http.client.HTTPConnection, chance: random.Random) -> tuple[int, int]:
    """Inspect as much as one request may."""
    body = {"text": text(chance, 2048), "gates": True, "embedding": True, "logprobs": 20, "portable": True}
    return send(connection, "POST", "/v1/inspect", body)


def slow(connection: http.client.HTTPConnection, chance: random.Random) -> tuple[int, int]:
    """Request many scores, and read nothing for a while."""
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096) if connection.sock else None
    body = {"prompt": text(chance, 20_000), "max_tokens": 0, "echo": True, "logprobs": 20}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    time.sleep(5)
    connection.close()
    return response.status, 0


# Each kind of request, and how many connections send it.
MIX: dict[str, tuple[int, Sender]] = {
    "scores": (24, completion(prompt=text, max_tokens=0, echo=True, logprobs=20)),
    "many": (8, completion(prompt="ROMEO:", max_tokens=8192, n=128)),
    "best": (4, completion(prompt="ROMEO:", max_tokens=8192, n=1, best_of=64)),
    "prompts": (160, completion(prompt=lambda chance: [text(chance) for _ in range(10)], max_tokens=16)),
    "feeds": (200, feed),
    "rebase": (60, rebase),
    "inspect": (8, inspect),
    "fold": (24, completion(prompt="“é”–…" * (CHARS // 10), unknown_chars="fold", stop=["zz", "qq"])),
    "slow": (24, slow),
}


def resident_mb(server: Server, field: str = "VmRSS") -> float:
    """Return a line of the worker's memory in MB: what is resident now, or `VmHWM`, the most so far."""
    lines = (server.worker / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def load(server: Server, seconds: float, names: list[str]) -> dict[str, dict[str, int]]:
    """Send the mix for some seconds; return how often each kind got each status."""
    answers: dict[str, Counter[str]] = {name: Counter() for name in names}
    deadline = time.monotonic() + seconds

    def run(name: str, sender: Sender, seed: int) -> None:
        chance = random.Random(f"{name} {seed}")
        # From several addresses, because one client may have only half of each budget.
        source = (f"127.0.0.{1 + seed % 4}", 0)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120, source_address=source)
        while time.monotonic() < deadline:
            try:
                status, _ = sender(connection, chance)
                answers[name][str(status)] += 1
                if status == 429:
                    time.sleep(0.2)
            except (OSError, http.client.HTTPException) as error:
                answers[name][type(error).__name__] += 1
                connection.close()
                time.sleep(0.1)
        connection.close()

    threads = [
        threading.Thread(target=run, args=(name, MIX[name][1], seed), daemon=True)
        for name in names
        for seed in range(MIX[name][0])
    ]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, deadline - time.monotonic()))  # many requests are still being answered: the peak is now
    return {name: dict(counts) for name, counts in answers.items()}


def main() -> None:
    """Run the benchmark, and exit with 1 if the peak is above the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long the mix is sent")
    parser.add_argument("--sessions-mb", type=int, default=10**6, help="fill sessions up to this  [all that fit]")
    parser.add_argument("--only", nargs="*", choices=[*MIX], help="kinds of requests to send  [all]")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    store = ModelStore(SHIPPED)
    source = SERVE_FULL.replace("int(sys.argv.pop() if number < 0 else FILL)", str(arguments.sessions_mb * 2**20))
    environment = {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_DRAIN_S": "1"}
    with serving([sys.executable, "-c", source], environment) as server:
        before = resident_mb(server)
        answers = load(server, arguments.seconds, arguments.only or [*MIX])
        peak, after = resident_mb(server, "VmHWM"), resident_mb(server)
        ready = server.is_ready()
        worker = int(server.worker.name)
        server.process.kill()  # what its clients still wait for is not needed any more
        os.kill(worker, signal.SIGKILL)
    figures: dict[str, Any] = {"machine": machine(), "start_mb": before, "peak_mb": peak, "after_mb": after}
    figures |= {"limit_mb": LIMIT_MB, "answers": answers, "ready": ready}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))
    if peak > LIMIT_MB or not ready:
        raise SystemExit(f"the peak is {peak:.0f} MB, above {LIMIT_MB} MB, or the server is not ready")


if __name__ == "__main__":
    main()

"""A deployment under attack: what clients notice of replicas and stores that die, stall or are replaced.

Three replicas with the shipped model behind HAProxy with the shipped configuration, and a Redis server that writes to
disk every second; all real processes. Each part checks that no character was lost, doubled or changed, and prints how
long what had to wait waited.

- kills: a session streams 2,000 characters, the replica that serves it is killed at a random moment.
- rolling: replicas are replaced one after the other under 50 requests a second.
- redis: the store is killed and started again under load.
- paused: a replica that has a lease is stopped for longer than that is good for, and wakes up.
- blackhole: the store gets no packets through.
- slow: 500 connections that send their request a byte at a time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hole import Hole, hole
from benchmarks.http import report
from benchmarks.table import machine
from service.client import Client, ServerError
from tests.harness.balancer import Balancer, balancing
from tests.harness.programs import free_port
from tests.harness.redis_process import RedisProcess, redis_process

Figures = dict[str, Any]
NUM_CHARS = 2000
DRAIN = {"GRU_SERVE_DRAIN_S": "10", "GRU_SERVE_DRAIN_NOTICE_S": "1"}


class Replica:
    """One server on a port that it keeps, whatever happens to its process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.port, self._environment = free_port(), environment
        self.start()

    def start(self) -> None:
        """Start it; `wait_until_ready` tells when it answers."""
        command = [sys.executable, "-m", "service", "serve", "--port", str(self.port), "--log-level", "error"]
        self.process = subprocess.Popen(command, env=os.environ | self._environment, start_new_session=True)

    def wait_until_ready(self) -> None:
        """Wait until it would get requests."""
        deadline = time.monotonic() + 60
        while not self._is_ready():
            assert time.monotonic() < deadline, "a replica doesn't become ready"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """A signal to all of its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it without a word."""
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.process.wait()

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@dataclass
class Deployment:
    """Replicas, what they share and what is in front of them."""

    redis: RedisProcess
    replicas: list[Replica]
    balancer: Balancer

    @property
    def url(self) -> str:
        """Of the balancer."""
        return f"http://127.0.0.1:{self.balancer.port}"

    def serving(self, session_id: str) -> Replica:
        """The replica that gets the requests for a session."""
        name = os.urandom(8).hex()
        with closing(self.balancer.connect()) as connection:
            connection.request("GET", f"/v1/sessions/{session_id}", headers={"X-Request-Id": name})
            connection.getresponse().read()
        while name not in (found := self.balancer.requests()):
            time.sleep(0.005)
        number = int(found[name]["server"].removeprefix("sessions/app"))
        self.balancer.log.clear()
        return self.replicas[number - 1]

    def wait_until_all_serve(self) -> None:
        """Until the balancer finds all of them ready."""
        for replica in self.replicas:
            replica.wait_until_ready()
        while not all(len(self.balancer.up(backend)) == len(self.replicas) for backend in ("sessions", "completions")):
            time.sleep(0.02)


@contextmanager
def deployed(num_replicas: int = 3, redis_in: Hole | None = None, **settings: str) -> Iterator[Deployment]:
    """Everything, until the block ends."""
    place = {"address": redis_in.address, "prefix": redis_in.command} if redis_in is not None else {}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        redis = stack.enter_context(redis_process(Path(directory), "--appendonly", "yes", **place))
        environment = DRAIN | {"GRU_SERVE_SESSION_STORE": redis.url} | settings
        replicas = [Replica(environment) for _ in range(num_replicas)]
        for replica in replicas:
            stack.callback(replica.kill)
        for replica in replicas:
            replica.wait_until_ready()
        balancer = stack.enter_context(balancing([replica.port for replica in replicas]))
        yield Deployment(redis, replicas, balancer)


def kills(num_kills: int) -> Figures:
    """Streams whose replica dies."""
    waits, chance, wrong = [], random.Random(7), 0
    with deployed() as deployment, Client(deployment.url) as client:
        for number in range(num_kills):
            deployment.wait_until_all_serve()
            whole = "".join(client.create("ROMEO:", seed=number).generate(NUM_CHARS))
            session = client.create("ROMEO:", seed=number, id=f"kill{number}")
            replica, arrivals, text = deployment.serving(session.id), [], ""
            killed_at: list[float] = []

            def kill(replica: Replica = replica, killed_at: list[float] = killed_at) -> None:
                time.sleep(chance.uniform(0, 0.1))
                replica.kill()
                killed_at.append(time.perf_counter())

            thread = threading.Thread(target=kill)
            thread.start()
            for piece in session.generate(NUM_CHARS):
                text += piece
                arrivals.append(time.perf_counter())
            thread.join()
            wrong += text != whole
            after = [at for at in arrivals if at > killed_at[0]]
            if after:
                waits.append(max(at - before for before, at in zip([killed_at[0], *after], after, strict=False)))
            replica.start()
    waits.sort()
    print(f"{num_kills} replicas killed while they streamed: {wrong} texts that differ from the uninterrupted ones")
    print(f"  {len(waits)} in the midst of it; wait: median {statistics.median(waits):.2f} s")
    report("  99 %", waits[max(0, int(len(waits) * 0.99) - 1)], "s", "at most 2")
    return {"kills": num_kills, "wrong": wrong, "waits_s": waits}


@dataclass
class Load:
    """Requests of all kinds at a steady rate, from clients that never repeat one by themselves."""

    url: str
    statuses: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def completions(self, per_s: float) -> None:
        """Whole completions, each on a connection of its own."""
        host = self.url.removeprefix("http://")
        body = json.dumps({"prompt": "ROMEO:", "max_tokens": 50, "seed": 7})
        due = time.monotonic()
        while not self.is_over:
            due += 1 / per_s
            time.sleep(max(0, due - time.monotonic()))
            connection = http.client.HTTPConnection(host, timeout=30)
            try:
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                self.statuses[f"completion {response.status}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.statuses[f"completion {type(error).__name__}"] += 1
            finally:
                connection.close()

    def feeds(self, name: str, per_s: float) -> None:
        """Feeds of one session."""
        with Client(self.url, retry_s=0) as client:
            session, fed, due = client.create("", id=name), 0, time.monotonic()
            while not self.is_over:
                due += 1 / per_s
                time.sleep(max(0, due - time.monotonic()))
                try:
                    session.feed("ab")
                    fed += 1
                    self.statuses["feed 200"] += 1
                except (OSError, http.client.HTTPException, ServerError) as error:
                    self.statuses[f"feed {getattr(error, 'code', type(error).__name__)}"] += 1
            self.statuses["feeds whose text is whole" if session.text() == "ab" * fed else "feeds WRONG"] += 1

    def streams(self, name: str, per_s: float) -> None:
        """Streams of sessions, one after the other, each as long as it takes."""
        due = time.monotonic()
        with Client(self.url) as client:
            whole = "".join(client.create("ROMEO:", seed=1).generate(NUM_CHARS))
            number = 0
            while not self.is_over:
                due += 1 / per_s
                time.sleep(max(0, due - time.monotonic()))
                number += 1
                text = "".join(client.create("ROMEO:", seed=1, id=f"{name}.{number}").generate(NUM_CHARS))
                self.statuses["stream whole" if text == whole else "stream WRONG"] += 1


def rolling(seconds: float) -> Figures:
    """Three replicas, each replaced in its turn, again and again."""
    with deployed() as deployment:
        load = Load(deployment.url)
        threads = [threading.Thread(target=load.completions, args=(5,)) for _ in range(5)]
        threads += [threading.Thread(target=load.feeds, args=(f"fed{number}", 5)) for number in range(4)]
        threads += [threading.Thread(target=load.streams, args=(f"streamed{number}", 1.25)) for number in range(4)]
        for thread in threads:
            thread.start()
        began, codes = time.monotonic(), []
        while time.monotonic() - began < seconds:
            for replica in deployment.replicas:
                replica.process.terminate()
                codes.append(replica.process.wait(60))
                replica.start()
                deployment.wait_until_all_serve()
        load.is_over = True
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
    total = sum(load.statuses.values())
    print(f"{len(codes)} restarts in {took:.0f} s under {total / took:.0f} requests/s; exit codes {set(codes)}")
    print(f"  {dict(load.statuses)}")
    return {"restarts": len(codes), "codes": codes, "answers": dict(load.statuses), "seconds": took}


def redis_kills(num_kills: int) -> Figures:
    """The store dies; clients repeat what it was that failed."""
    num_sessions, outcomes = 20, Counter[str]()
    with deployed() as deployment:
        is_over, lock, waits = threading.Event(), threading.Lock(), []
        back_s: list[float] = []

        def write(name: str) -> None:
            with Client(deployment.url, retry_s=30) as client:
                session, text = client.create("", id=name), ""
                while not is_over.is_set():
                    try:
                        began = time.monotonic()
                        session.feed("abc")
                        text += "abc"
                        if session.position % 50 == 0:
                            text += "".join(session.generate(20))
                        with lock:
                            waits.append(time.monotonic() - began)
                    except ServerError as error:
                        with lock:
                            outcomes[f"says {error.code}"] += 1
                        return
                with lock:
                    outcomes["whole" if session.text() == text else "WENT BACK"] += 1

        threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(num_sessions)]
        for thread in threads:
            thread.start()
        chance = random.Random(1)
        for _ in range(num_kills):
            time.sleep(chance.uniform(0.5, 2))
            deployment.redis.kill()
            killed_at = time.monotonic()
            deployment.redis.start()
            deployment.wait_until_all_serve()
            back_s.append(time.monotonic() - killed_at)
        is_over.set()
        for thread in threads:
            thread.join()
    print(f"{num_kills} times killed Redis under {num_sessions} writers: {dict(outcomes)}")
    report("  all replicas serve again after", max(back_s), "s", "at most 5")
    # A client that pauses for a second between two attempts can meet the next kill with the one after.
    print(f"  longest wait for an answer, over one kill or two: {max(waits):.1f} s")
    return {"kills": num_kills, "outcomes": dict(outcomes), "back_s": back_s, "longest_wait_s": max(waits)}


def paused(num_pauses: int, seconds: float) -> Figures:
    """A lease holder that sleeps, and wakes up when another has gone on."""
    outcomes = Counter[str]()
    with deployed(GRU_SERVE_MAX_TOKENS="1000000", GRU_SERVE_SESSION_TEXT_CHARS="2000000") as deployment:
        for number in range(num_pauses):
            deployment.wait_until_all_serve()
            with Client(deployment.url, timeout_s=2, retry_s=60) as client:
                session = client.create("ROMEO:", seed=number, id=f"paused{number}")
                replica = deployment.serving(session.id)
                pieces = session.generate(400_000)
                text = next(pieces)
                replica.send(signal.SIGSTOP)
                began = time.monotonic()
                while len(text) < 100_000:  # through the others
                    text += next(pieces)
                taken_s = time.monotonic() - began
                pieces.close()
                session.feed("xyz")
                expected = session.text()
                time.sleep(max(0, seconds - (time.monotonic() - began)))
                replica.send(signal.SIGCONT)
                deployment.wait_until_all_serve()
                time.sleep(2)  # it would have written by now
                with Client(f"http://127.0.0.1:{replica.port}") as direct:
                    there = direct.call("GET", f"/v1/sessions/{session.id}/text")["text"]
                right = there == expected == session.text() and expected[6:].startswith(text) and there[-3:] == "xyz"
                outcomes["as its successor left it" if right else "OVERWRITTEN"] += 1
    print(
        f"{num_pauses} lease holders paused for {seconds:.0f} s: {dict(outcomes)}; others took over in {taken_s:.1f} s"
    )
    return {"pauses": num_pauses, "outcomes": dict(outcomes)}


def latencies(url: str, seconds: float, call: Callable[[http.client.HTTPConnection], int]) -> list[float]:
    """Seconds of calls one after the other on four connections."""
    found: list[float] = []

    def ask() -> None:
        with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
            while time.monotonic() < until:
                began = time.perf_counter()
                status = call(connection)
                found.append(time.perf_counter() - began)
                assert status == 200, status

    until = time.monotonic() + seconds
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def complete(connection: http.client.HTTPConnection) -> int:
    """A completion of 20 characters; its status."""
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 20})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response.status


def p99(values: list[float]) -> float:
    """Of sorted ones."""
    return values[int(len(values) * 0.99)]


def in_turn(url: str, rounds: int, seconds: float, hinder: Callable[[], Any], free: Callable[[], Any]) -> list[float]:
    """Ratios of the 99th percentiles of completions, hindered and free."""
    ratios = []
    for _ in range(rounds):
        usual = p99(latencies(url, seconds, complete))
        hinder()
        hindered = p99(latencies(url, seconds, complete))
        free()
        ratios.append(hindered / usual)
        time.sleep(1)
    return ratios


def black_hole(rounds: int) -> Figures:
    """Nothing that is sent to the store arrives, and nothing comes back."""
    waits: list[float] = []
    outcomes: Counter[int] = Counter()
    back_s: list[float] = []
    with hole() as net, deployed(1, net) as deployment, Client(deployment.url, retry_s=0) as client:
        session = client.create("ROMEO:", id="there")
        stop = threading.Event()

        def feed() -> None:
            body = json.dumps({"text": "a", "position": session.position})
            while not stop.wait(0.01):
                began = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", deployment.replicas[0].port, timeout=30)
                path, headers = f"/v1/sessions/{session.id}/feed", {"Content-Type": "application/json"}
                connection.request("POST", path, body, headers)
                outcomes[connection.getresponse().status] += 1
                waits.append(time.perf_counter() - began)
                connection.close()

        threads: list[threading.Thread] = []

        def hinder() -> None:
            stop.clear()
            net.drop()
            threads[:] = [threading.Thread(target=feed) for _ in range(4)]
            for thread in threads:
                thread.start()

        def free() -> None:
            stop.set()
            for thread in threads:
                thread.join()
            net.let_through()
            began = time.perf_counter()
            while not is_fed():
                time.sleep(0.02)
            back_s.append(time.perf_counter() - began)

        def is_fed() -> bool:
            try:
                session.feed("a")
            except ServerError:
                return False
            return True

        ratios = in_turn(deployment.url, rounds, 3, hinder, free)
    print(f"a store whose packets are dropped, {rounds} times; session calls got {dict(outcomes)}")
    report("  the slowest", max(waits), "s", "at most 1")
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report("  99 % of completions beside them / without", statistics.median(ratios), spread, "at most 2")
    report("  sessions again after", max(back_s), "s", "at most 5")
    return {"waits_s": [statistics.median(waits), max(waits)], "outcomes": outcomes, "ratios": ratios, "back_s": back_s}


def slow(rounds: int) -> Figures:
    """Clients that send a byte now and then."""
    with deployed(1) as deployment:
        connections: list[socket.socket] = []

        def hinder() -> None:
            for number in range(500):
                connection = socket.create_connection(("127.0.0.1", deployment.balancer.port))
                head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                connection.sendall(head + (b"X-Slow: a" if number % 2 else b"Content-Length: 100\r\n\r\n{"))
                connections.append(connection)

        def free() -> None:
            for connection in connections:
                connection.close()
            connections.clear()

        ratios = in_turn(deployment.url, rounds, 3, hinder, free)
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report("500 slow senders: 99 % of completions / without", statistics.median(ratios), spread, "at most 2")
    return {"ratios": ratios}


def main() -> None:
    """Print each figure with its target."""
    parser = argparse.ArgumentParser(description="what clients notice of what fails")
    parser.add_argument("--only", choices=["kills", "rolling", "redis", "paused", "blackhole", "slow"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120, help="of rolling restarts")
    parser.add_argument("--redis-kills", type=int, default=20)
    parser.add_argument("--pauses", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    parts: dict[str, Callable[[], Figures]] = {
        "kills": lambda: kills(options.kills),
        "rolling": lambda: rolling(options.seconds),
        "redis": lambda: redis_kills(options.redis_kills),
        "paused": lambda: paused(options.pauses, 20),
        "blackhole": lambda: black_hole(options.rounds),
        "slow": lambda: slow(options.rounds),
    }
    figures: Figures = {"machine": machine()}
    figures |= {name: part() for name, part in parts.items() if options.only in (None, name)}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

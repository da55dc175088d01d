"""Measures what clients notice when replicas or stores of a deployment fail, stall or are replaced.

    python -m benchmarks.survival [--only kills|deaths|rolling|redis|sentinel|cluster|paused|blackhole|slow]
        [--json FILE]

Needs `redis-server` and `haproxy`, and for `blackhole` also root and iproute2. The deployment consists of real
processes: three replicas with the shipped model, HAProxy with the shipped configuration in front of them, and a Redis
server that writes to disk every second. Each part checks that no character was lost, doubled or changed, and prints
waiting times.

- kills: a session streams 2,000 characters, and the replica that serves it is killed at a random moment.
- deaths: a replica is killed that streams 100 sessions, each some 4,000 characters long; the same without saving runs
  on their way.
- rolling: replicas are replaced one after the other under 50 requests a second.
- redis: Redis is killed and restarted under load.
- paused: a replica that streams a session is paused until another one has continued it, and then continues.
- sentinel: a master with two replicas and three Sentinels is killed under load, with the last writes not replicated.
- cluster: the same with a master of a Redis Cluster. It has three masters with a replica each.
- blackhole: all packets to and from Redis are dropped.
- slow: 500 connections send their requests extremely slowly.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hole import Hole, can_drop_packets, hole
from benchmarks.http import report
from benchmarks.table import machine
from service.client import Client, ServerError
from tests.harness.balancer import Balancer, balancing
from tests.harness.programs import free_port
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_topologies import Cluster, SentinelGroup, redis_cluster, sentinel_group, stop_replicating

Figures = dict[str, Any]
NUM_CHARS = 2000
NUM_FED = 12  # sessions on all replicas that are fed while one is paused
SERVE = ["-m", "service"]
# The server, but it saves runs at their start and their end only.
SERVE_WITHOUT_SAVING = [
    "-c",
    "import functools, service.web.app as app\n"
    "app.SessionService = functools.partial(app.SessionService, save_interval_s=0)\n"
    "from service.__main__ import main\n"
    "main()",
]
DRAIN = {"GRU_SERVE_DRAIN_S": "10", "GRU_SERVE_DRAIN_NOTICE_S": "1"}


class Replica:
    """A server that uses the same port each time its process is started."""

    def __init__(self, environment: dict[str, str], server: Sequence[str] = SERVE) -> None:
        self.port, self._environment, self._server = free_port(), environment, server
        self.start()

    def start(self) -> None:
        """Start the process. Call `wait_until_ready` before using it."""
        command = [sys.executable, *self._server, "serve", "--port", str(self.port), "--log-level", "error"]
        self.process = subprocess.Popen(command, env=os.environ | self._environment, start_new_session=True)

    def wait_until_ready(self) -> None:
        """Wait until the server reports that it is ready for requests."""
        deadline = time.monotonic() + 60
        while not self.is_ready():
            assert time.monotonic() < deadline, "a replica doesn't become ready"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill all of its processes with SIGKILL."""
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.process.wait()

    def is_ready(self) -> bool:
        """Return whether it reports that it is ready."""
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
    """Replicas, and the load balancer in front of them."""

    replicas: list[Replica]
    balancer: Balancer

    @property
    def url(self) -> str:
        """The address of the load balancer."""
        return f"http://127.0.0.1:{self.balancer.port}"

    def serving(self, session_id: str) -> Replica:
        """Return the replica that gets the requests of a session."""
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
        """Wait until the balancer sends requests to every replica."""
        for replica in self.replicas:
            replica.wait_until_ready()
        while not all(len(self.balancer.up(backend)) == len(self.replicas) for backend in ("sessions", "completions")):
            time.sleep(0.02)


@dataclass
class DeploymentWithRedis(Deployment):
    """A deployment and the Redis server that its replicas share."""

    redis: RedisProcess


@contextmanager
def deployed(
    num_replicas: int = 3,
    redis_in: Hole | None = None,
    server: Sequence[str] = SERVE,
    redis_options: Sequence[str] = (),
    **settings: str,
) -> Iterator[DeploymentWithRedis]:
    """Run a deployment until the block ends."""
    place = {"address": redis_in.address, "prefix": redis_in.command} if redis_in is not None else {}
    with (
        tempfile.TemporaryDirectory() as directory,
        redis_process(Path(directory), "--appendonly", "yes", *redis_options, **place) as redis,
        deployed_on(redis.url, num_replicas, server, **settings) as deployment,
    ):
        yield DeploymentWithRedis(deployment.replicas, deployment.balancer, redis)


@contextmanager
def deployed_on(
    url: str, num_replicas: int = 3, server: Sequence[str] = SERVE, **settings: str
) -> Iterator[Deployment]:
    """Run a deployment with a session store until the block ends."""
    with ExitStack() as stack:
        environment = DRAIN | {"GRU_SERVE_SESSION_STORE": url} | settings
        replicas = [Replica(environment, server) for _ in range(num_replicas)]
        for replica in replicas:
            stack.callback(replica.kill)
        for replica in replicas:
            replica.wait_until_ready()
        balancer = stack.enter_context(balancing([replica.port for replica in replicas]))
        yield Deployment(replicas, balancer)


def kills(num_kills: int) -> Figures:
    """Kill replicas while they stream a session."""
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
    print(f"{num_kills} replicas killed during a stream: {wrong} texts differ from the uninterrupted ones")
    print(f"  {len(waits)} were killed before the stream ended; median wait {statistics.median(waits):.2f} s")
    report("  99 %", waits[max(0, int(len(waits) * 0.99) - 1)], "s", "at most 2")
    return {"kills": num_kills, "wrong": wrong, "waits_s": waits}


def deaths(num_streams: int, num_chars: int) -> Figures:
    """Kill a replica that streams many sessions, when each has about num_chars characters."""
    figures: Figures = {}
    for name, server in (("saved on their way", SERVE), ("saved at their start only", SERVE_WITHOUT_SAVING)):
        waits, wrong = _deaths(num_streams, num_chars, server)
        print(f"a replica killed while it streams {num_streams} sessions at {num_chars} characters, {name}:")
        print(f"  {wrong} texts are wrong; silent for {statistics.median(waits):.2f} s, median")
        report("  99 %", p99(waits), "s", "at most 3")
        figures[name] = {"waits_s": waits, "wrong": wrong}
    return {"streams": num_streams, "chars": num_chars} | figures


def _deaths(num_streams: int, num_chars: int, server: Sequence[str]) -> tuple[list[float], int]:
    """Return for how many seconds each stream was silent, sorted, and how many texts are wrong."""
    silences: dict[str, float] = {}  # by session
    arrivals: dict[str, tuple[float, int]] = {}  # by session, the time of its last piece and how many characters it has
    killed = threading.Event()
    wrong = 0
    with deployed(server=server, GRU_SERVE_MAX_TOKENS="50000") as deployment:

        def stream(name: str) -> None:
            nonlocal wrong
            with Client(deployment.url, retry_s=120) as client:
                session, text, number = client.open(name), "", 0
                pieces = session.generate(50_000)
                while number < 20:  # the first that arrive after the kill may have been sent before it
                    text += next(pieces)
                    now = time.perf_counter()
                    if killed.is_set():
                        number += 1
                        silences[name] = max(silences.get(name, 0), now - arrivals[name][0])
                    arrivals[name] = now, len(text)
                pieces.close()
                wrong += session.text() != "ROMEO:" + text

        victim, names = deployment.replicas[0], list[str]()
        with Client(deployment.url) as client:
            for number in itertools.count():
                if len(names) == num_streams:
                    break
                session = client.create("ROMEO:", id=f"death{number}", seed=number)
                if deployment.serving(session.id) is victim:
                    names.append(session.id)
        threads = [threading.Thread(target=stream, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        while len(arrivals) < num_streams or statistics.median(at for _, at in list(arrivals.values())) < num_chars:
            assert all(thread.is_alive() for thread in threads), "a stream has failed"
            time.sleep(0.01)
        killed.set()
        victim.kill()
        for thread in threads:
            thread.join()
    return sorted(silences.values()), wrong


@dataclass
class Load:
    """Requests of several kinds, each at a steady rate. Completions and feeds are not repeated when they fail."""

    url: str
    statuses: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def completions(self, per_s: float) -> None:
        """Request completions, each on a connection of its own, until the load is over."""
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
        """Feed one session until the load is over."""
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
        """Stream one session after the other until the load is over. The client resumes streams that break."""
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
    """Replace the replicas one after the other, under load."""
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
    """Kill and restart Redis under clients that repeat failed calls."""
    back_s: list[float] = []
    with deployed() as deployment, Writers(deployment.url, 20) as writers:
        chance = random.Random(1)
        for _ in range(num_kills):
            time.sleep(chance.uniform(0.5, 2))
            deployment.redis.kill()
            killed_at = time.monotonic()
            deployment.redis.start()
            deployment.wait_until_all_serve()
            back_s.append(time.monotonic() - killed_at)
    print(f"Redis killed {num_kills} times under {writers.number} writers: {dict(writers.outcomes)}")
    report("  all replicas serve again after at most", max(back_s), "s", "at most 5")
    # A client may wait over two kills, because it pauses for up to a second between two attempts.
    print(f"  longest wait for a response, over one or two kills: {max(writers.waits):.1f} s")
    return {"kills": num_kills, "back_s": back_s} | writers.figures()


class Writers:
    """Clients that write until the block ends, and repeat failed calls. Each then compares its session's text."""

    def __init__(self, url: str, number: int) -> None:
        self.number, self.outcomes = number, Counter[str]()
        self.num_acknowledged = 0  # calls
        self.waits: list[float] = []  # for each response
        self._url, self._is_over, self._lock = url, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._write, args=(f"w{index}",)) for index in range(number)]

    def __enter__(self) -> Writers:
        """Begin to write."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End, and wait until all texts are compared."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def figures(self) -> Figures:
        """Return what was measured."""
        return {"outcomes": dict(self.outcomes), "longest_wait_s": max(self.waits), "writes": self.num_acknowledged}

    def _write(self, name: str) -> None:
        with Client(self._url, retry_s=60) as client:
            session, text = client.create("", id=name), ""
            while not self._is_over.is_set():
                try:
                    began = time.monotonic()
                    session.feed("abc")
                    text += "abc"
                    if session.position % 50 == 0:
                        text += "".join(session.generate(20))
                except ServerError as error:
                    with self._lock:
                        self.outcomes[f"failed with {error.code}"] += 1
                    return
                with self._lock:
                    self.waits.append(time.monotonic() - began)
                    self.num_acknowledged += 1
            with self._lock:
                self.outcomes["whole" if session.text() == text else "TEXT LOST"] += 1


UNREPLICATED_S = 0.3  # before a master is killed; what it acknowledges in this time, its replica never gets


def failovers(kind: str, num_kills: int) -> Figures:
    """Kill masters under clients that write, and start each again when another one has taken its place."""
    back_s, num_unreplicated, chance = list[float](), 0, random.Random(1)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        servers: SentinelGroup | Cluster
        if kind == "sentinel":
            servers = stack.enter_context(sentinel_group(Path(directory), "--appendonly", "yes"))
            what = "the master of three Sentinels (down-after-milliseconds 1,500)"
        else:
            cluster = redis_cluster(Path(directory), "--appendonly", "yes", has_replicas=True)
            servers = stack.enter_context(cluster)
            what = "a master of a cluster of three masters (cluster-node-timeout 1,000)"
        deployment = stack.enter_context(deployed_on(servers.url))
        with Writers(deployment.url, 20) as writers:
            for number in range(num_kills):
                servers.wait_until_whole()
                deployment.wait_until_all_serve()
                time.sleep(chance.uniform(0.5, 1.5))
                victim = servers.owner_of(f"gru-serve:/w{number}")
                stop_replicating(victim)
                before = writers.num_acknowledged
                time.sleep(UNREPLICATED_S)
                victim.kill()
                killed_at = time.monotonic()
                num_unreplicated += writers.num_acknowledged - before
                with ThreadPoolExecutor() as threads:  # each has to notice it before it can serve again
                    list(threads.map(wait_until_unready, deployment.replicas))
                deployment.wait_until_all_serve()
                back_s.append(time.monotonic() - killed_at)
                victim.start()
    print(f"{what} killed {num_kills} times under {writers.number} writers: {dict(writers.outcomes)}")
    print(
        f"  {num_unreplicated} of {writers.num_acknowledged} acknowledged writes were made when nothing was replicated"
    )
    report("  acknowledged writes lost without being told", writers.outcomes["TEXT LOST"], "texts", "0")
    print(f"  all replicas serve again after {statistics.median(back_s):.1f} s, median; at most {max(back_s):.1f} s")
    print(f"  longest wait for a response: {max(writers.waits):.1f} s")
    return {"kills": num_kills, "back_s": back_s, "unreplicated": num_unreplicated} | writers.figures()


def wait_until_unready(replica: Replica) -> None:
    """Wait until a replica reports that it is not ready."""
    while replica.is_ready():
        time.sleep(0.01)


def paused(num_pauses: int, seconds: float) -> Figures:
    """Pause a replica that streams a session until another one has continued it, and feed other sessions meanwhile."""
    outcomes, resumed_s, fed_s = Counter[str](), list[float](), list[float]()
    with deployed(GRU_SERVE_MAX_TOKENS="1000000", GRU_SERVE_SESSION_TEXT_CHARS="2000000") as deployment:
        for number in range(num_pauses):
            deployment.wait_until_all_serve()
            with Client(deployment.url, retry_s=60) as client, ThreadPoolExecutor(NUM_FED) as pool:
                session = client.create("ROMEO:", seed=number, id=f"paused{number}")
                others = [client.create(id=f"fed{number}.{other}") for other in range(NUM_FED)]
                replica = deployment.serving(session.id)
                pieces = session.generate(400_000)
                text = next(pieces)
                replica.send(signal.SIGSTOP)
                began = last = time.monotonic()
                fed = [pool.submit(timed, other.feed, "ab") for other in others]
                silence = 0.0
                while len(text) < 100_000:  # from another replica
                    text += next(pieces)
                    silence, last = max(silence, time.monotonic() - last), time.monotonic()
                resumed_s.append(silence)
                fed_s += [each.result() for each in fed]
                pieces.close()
                session.feed("xyz")
                expected = session.text()
                time.sleep(max(0, seconds - (time.monotonic() - began)))
                replica.send(signal.SIGCONT)
                deployment.wait_until_all_serve()
                time.sleep(2)  # by now, the replica would have overwritten the session
                with Client(f"http://127.0.0.1:{replica.port}") as direct:
                    stored = direct.open(session.id).text()
                is_right = stored == expected == session.text() and expected[6:].startswith(text)
                is_right = is_right and stored.endswith("xyz")
                outcomes["not overwritten" if is_right else "OVERWRITTEN"] += 1
    print(f"{num_pauses} replicas that streamed a session paused for {seconds:.0f} s: sessions {dict(outcomes)}")
    report("  the stream was silent for at most", max(resumed_s), "s", "at most 5")
    report(f"  {NUM_FED} other sessions were fed within", max(fed_s), "s", "at most 5")
    return {"pauses": num_pauses, "outcomes": dict(outcomes), "silent_s": resumed_s, "fed_s": fed_s}


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Return how many seconds a call takes."""
    began = time.monotonic()
    call(*arguments)
    return time.monotonic() - began


def latencies(url: str, seconds: float, call: Callable[[http.client.HTTPConnection], int]) -> list[float]:
    """Repeat a call for a while on four connections at once. Return the sorted seconds that each call took."""
    durations: list[float] = []

    def repeat() -> None:
        with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
            while time.monotonic() < until:
                began = time.perf_counter()
                status = call(connection)
                durations.append(time.perf_counter() - began)
                assert status == 200, status

    until = time.monotonic() + seconds
    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(durations)


def complete(connection: http.client.HTTPConnection) -> int:
    """Request a completion of 20 characters, and return the status."""
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 20})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response.status


def p99(values: list[float]) -> float:
    """Return the 99th percentile of sorted values."""
    return values[int(len(values) * 0.99)]


def disturbed(
    url: str, rounds: int, seconds: float, disturb: Callable[[], Any], recover: Callable[[], Any]
) -> list[float]:
    """Return, for each round, the ratio of the 99th percentiles of completion times with and without a disturbance."""
    ratios = []
    for _ in range(rounds):
        usual = p99(latencies(url, seconds, complete))
        disturb()
        ratios.append(p99(latencies(url, seconds, complete)) / usual)
        recover()
        time.sleep(1)
    return ratios


def black_hole(rounds: int) -> Figures:
    """Drop all packets to and from Redis."""
    waits: list[float] = []
    outcomes: Counter[int] = Counter()
    back_s: list[float] = []
    with hole() as net, deployed(1, net) as deployment, Client(deployment.url, retry_s=0) as client:
        session = client.create("ROMEO:", id="blackhole")
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

        def disturb() -> None:
            stop.clear()
            net.drop()
            threads[:] = [threading.Thread(target=feed) for _ in range(4)]
            for thread in threads:
                thread.start()

        def recover() -> None:
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

        ratios = disturbed(deployment.url, rounds, 3, disturb, recover)
    print(f"packets of Redis dropped {rounds} times; statuses of session calls: {dict(outcomes)}")
    report("  longest wait for a response", max(waits), "s", "at most 1")
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report("  99 % of completions, with dropped packets / without", statistics.median(ratios), spread, "at most 2")
    report("  sessions work again after at most", max(back_s), "s", "at most 5")
    return {"waits_s": [statistics.median(waits), max(waits)], "outcomes": outcomes, "ratios": ratios, "back_s": back_s}


def slow(rounds: int) -> Figures:
    """Open 500 connections that never complete their requests."""
    with deployed(1) as deployment:
        connections: list[socket.socket] = []

        def disturb() -> None:
            for number in range(500):
                connection = socket.create_connection(("127.0.0.1", deployment.balancer.port))
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                connection.sendall(head + (b"X-Slow: a" if number % 2 else b"Content-Length: 100\r\n\r\n{"))
                connections.append(connection)

        def recover() -> None:
            for connection in connections:
                connection.close()
            connections.clear()

        ratios = disturbed(deployment.url, rounds, 3, disturb, recover)
    spread = f"times ({min(ratios):.2f} to {max(ratios):.2f})"
    report("99 % of completions, with 500 slow connections / without", statistics.median(ratios), spread, "at most 2")
    return {"ratios": ratios}


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure what clients notice of failures in a deployment.")
    names = ["kills", "deaths", "rolling", "redis", "sentinel", "cluster", "paused", "blackhole", "slow"]
    parser.add_argument("--only", choices=names, help="run only this part  [all]")
    parser.add_argument("--kills", type=int, default=200, help="number of replicas to kill  [200]")
    parser.add_argument("--streams", type=int, default=100, help="number of streams of deaths  [100]")
    parser.add_argument("--chars", type=int, default=4000, help="their length when the replica is killed  [4000]")
    parser.add_argument("--seconds", type=float, default=120, help="seconds of rolling restarts  [120]")
    parser.add_argument("--redis-kills", type=int, default=20, help="how often to kill Redis  [20]")
    parser.add_argument("--failovers", type=int, default=5, help="how often to kill a master  [5]")
    parser.add_argument("--pauses", type=int, default=3, help="number of lease holders to pause  [3]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of blackhole and slow  [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    parts: dict[str, Callable[[], Figures]] = {
        "kills": lambda: kills(options.kills),
        "deaths": lambda: deaths(options.streams, options.chars),
        "rolling": lambda: rolling(options.seconds),
        "redis": lambda: redis_kills(options.redis_kills),
        "sentinel": lambda: failovers("sentinel", options.failovers),
        "cluster": lambda: failovers("cluster", options.failovers),
        "paused": lambda: paused(options.pauses, 20),
        "blackhole": lambda: black_hole(options.rounds),
        "slow": lambda: slow(options.rounds),
    }
    if options.only is None and not can_drop_packets():
        del parts["blackhole"]
        print("blackhole is skipped: it needs root and iproute2")
    figures: Figures = {"machine": machine()}
    figures |= {name: part() for name, part in parts.items() if options.only in (None, name)}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Redis servers that belong together: a master with replicas and Sentinels, and a cluster."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from tests.harness.programs import free_port, program
from tests.harness.redis_process import RedisProcess
from tests.harness.wait import wait_until

SERVICE = "sessions"  # the name that Sentinels have for the master
NUM_SLOTS = 16384


class SentinelProcess:
    """A Sentinel that a test can kill, pause, and start again with what it knows."""

    def __init__(self, directory: Path, settings: str) -> None:
        self.port, self._path = free_port(), directory / "sentinel.conf"
        self._path.write_text(f"port {self.port}\nbind 127.0.0.1\nprotected-mode no\ndir {directory}\n{settings}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [program("redis-server"), str(self._path), "--sentinel"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with suppress(redis.ConnectionError), self.client() as client:
                return bool(client.ping())
            return False

        wait_until(answers)

    def client(self) -> Any:
        """Return a client of it."""
        return redis.Redis("127.0.0.1", self.port, decode_responses=True)

    def state(self) -> dict[str, Any]:
        """Return what it knows of the master."""
        with self.client() as client:
            state: dict[str, Any] = client.sentinel_master(SERVICE)
            return state

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process. After SIGKILL, return when the process has ended."""
        if self._process is not None:
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()
                self._process = None


class SentinelGroup:
    """A master with replicas, and Sentinels that put a replica in its place when it fails."""

    def __init__(self, servers: list[RedisProcess], sentinels: list[SentinelProcess]) -> None:
        self.servers, self.sentinels = servers, sentinels
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        self.url = f"redis+sentinel://{hosts}/{SERVICE}"

    def master(self) -> RedisProcess:
        """Return the server that the last Sentinel names."""
        with self.sentinels[-1].client() as client:
            port = client.sentinel_get_master_addr_by_name(SERVICE)[1]
        return next(server for server in self.servers if server.port == port)

    def owner_of(self, _key: str) -> RedisProcess:
        """Return the server that has a key: the master has all."""
        return self.master()

    def fail_over(self) -> None:
        """Let the last Sentinel begin an orderly failover, as soon as it knows that a replica is fit for it."""

        def begins() -> bool:
            with suppress(redis.ResponseError), self.sentinels[-1].client() as client:
                return bool(client.execute_command("SENTINEL", "FAILOVER", SERVICE))
            return False

        wait_until(begins)

    def wait_until_whole(self) -> None:
        """Wait until all servers follow the master, and every Sentinel knows all servers and the other Sentinels."""
        wait_until(self._is_whole)

    def _is_whole(self) -> bool:
        for sentinel in self.sentinels:
            state = sentinel.state()
            others = (int(state["num-slaves"]), int(state["num-other-sentinels"]))
            if others != (len(self.servers) - 1, len(self.sentinels) - 1) or state["flags"] != "master":
                return False
        with redis.Redis.from_url(self.master().url) as client:
            followers = client.info("replication")
        states = [followers[f"slave{number}"]["state"] for number in range(followers["connected_slaves"])]
        return states == ["online"] * (len(self.servers) - 1)


@contextmanager
def sentinel_group(
    directory: Path, *options: str, num_replicas: int = 2, num_sentinels: int = 3, down_after_ms: int = 1500
) -> Iterator[SentinelGroup]:
    """Run a master, replicas and Sentinels until the block ends. options: of every Redis server."""
    with ExitStack() as ending:
        servers: list[RedisProcess] = []
        for number in range(num_replicas + 1):
            home = directory / f"server{number}"
            home.mkdir()
            following = ["--replicaof", f"127.0.0.1 {servers[0].port}"] if servers else []
            server = RedisProcess(home, "--repl-diskless-sync-delay", "0", *following, *options)
            ending.callback(server.kill)
            server.start()
            servers.append(server)
        sentinels = []
        for number in range(num_sentinels):
            home = directory / f"sentinel{number}"
            home.mkdir()
            settings = (
                f"sentinel monitor {SERVICE} 127.0.0.1 {servers[0].port} {num_sentinels // 2 + 1}\n"
                f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
            )
            sentinel = SentinelProcess(home, settings)
            ending.callback(sentinel.send, signal.SIGKILL)
            sentinel.start()
            sentinels.append(sentinel)
        group = SentinelGroup(servers, sentinels)
        group.wait_until_whole()
        yield group


class Cluster:
    """A Redis Cluster whose nodes a test can kill."""

    def __init__(self, masters: list[RedisProcess], replicas: list[RedisProcess]) -> None:
        self.nodes, self.masters = [*masters, *replicas], masters  # as they were at the beginning
        self.url = f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes[:3])}"

    def owners(self) -> dict[int, list[tuple[int, int]]]:
        """Return the ranges of slots of each master, by its port, as the first node that answers knows them."""
        for node in self.nodes:
            with suppress(redis.ConnectionError, redis.TimeoutError), admin_of(node) as client:
                owners: dict[int, list[tuple[int, int]]] = {}
                for first, last, master, *_ in client.execute_command("CLUSTER", "SLOTS"):
                    owners.setdefault(master[1], []).append((first, last))
                return owners
        raise AssertionError("no node answers")

    def owner_of(self, key: str) -> RedisProcess:
        """Return the master that has a key."""
        slot = redis.crc.key_slot(key.encode())
        port = next(
            port for port, ranges in self.owners().items() if any(first <= slot <= last for first, last in ranges)
        )
        return next(node for node in self.nodes if node.port == port)

    def wait_until_whole(self) -> None:
        """Wait until the cluster works, and every master that it had at the beginning has a replica."""
        self.wait_until_ok()

        def is_whole() -> bool:
            states = []
            for node in self.nodes:
                with admin_of(node) as client:
                    states.append(client.info("replication"))
            followed = [state["connected_slaves"] for state in states if state["role"] == "master"]
            return followed == [1] * len(self.masters)

        wait_until(is_whole)

    def wait_until_ok(self) -> None:
        """Wait until every node that answers finds that the cluster works."""
        wait_until(lambda: all(map(_is_ok, self.nodes)))


def stop_replicating(master: RedisProcess) -> None:
    """Let a master's replicas get nothing more of it: what it acknowledges from now on is lost when it dies."""
    with admin_of(master) as client:
        client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync", "-replconf")
        client.execute_command("CLIENT", "KILL", "TYPE", "replica")


def admin_of(node: RedisProcess) -> Any:
    """Return a client of one server."""
    return redis.Redis("127.0.0.1", node.port, socket_timeout=30)


@contextmanager
def redis_cluster(
    directory: Path, *options: str, num_masters: int = 3, has_replicas: bool = False, node_timeout_ms: int = 1000
) -> Iterator[Cluster]:
    """Run a cluster until the block ends. options: of every node."""
    with ExitStack() as ending:
        nodes, bus_ports = [], []
        for number in range(num_masters * (1 + has_replicas)):
            home = directory / f"node{number}"
            home.mkdir()
            bus_ports.append(free_port())
            node = RedisProcess(
                home, "--cluster-enabled", "yes", "--cluster-port", str(bus_ports[-1]),
                "--cluster-node-timeout", str(node_timeout_ms), "--repl-diskless-sync-delay", "0",
                # A test's replica may follow its master for a moment only.
                "--cluster-replica-validity-factor", "0", *options,
            )  # fmt: skip
            ending.callback(node.kill)
            node.start()
            nodes.append(node)
        _form(nodes, bus_ports, num_masters)
        cluster = Cluster(nodes[:num_masters], nodes[num_masters:])
        cluster.wait_until_ok()
        yield cluster


def _form(nodes: list[RedisProcess], bus_ports: list[int], num_masters: int) -> None:
    """Make a cluster of servers that know nothing of one another."""
    with ExitStack() as ending:
        clients = [ending.enter_context(admin_of(node)) for node in nodes]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, bus_ports[0])
        for number, client in enumerate(clients[:num_masters]):
            first, after = (NUM_SLOTS * n // num_masters for n in (number, number + 1))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
        wait_until(lambda: all(len(client.cluster("NODES")) == len(nodes) for client in clients))
        replicas = clients[num_masters:]
        for master, replica in zip(clients, replicas, strict=False):
            replica.execute_command("CLUSTER", "REPLICATE", master.cluster("MYID"))
        wait_until(lambda: all(client.info("replication").get("master_link_status") == "up" for client in replicas))


def _is_ok(node: RedisProcess) -> bool:
    try:
        with admin_of(node) as client:
            return bool(client.cluster("INFO")["cluster_state"] == "ok")
    except redis.ConnectionError:
        return True


def move_slot(slot: int, source: RedisProcess, target: RedisProcess, masters: Sequence[RedisProcess]) -> Iterator[str]:
    """Move a slot with its keys, as tools that reshard do. Yields between the steps, so that a test can call."""
    with ExitStack() as ending:
        clients = {node.port: ending.enter_context(admin_of(node)) for node in masters}
        ids = {port: client.cluster("MYID").decode() for port, client in clients.items()}
        clients[target.port].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        clients[source.port].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        yield "migrating"
        keys = clients[source.port].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        if keys:
            clients[source.port].execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        yield "migrated"
        for client in (clients[target.port], clients[source.port], *clients.values()):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        yield "moved"

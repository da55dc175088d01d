"""Kills, pauses and replaces the processes of a deployment at random, until it is told to stop."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from benchmarks.survival import DeploymentWithRedis, Replica
from tests.harness.programs import free_port

_SETTLE_S = 1.0  # after a fault, until others may follow that must not overlap with it
_LONGEST_RECOVERY_S = 30.0
_WAITED_FOR_S = 5.0  # a little less than others wait for a silent replica after a loss (6 s, docs/operations.md)


@dataclass(frozen=True)
class Fault:
    """Something that was done to a deployment. Times are monotonic seconds."""

    kind: str
    began: float
    ended: float
    #: When Redis and a replica had died together, or the replica is silent for longer than the others wait for it. What
    #: was written between `began` and this may be lost, until that replica is back.
    lost_until: float | None = None


class Exclusion:
    """Keeps things of one kind from overlapping with those of another. Those of the same kind may overlap."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, kind: str) -> Iterator[None]:
        """Wait until nothing of another kind is there, and keep it away until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not any(count for other, count in self._held.items() if other != kind))
            self._held[kind] += 1
        try:
            yield
        finally:
            with self._changed:
                self._held[kind] -= 1
                self._changed.notify_all()


class Injector:
    """Injects faults: two threads into the replicas, but never into all of them, and one thread into Redis.

    Args:
        deployment: What to harm.
        seed: Of the choices.
        with_paused_recovery: Whether a replica may be paused while others recover from a restart of Redis.
    """

    def __init__(self, deployment: DeploymentWithRedis, seed: int, *, with_paused_recovery: bool = False) -> None:
        self.faults: list[Fault] = []
        self._deployment, self._seed = deployment, seed
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._whole = list(deployment.replicas)  # the replicas to which nothing is being done
        self._recoveries = Exclusion()  # of pauses and recoveries
        self._with_paused_recovery = with_paused_recovery
        self._losses = Exclusion()  # of deaths of replicas and losses of what Redis had written last
        self._threads = [
            threading.Thread(target=self._harm, args=(f"{seed} replica {number}", (0.5, 3), self._replica_faults()))
            for number in range(2)
        ]
        self._threads.append(threading.Thread(target=self._harm, args=(f"{seed} redis", (2, 8), self._redis_faults())))

    def start(self) -> None:
        """Start to do harm."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop, and return when everything works again."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._deployment.wait_until_all_serve()

    def covers(self, began: float, ended: float, after_s: float) -> bool:
        """Return whether a fault was there in this time, or up to `after_s` before it."""
        return any(fault.began <= ended and began <= fault.ended + after_s for fault in list(self.faults))

    def _replica_faults(self) -> list[tuple[Callable[[random.Random], None], int]]:
        return [(self._kill, 4), (self._pause, 4), (self._replace, 2)]

    def _redis_faults(self) -> list[tuple[Callable[[random.Random], None], int]]:
        paused = [(self._lose_last_second_of_a_paused_replica, 6)] if self._with_paused_recovery else []
        return [
            *paused,
            (self._restart_redis, 3),
            (self._kill_redis, 3),
            (self._lose_last_second, 3),
            (self._lose_last_second_twice, 1),
            (self._pause_redis, 3),
            (self._demote, 2),
        ]

    def _harm(
        self, seed: str, gap_s: tuple[float, float], kinds: list[tuple[Callable[[random.Random], None], int]]
    ) -> None:
        chance = random.Random(seed)
        while not self._is_over.wait(chance.uniform(*gap_s)):
            chance.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0](chance)

    @contextmanager
    def _noted(self, kind: str) -> Iterator[int]:
        """Note a fault that ends with the block; give its number."""
        began = time.monotonic()
        with self._lock:
            number = len(self.faults)
            self.faults.append(Fault(kind, began, began + _LONGEST_RECOVERY_S))
        yield number
        self.faults[number] = replace(self.faults[number], ended=time.monotonic())

    @contextmanager
    def _one_replica(self, chance: random.Random) -> Iterator[Replica]:
        with self._lock:
            replica = self._whole.pop(chance.randrange(len(self._whole)))
        try:
            yield replica
        finally:
            replica.wait_until_ready()
            with self._lock:
                self._whole.append(replica)

    def _kill(self, chance: random.Random) -> None:
        with self._losses.hold("death"), self._one_replica(chance) as replica, self._noted("replica killed"):
            replica.kill()
            time.sleep(chance.uniform(0, 2))
            replica.start()
            replica.wait_until_ready()

    def _replace(self, chance: random.Random) -> None:
        with self._losses.hold("death"), self._one_replica(chance) as replica, self._noted("replica replaced"):
            replica.process.terminate()
            replica.process.wait(60)
            replica.start()
            replica.wait_until_ready()

    def _pause(self, chance: random.Random) -> None:
        seconds = chance.uniform(1, 6) if chance.random() < 0.7 else chance.uniform(6, 20)
        # What only a replica has that is silent for long, others can't restore, as if it had died.
        losses = self._losses.hold("death") if seconds > _WAITED_FOR_S else nullcontext()
        with (
            losses,
            self._recoveries.hold("pause"),
            self._one_replica(chance) as replica,
            self._noted("replica paused"),
        ):
            replica.send(signal.SIGSTOP)
            self._is_over.wait(seconds)
            replica.send(signal.SIGCONT)
            replica.wait_until_ready()
            time.sleep(_SETTLE_S)

    @contextmanager
    def _recovery(self, kind: str) -> Iterator[int]:
        """Do something after which the replicas recover: the block ends when Redis works. Gives the fault's number."""
        with self._recoveries.hold("pause" if self._with_paused_recovery else "recovery"):
            with self._noted(kind) as number:
                yield number
                deadline = time.monotonic() + _LONGEST_RECOVERY_S
                while time.monotonic() < deadline:
                    with self._lock:
                        whole = list(self._whole)
                    if all(replica.is_ready() for replica in whole):
                        break
                    time.sleep(0.1)
            time.sleep(_SETTLE_S)

    def _restart_redis(self, chance: random.Random) -> None:
        with self._recovery("redis restarted"):
            self._deployment.redis.terminate()
            time.sleep(chance.uniform(0, 1))
            self._deployment.redis.start()

    def _kill_redis(self, chance: random.Random) -> None:
        with self._recovery("redis killed"):
            self._deployment.redis.kill()
            time.sleep(chance.uniform(0, 1))
            self._deployment.redis.start()

    def _lose_last_second(self, chance: random.Random) -> None:
        with self._losses.hold("loss"), self._recovery("redis killed, the last second lost"):
            on_disk = self._deployment.redis.on_disk()
            time.sleep(chance.uniform(0.1, 0.9))
            self._lose(on_disk)

    def _lose_last_second_twice(self, chance: random.Random) -> None:
        with self._losses.hold("loss"), self._recovery("redis and a replica killed, the last second lost") as number:
            on_disk = self._deployment.redis.on_disk()
            time.sleep(chance.uniform(0.1, 0.9))
            with self._one_replica(chance) as replica:
                replica.kill()
                self._lose(on_disk, number)
                replica.start()

    def _lose_last_second_of_a_paused_replica(self, chance: random.Random) -> None:
        seconds = chance.uniform(3, 10)
        kind = "replica paused, redis killed, the last second lost"
        with self._losses.hold("loss"), self._recovery(kind) as number:
            on_disk = self._deployment.redis.on_disk()
            time.sleep(chance.uniform(0.1, 0.9))
            with self._one_replica(chance) as replica:
                replica.send(signal.SIGSTOP)
                self._lose(on_disk, number if seconds > _WAITED_FOR_S else None)
                time.sleep(seconds)
                replica.send(signal.SIGCONT)

    def _lose(self, on_disk: dict[Path, int], number: int | None = None) -> None:
        self._deployment.redis.kill()
        if number is not None:
            self.faults[number] = replace(self.faults[number], lost_until=time.monotonic())
        self._deployment.redis.lose_what_was_written_since(on_disk)
        self._deployment.redis.start()

    def _pause_redis(self, chance: random.Random) -> None:
        with self._noted("redis paused"):
            self._deployment.redis.send(signal.SIGSTOP)
            time.sleep(chance.choice([0.2, 0.5, 1, 2, 5]))
            self._deployment.redis.send(signal.SIGCONT)

    def _demote(self, chance: random.Random) -> None:
        with self._recovery("redis demoted"), redis.Redis("127.0.0.1", self._deployment.redis.port) as client:
            client.replicaof("127.0.0.1", str(free_port()))  # where no master is
            time.sleep(chance.uniform(0.5, 3))
            client.replicaof("NO", "ONE")

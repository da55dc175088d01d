"""A real Redis server of a test's own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.harness.programs import free_port, program
from tests.harness.wait import wait_until


class RedisProcess:
    """A Redis server that a test can kill, pause, and start again with what it had written to disk.

    Args:
        directory: Where it writes its files.
        options: More options of `redis-server`.
        address: The address on which it listens.
        prefix: Words before its command, such as those that run it in another network namespace.
    """

    def __init__(self, directory: Path, *options: str, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.port, self._directory, self._options = free_port(), directory, options
        self._address, self._prefix = address, prefix
        self.url = f"redis://{address}:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [*self._prefix, program("redis-server"), "--port", str(self.port), "--bind", self._address]
        command += ["--save", "", "--protected-mode", "no"]
        command += ["--dir", str(self._directory), *self._options]
        process = self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis(self._address, self.port, protocol=2) as client:

            def answers() -> bool:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert process.poll() is None, "redis-server ended at its start"
                    return False
                return True

            wait_until(answers)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process. After SIGKILL, return when the process has ended."""
        if self._process is not None:
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()
                self._process = None

    def terminate(self) -> None:
        """End it as an operator does: it first writes everything to disk."""
        self.send(signal.SIGTERM)
        if self._process is not None:
            self._process.wait(30)
            self._process = None

    def on_disk(self) -> dict[Path, int]:
        """Return the files that hold its data, with their lengths."""
        return {path: path.stat().st_size for path in self._directory.rglob("*.aof")}

    def lose_what_was_written_since(self, before: dict[Path, int]) -> None:
        """Truncate its files, as if its machine had died before the disk had the rest. It must not be running."""
        for path, length in before.items():
            os.truncate(path, length)

    def kill(self) -> None:
        """End it at once."""
        self.send(signal.SIGKILL)


@contextmanager
def redis_process(directory: Path, *options: str, **place: Any) -> Iterator[RedisProcess]:
    """Run a Redis server until the block ends. For the arguments see RedisProcess."""
    process = RedisProcess(directory, *options, **place)
    process.start()
    try:
        yield process
    finally:
        process.kill()

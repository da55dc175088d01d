"""Real servers for tests: found on this machine, started on free ports, ended by their process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis


def program(name: str) -> str:
    """Its path. Without it the test is skipped; where CI is set it fails."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisProcess:
    """A Redis server of a test's own, which can be killed, paused and started again with what it had on disk.

    address: that it listens on. prefix: words before its command.
    """

    def __init__(self, directory: Path, *options: str, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.port, self._directory, self._options = free_port(), directory, options
        self._address, self._prefix = address, prefix
        self.url = f"redis://{address}:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [*self._prefix, program("redis-server"), "--port", str(self.port), "--bind", self._address]
        command += ["--save", "", "--protected-mode", "no"]
        command += ["--dir", str(self._directory), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        with redis.Redis(self._address, self.port) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    assert self._process.poll() is None
                    time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process; after SIGKILL it has ended when this returns."""
        if self._process is not None:
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()
                self._process = None

    def on_disk(self) -> dict[Path, int]:
        """The files that hold what was written, with their lengths."""
        return {path: path.stat().st_size for path in self._directory.rglob("*.aof")}

    def lose_what_was_written_since(self, before: dict[Path, int]) -> None:
        """While it doesn't run: as if the machine had died before its disk had the rest."""
        for path, length in before.items():
            os.truncate(path, length)

    def kill(self) -> None:
        """End it at once."""
        self.send(signal.SIGKILL)


@contextmanager
def redis_process(directory: Path, *options: str, **place: Any) -> Iterator[RedisProcess]:
    """A Redis server that runs, until the block ends. See RedisProcess."""
    process = RedisProcess(directory, *options, **place)
    process.start()
    try:
        yield process
    finally:
        process.kill()

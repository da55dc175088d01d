"""A network of its own for one server, from which packets can be dropped without a word."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Addresses that are set aside for measuring (RFC 2544).
HERE, THERE = "198.18.0.1", "198.18.0.2"


@dataclass(frozen=True)
class Hole:
    """name: of the network namespace. address: of what runs in it."""

    name: str
    address: str = THERE

    @property
    def command(self) -> tuple[str, ...]:
        """Before a command that is to run in it."""
        return ("ip", "netns", "exec", self.name)

    def drop(self) -> None:
        """From now on nothing that is sent to it is taken, and nothing comes back: no answer, no refusal."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{HERE}/32")

    def let_through(self) -> None:
        """What is sent arrives again."""
        _ip("-n", self.name, "route", "del", "blackhole", f"{HERE}/32")


@contextmanager
def hole() -> Iterator[Hole]:
    """Such a network, until the block ends. Takes root and iproute2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise SystemExit("dropping packets takes root, and iproute2")
    name = f"gru-serve-{os.getpid()}"
    ends = (f"gru{os.getpid()}", f"urg{os.getpid()}")
    _ip("netns", "add", name)
    try:
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", name)
        _ip("address", "add", f"{HERE}/30", "dev", ends[0])
        _ip("link", "set", ends[0], "up")
        _ip("-n", name, "address", "add", f"{THERE}/30", "dev", ends[1])
        _ip("-n", name, "link", "set", ends[1], "up")
        yield Hole(name)
    finally:
        _ip("netns", "delete", name)  # and with it both ends


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

"""A network namespace for one server whose packets can be dropped silently, as by a broken network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Addresses that RFC 2544 reserves for benchmarks.
HERE, THERE = "198.18.0.1", "198.18.0.2"


@dataclass(frozen=True)
class Hole:
    """A network namespace, connected to this machine, that can drop all packets."""

    name: str
    address: str = THERE  # of the server that runs in it

    @property
    def command(self) -> tuple[str, ...]:
        """The words that, before a command, run it in this namespace."""
        return ("ip", "netns", "exec", self.name)

    def drop(self) -> None:
        """Start dropping packets: senders get neither a response nor an error."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{HERE}/32")

    def let_through(self) -> None:
        """Stop dropping packets."""
        _ip("-n", self.name, "route", "del", "blackhole", f"{HERE}/32")


def can_drop_packets() -> bool:
    """Whether this process may create a `Hole`: it must be root's, and iproute2 must be installed."""
    return shutil.which("ip") is not None and os.geteuid() == 0


@contextmanager
def hole() -> Iterator[Hole]:
    """Create a network until the block ends. Exits with a message if `can_drop_packets` is false."""
    if not can_drop_packets():
        raise SystemExit("dropping packets needs root and iproute2")
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
        _ip("netns", "delete", name)  # also deletes both ends of the link


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

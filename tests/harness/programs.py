"""Other programs that tests run, and ports for those that need one."""

from __future__ import annotations

import os
import random
import shutil
import socket
from itertools import cycle

# Below the ports that the kernel gives out by itself (32768 and above on Linux): between the probe and the program's
# start, neither an outgoing connection nor a server that listens on port 0 can get the same one.
_PORTS = range(20_000, 32_000)
# Each worker of pytest-xdist has ports of its own, and a process gives out each port once before it repeats one. So no
# two tests get the same port, even if the program of the first has not begun to listen.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_own_ports = list(_PORTS[_WORKER::_NUM_WORKERS])
random.SystemRandom().shuffle(_own_ports)  # so that another run of the suite on this machine rarely tries the same one
_next_ports = cycle(_own_ports)


def program(name: str) -> str:
    """Return the path of an installed program. Skip the test if it is not installed; fail it where CI is set."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        import pytest  # not at the top: benchmarks that measure their own memory import this module

        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")
    return found


def free_port() -> int:
    """Return a port on which nothing listens now.

    Use it only for programs that can neither listen on port 0 and report the port, nor inherit a listening socket:
    Redis (`--port 0` turns TCP off), containers, and servers that must get the same port again after a restart.
    """
    for port in _next_ports:
        with socket.socket() as probe:
            # As the servers do: a connection of a former server that still closes does not take the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the ports repeat without end")


def has_ipv6() -> bool:
    """Return whether this machine has a loopback address of IPv6."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False

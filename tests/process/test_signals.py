"""Signals with which gunicorn changes its number of processes: this server keeps its one worker."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.programs import free_port
from tests.harness.server import SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until


def processes(server: Server) -> list[int]:
    """Return the ids of the server's processes below its parent process."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    with serving(SERVE, environment) as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2, signal.SIGHUP])
def test_signal__starts_and_stops_no_process(server: Server, number: signal.Signals) -> None:
    """A session in memory is found by every request afterwards; the log says why nothing happened."""
    with Client(f"http://127.0.0.1:{server.port}") as client:
        session = client.create("ROMEO:", seed=7)
        before, logged = processes(server), len(server.log)
        assert len(before) == 1
        os.kill(before[0], number)  # as when a terminal sends it to the whole group
        server.process.send_signal(number)
        server.process.send_signal(signal.SIGWINCH)  # gunicorn handles signals in order, and this one does nothing
        wait_until(lambda: any("Handling signal: winch" in line for line in server.log[logged:]))
        [line] = [line for line in map(json.loads, server.log[logged:]) if line["event"] == "signal ignored"]
        assert line["signal"] == number.name
        assert "replica" in line["reason"]
        assert processes(server) == before
        for _ in range(20):  # each on a connection of its own
            client.close()
            assert client.open(session.id).text() == "ROMEO:"


def test_sighup__changes_nothing_with_sessions_in_redis(tiny_store: ModelStore, redis_url: str) -> None:
    """Another worker would find the sessions, but while the old one drained, it would refuse half of the requests."""
    environment = {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_SESSION_STORE": redis_url,
    }
    with serving(SERVE, environment) as server, Client(f"http://127.0.0.1:{server.port}") as client:
        session, before = client.create("ROMEO:", seed=7), processes(server)
        os.kill(before[0], signal.SIGHUP)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: bool(server.logged("signal ignored")))
        assert processes(server) == before
        assert session.feed("a").position == 7


def test_closed_terminal__ends_the_server_and_frees_its_port(tiny_store: ModelStore) -> None:
    """The kernel sends SIGHUP to the whole group, as when a window is closed."""
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    port = free_port()
    command = [*SERVE[:-1], str(port)]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command], env=os.environ | environment, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    try:
        wait_until(Endpoint(port).is_ready)
        os.close(terminal)
        assert process.wait(60) == 0
        socket.create_server(("127.0.0.1", port)).close()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# Makes the terminal on standard input the controlling one of a new session, and becomes the given command.
ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""

"""Signals with which gunicorn changes its number of processes: this server keeps its one worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.server import SERVE, Server, serving
from tests.harness.wait import wait_until


def processes(server: Server) -> list[int]:
    """Return the ids of the server's processes below its parent process."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2])
def test_signal__starts_and_stops_no_process(tiny_store: ModelStore, number: signal.Signals) -> None:
    """A session in memory is found by every request afterwards; the log says why nothing happened."""
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    with serving(SERVE, environment) as server, Client(f"http://127.0.0.1:{server.port}") as client:
        session = client.create("ROMEO:", seed=7)
        before = processes(server)
        assert len(before) == 1
        os.kill(before[0], number)  # as when a terminal sends it to the whole group
        server.process.send_signal(number)
        server.process.send_signal(signal.SIGWINCH)  # gunicorn handles signals in order, and this one does nothing
        wait_until(lambda: any("Handling signal: winch" in line for line in server.log))
        [line] = server.logged("signal ignored")
        assert line["signal"] == number.name
        assert "replica" in line["reason"]
        assert processes(server) == before
        for _ in range(20):  # each on a connection of its own
            client.close()
            assert client.open(session.id).text() == "ROMEO:"

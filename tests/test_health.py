"""The image's health check finds the port on which the server listens, and asks it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import health
from service.store.model_store import ModelStore
from tests.harness.programs import has_ipv6
from tests.harness.server import SERVE, Endpoint, Server, serving

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")


def only(tmp_path: Path, pid: int) -> Path:
    """Return a /proc in which there is one process, as in a container."""
    tmp_path.joinpath(str(pid)).symlink_to(f"/proc/{pid}")
    return tmp_path


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    """A server that listens on all addresses of both kinds, on a port that no variable names."""
    host = "::" if has_ipv6() else "0.0.0.0"
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny", "GRU_SERVE_PORT": "1"}
    with serving([*SERVE, "--host", host], environment) as server:
        yield server


def test_addresses__are_where_the_server_listens(server: Server, tmp_path: Path) -> None:
    host = "::1" if has_ipv6() else "127.0.0.1"
    assert list(health.addresses(only(tmp_path, server.process.pid))) == [(host, server.port)]


def test_addresses__are_of_servers_only(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert list(health.addresses(only(tmp_path, os.getpid()))) == []


def test_main__asks_every_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(health.addresses(only(tmp_path, server.process.pid)))
    monkeypatch.setattr(health, "addresses", lambda: found)
    assert health.main() == 0
    monkeypatch.setattr(health, "addresses", list)
    assert health.main() == 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(health, "_TIMEOUT_S", 0.1)
        monkeypatch.setattr(health, "addresses", lambda: [*found, silent.getsockname()])
        assert health.main() == 1
    assert "no gru-serve listens here" in capsys.readouterr().err


def test_dockerfile__runs_it() -> None:
    command = re.search(
        r'^HEALTHCHECK .*CMD \["python", "-m", "service\.health"\]$', (ROOT / "Dockerfile").read_text(), re.M
    )
    assert command is not None
    code = "import sys, service.health; print([name for name in sys.modules if name.startswith('service.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['service.health']\n"


@needs_ipv6
def test_server__on_all_ipv6_addresses_also_answers_ipv4(server: Server) -> None:
    """As in a cluster that has only IPv6, and in one that has both."""
    assert Endpoint(server.port).is_ready()
    with socket.create_connection(("::1", server.port), timeout=10) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: [::1]:{server.port}\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 200")

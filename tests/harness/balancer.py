"""The real balancer: HAProxy with the shipped configuration, in front of replicas on this machine."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.harness.programs import program
from tests.harness.server import SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
BACKENDS = ("sessions", "any_session", "completions")


@dataclass(frozen=True)
class Balancer(Server):
    """HAProxy in front of replicas; requests go to it as to a server."""

    metrics_port: int  # of its own metrics

    def requests(self) -> dict[str, dict[str, Any]]:
        """Return what it has logged so far about each request, by the request's id."""
        lines = [json.loads(line) for line in list(self.log) if line.startswith("{")]
        return {line["request_id"]: line for line in lines}

    def up(self, backend: str) -> set[int]:
        """Return the numbers, from 1, of the replicas that its checks find ready."""
        connection = Endpoint(self.metrics_port).connect()
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        pattern = rf'haproxy_server_status{{proxy="{backend}",server="app(\d+)",state="UP"}} 1'
        return {int(number) for number in re.findall(pattern, text)}


@contextmanager
def balancing(ports: Sequence[int], name_server: int | None = None, **changes: str) -> Iterator[Balancer]:
    """Start HAProxy in front of replicas, and wait until it has found those of them that are ready.

    The configuration is the shipped one with other addresses: containers are found by DNS. HAProxy inherits sockets
    that listen already, because it accepts no port 0, and a port that was probed could be taken by another program.

    Args:
        ports: Of the replicas.
        name_server: The port of a name server that knows the replicas' addresses. They all have the first port.
        changes: Other values for lines of the configuration, such as `timeout_queue="1s"`.
    """
    text = CONFIGURATION.read_text()
    if name_server is None:
        servers = "\n".join(f"    server app{number} 127.0.0.1:{port}" for number, port in enumerate(ports, 1))
        text, num_found = re.subn(r"^ +server-template .*$", servers, text, flags=re.MULTILINE)
        assert num_found == len(BACKENDS)
    else:
        line = f"    nameserver test 127.0.0.1:{name_server}"
        text, num_found = re.subn(r"^ +parse-resolv-conf$", line, text, flags=re.MULTILINE)
        assert num_found == 1
    for name, value in changes.items():
        words = name.replace("__", "-").replace("_", " ")
        text, num_found = re.subn(rf"^( +{words}) .*$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert num_found == 1, words
    with TemporaryDirectory() as directory:
        path = Path(directory, "haproxy.cfg")
        path.write_text(text)
        with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as metrics:
            sockets = {"LB_BIND": front, "LB_METRICS_BIND": metrics}
            process = subprocess.Popen(
                [program("haproxy"), "-W", "-db", "-f", str(path)],
                env=os.environ
                | {name: f"fd@{each.fileno()}" for name, each in sockets.items()}
                | {"APP_HOST": "app.test", "APP_PORT": str(ports[0])},
                pass_fds=[each.fileno() for each in sockets.values()],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            port, metrics_port = front.getsockname()[1], metrics.getsockname()[1]
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stdout or []))
        reader.start()
        balancer = Balancer(port, process, log, metrics_port)
        try:
            ready = {number for number, port in enumerate(ports, 1) if Endpoint(port).is_ready()}
            wait_until(lambda: _has_checked(balancer, ready))
            yield balancer
        finally:
            process.kill()  # SIGTERM would wait for its streams
            process.wait(30)
            reader.join()
            if process.stdout:
                process.stdout.close()


@contextmanager
def replicas(num_replicas: int, environment: dict[str, str]) -> Iterator[list[Server]]:
    """Start servers with the same settings; all of them are ready."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(SERVE, environment)) for _ in range(num_replicas)]


def served_by(balancer: Balancer, method: str, path: str, body: object = None) -> str:
    """Send a request; return the backend and server to which the balancer sent it."""
    request_id = secrets.token_hex(8)
    with closing(balancer.connect()) as connection:
        data = json.dumps(body).encode() if body is not None else b""
        connection.request(method, path, data, {"Content-Type": "application/json", "X-Request-Id": request_id})
        response = connection.getresponse()
        assert response.status < 400, response.read()
        response.read()
    wait_until(lambda: request_id in balancer.requests())
    server: str = balancer.requests()[request_id]["server"]
    return server


def kill(server: Server) -> None:
    """End every process of a replica at once, as when its machine loses power, and wait until they have ended."""
    worker = int(server.worker.name)
    descriptor = os.pidfd_open(worker)
    try:
        server.process.kill()
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        server.process.wait(30)
        # On a busy machine the worker's listener would still accept connections, and reset them later.
        ended = select.select([descriptor], [], [], 30)[0]
        assert ended, f"the worker {worker} did not end within 30 s"
    finally:
        os.close(descriptor)


def _has_checked(balancer: Balancer, ready: set[int]) -> bool:
    """Return whether every backend has found exactly these replicas ready."""
    assert balancer.process.poll() is None, "".join(balancer.log)
    try:
        return all(balancer.up(backend) == ready for backend in BACKENDS)
    except OSError:
        return False

"""The real balancer for tests: HAProxy with the configuration that is shipped, in front of replicas on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.parts import free_port, program
from tests.serving import SERVE, Server, serving, wait_until

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "haproxy.cfg"
BACKENDS = ("sessions", "any_session", "completions")


class Balancer(Server):
    """HAProxy in front of replicas; asked like a server. metrics_port: of its own metrics."""

    metrics_port = 0

    def requests(self) -> dict[str, dict[str, Any]]:
        """What it has logged so far about each request, by the request's id."""
        lines = [json.loads(line) for line in list(self.log) if line.startswith("{")]
        return {line["request_id"]: line for line in lines}

    def up(self, backend: str) -> set[int]:
        """The numbers of the replicas that its checks find ready, from 1."""
        connection = self.connect()
        connection.port = self.metrics_port
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        pattern = rf'haproxy_server_status{{proxy="{backend}",server="app(\d+)",state="UP"}} 1'
        return {int(number) for number in re.findall(pattern, text)}


@contextmanager
def balancing(ports: Sequence[int], **changes: str) -> Iterator[Balancer]:
    """Start HAProxy in front of replicas on these ports, and wait until it finds the ready ones of them.

    The configuration is the shipped one but for the addresses: containers are found by DNS. changes: other values of
    its lines, as timeout_queue="1s".
    """
    text = CONFIGURATION.read_text()
    servers = "\n".join(f"    server app{number} 127.0.0.1:{port}" for number, port in enumerate(ports, 1))
    text, num_found = re.subn(r"^ +server-template .*$", servers, text, flags=re.MULTILINE)
    assert num_found == len(BACKENDS)
    for name, value in changes.items():
        words = name.replace("__", "-").replace("_", " ")
        text, num_found = re.subn(rf"^( +{words}) .*$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert num_found == 1, words
    with TemporaryDirectory() as directory:
        path = Path(directory, "haproxy.cfg")
        path.write_text(text)
        port, metrics_port = free_port(), free_port()
        addresses = {"LB_BIND": f"127.0.0.1:{port}", "LB_METRICS_BIND": f"127.0.0.1:{metrics_port}"}
        command = [program("haproxy"), "-W", "-db", "-f", str(path)]
        process = subprocess.Popen(
            command, env=os.environ | addresses, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stdout or []))
        reader.start()
        balancer = Balancer(port, process, log)
        object.__setattr__(balancer, "metrics_port", metrics_port)
        try:
            ready = {number for number, port in enumerate(ports, 1) if _is_ready(port)}
            wait_until(lambda: _has_checked(balancer, ready))
            yield balancer
        finally:
            process.kill()  # it would wait for its streams
            process.wait(30)
            reader.join()
            if process.stdout:
                process.stdout.close()


@contextmanager
def replicas(num_replicas: int, environment: dict[str, str]) -> Iterator[list[Server]]:
    """So many servers with the same settings, all of them ready."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(SERVE, environment)) for _ in range(num_replicas)]


def kill(server: Server) -> None:
    """End a replica as a machine ends that loses power: every process of it, without a word."""
    worker = int(server.worker.name)
    server.process.kill()
    os.kill(worker, signal.SIGKILL)
    server.process.wait(30)


def _is_ready(port: int) -> bool:
    try:
        return Server(port, None, []).call("GET", "/readyz")[0] == 200  # type: ignore[arg-type]
    except OSError:
        return False


def _has_checked(balancer: Balancer, ready: set[int]) -> bool:
    assert balancer.process.poll() is None, "".join(balancer.log)
    try:
        return all(balancer.up(backend) == ready for backend in BACKENDS)
    except OSError:
        return False

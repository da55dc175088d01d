"""The image and the compose file in the containers that users run. `make test-deploy` runs this; it takes minutes."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import RemoteDisconnected
from typing import Any

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.deploy.containers import PROJECT, Containers, find_containers
from tests.harness.balancer import BACKENDS
from tests.harness.programs import free_port
from tests.harness.server import SERVE, Endpoint, serving
from tests.harness.wait import wait_until

IMAGE = f"{PROJECT}:latest"
BASE = "docker.io/library/python:3.11-slim-bookworm"
STARTS_S = 180  # a busy machine needs 40 s for what takes an idle one 6
CLOSED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
BODY = {"prompt": "ROMEO:", "max_tokens": 60, "seed": 7}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("TEST_DEPLOY"), reason="make test-deploy: it builds an image"),
]


@pytest.fixture(scope="module")
def containers() -> Containers:
    return find_containers()


@pytest.fixture(scope="module")
def image(containers: Containers) -> Iterator[str]:
    """The image, built from the Dockerfile and removed after the tests; the engine's build cache stays."""
    began = time.monotonic()
    containers.build(IMAGE)
    report(f"image built in {time.monotonic() - began:.0f} s")
    yield IMAGE
    containers.run("rmi", "-f", IMAGE, check=False)


@pytest.fixture(scope="module")
def expected() -> Iterator[str]:
    """The text with which a server outside a container answers BODY."""
    with serving(SERVE, {}) as server:
        yield server.call("POST", "/v1/completions", BODY)[1]["choices"][0]["text"]


def report(figure: str) -> None:
    """Print a figure for the docs."""
    print(f"\n{figure}")  # noqa: T201 - these tests also measure


def healthcheck(containers: Containers, image: str) -> list[str]:
    """Return the command of the image's health check, wherever the engine stores it."""
    facts = containers.inspect(image)
    check = facts.get("HealthCheck") or facts.get("Healthcheck") or facts["Config"]["Healthcheck"]
    words: list[str] = check["Test"]
    return words


@contextmanager
def running(containers: Containers, image: str, *options: str) -> Iterator[tuple[str, Endpoint]]:
    """Run a container of the image with the fewest permissions that it needs; return its id and its server, ready."""
    port = free_port()
    closed = [*CLOSED, *(["--read-only-tmpfs=false"] if containers.engine == "podman" else [])]
    with containers.started(*closed, "-p", f"127.0.0.1:{port}:8000", *options, image) as container:
        wait_until(Endpoint(port).is_ready, STARTS_S)
        yield container, Endpoint(port)


def test_image__states_how_to_run_it(containers: Containers, image: str) -> None:
    facts = containers.inspect(image)
    config = facts["Config"]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["gru-serve"], ["serve"])  # no shell that would swallow signals
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert config["Labels"]["org.opencontainers.image.title"] == "gru-serve"
    assert healthcheck(containers, image)[0] == "CMD"
    size, base = facts["Size"], containers.inspect(BASE)["Size"]
    report(f"image: {size / 1e6:.0f} MB, of which {(size - base) / 1e6:.0f} MB on top of {BASE}")
    assert size - base < 200_000_000


def test_image__serves_from_a_read_only_file_system(containers: Containers, image: str, expected: str) -> None:
    began = time.monotonic()
    with running(containers, image) as (container, server):
        report(f"ready {time.monotonic() - began:.2f} s after the start")
        status, answer = server.call("POST", "/v1/completions", BODY)
        assert (status, answer["choices"][0]["text"]) == (200, expected)
        assert containers.execute(container, "id", "-u") == (0, "10001\n")
        for place in ("/srv/a", "/tmp/a", "/opt/gru-serve/a", "/a"):
            assert containers.execute(container, "touch", place)[0] != 0, place
        for compiler in ("gcc", "g++", "cc", "c++", "clang", "ld", "as", "make"):
            assert containers.execute(container, "sh", "-c", f"command -v {compiler}")[0] != 0, compiler
        assert "No module named 'torch'" in containers.execute(container, "python", "-c", "import torch")[1]
        code, output = containers.execute(container, "gru-serve", "train", "--corpus", "/etc/hosts", "--name", "a")
        assert code == 1
        assert "WITH_TORCH=1" in output
        assert containers.execute(container, *healthcheck(containers, image)[1:]) == (0, "")
        with Client(f"http://127.0.0.1:{server.port}") as client, ThreadPoolExecutor(1) as pool:
            stream = client.create("ROMEO:", seed=7).generate(2000)
            pieces = [next(stream)]
            stopped = pool.submit(containers.run, "stop", "-t", "60", container)
            pieces += list(stream)
            stopped.result(90)
        assert len("".join(pieces)) == 2000
        assert "".join(pieces).startswith(expected)
        assert containers.inspect(container)["State"]["ExitCode"] == 0


def test_image__serves_a_mounted_model_store(containers: Containers, image: str, tiny_store: ModelStore) -> None:
    os.chmod(tiny_store.root, 0o755)
    mount = ("-v", f"{tiny_store.root}:/srv/model_store:ro", "-e", "GRU_SERVE_MODEL=tiny")
    with running(containers, image, *mount) as (_, server):
        status, answer = server.call("POST", "/v1/completions", BODY)
        assert (status, answer["model"]) == (200, "tiny@1")


def all_replicas_are_up(containers: Containers) -> bool:
    """Return whether the last check of each backend of the balancer has found each replica that runs ready.

    The balancer answers as soon as one is. Before the first check it takes all of them for ready, and its metric
    `haproxy_server_status` says so. It does not publish its metrics, and its image can send no HTTP request.
    """
    (balancer,) = containers.of_project("lb")
    get = r'exec 3<>/dev/tcp/127.0.0.1/8404 && printf "GET /metrics HTTP/1.0\r\n\r\n" >&3 && cat <&3'
    code, metrics = containers.execute(balancer, "bash", "-c", get)
    num_up = len(re.findall(r'haproxy_server_check_status\{.*server="app\d+",state="L7OK"\} 1', metrics))
    return code == 0 and num_up == len(BACKENDS) * len(containers.of_project("app")) > 0


@pytest.fixture(scope="module")
def project(containers: Containers, image: str) -> Iterator[Endpoint]:
    """The balancer of the compose file, with three replicas."""
    port = free_port()
    # Redis runs as the owner of its folder: user redis in the official image, perhaps root in another one.
    stat = ("run", "--rm", "--entrypoint", "stat", "docker.io/library/redis:7-bookworm", "-c", "%u:%g", "/data")
    environment = {
        "PUBLISH": f"127.0.0.1:{port}",
        "IMAGE": image,
        "REDIS_USER": containers.run(*stat).strip().splitlines()[-1],
        "GRU_SERVE_STATE_KEYS": "a key for tests alone",
    }
    began = time.monotonic()
    with containers.up(3, environment):
        wait_until(lambda: all_replicas_are_up(containers), STARTS_S)
        report(f"three replicas, Redis and the balancer: ready in {time.monotonic() - began:.1f} s")
        yield Endpoint(port)
    assert containers.of_project(also_stopped=True) == []


def test_compose__publishes_only_the_balancer(containers: Containers, project: Endpoint) -> None:
    names = containers.of_project()
    assert len(names) >= 5  # three replicas, Redis and the balancer
    for name in names:
        published = [port for port in (containers.inspect(name)["NetworkSettings"]["Ports"] or {}).values() if port]
        assert bool(published) == ("lb" in name.removeprefix(PROJECT)), name
        facts = containers.inspect(name)["HostConfig"]
        assert facts["ReadonlyRootfs"]
    assert project.call("GET", "/metrics")[0] == 404


def test_compose__replicas_answer_completions_alike(containers: Containers, project: Endpoint, expected: str) -> None:
    replicas = containers.of_project("app")
    assert len(replicas) == 3

    def all_have_answered() -> bool:
        status, answer = project.call("POST", "/v1/completions", BODY)
        assert (status, answer["choices"][0]["text"]) == (200, expected)
        return all('"/v1/completions"' in containers.logs(name) for name in replicas)

    wait_until(all_have_answered)


def test_compose__the_balancer_reads_its_configuration_again_under_a_stream(
    containers: Containers, project: Endpoint, expected: str
) -> None:
    (balancer,) = containers.of_project("lb")
    with Client(f"http://127.0.0.1:{project.port}", retry_s=60) as client:
        stream = client.create("ROMEO:", seed=7).generate(8000)
        text = next(stream)
        containers.run("kill", "--signal", "USR2", balancer)
        wait_until(lambda: containers.logs(balancer).count("Loading success") == 2)
        assert client.complete("ROMEO:", max_tokens=60, seed=7).text == expected
        text += "".join(stream)
        assert len(text) == 8000
        assert text.startswith(expected)


def test_compose__streams_survive_a_killed_and_a_stopped_replica(containers: Containers, project: Endpoint) -> None:
    """One replica is killed, another one stopped: other requests are answered, and streams lose and double nothing.

    The balancer never repeats a request that it has sent to a replica. So the answer that the killed replica was
    writing is lost, and its client gets an error or, if the balancer's check noticed the death first, a closed
    connection; a stopped replica finishes its answers.
    """

    def complete() -> tuple[int, dict[str, Any]]:
        try:
            return project.call("POST", "/v1/completions", BODY)
        except RemoteDisconnected:
            return 502, {"error": {"code": "outcome_unknown"}}

    with Client(f"http://127.0.0.1:{project.port}", retry_s=60) as client:
        whole = "".join(client.create("ROMEO:", seed=7).generate(8000))
        for end in (("kill",), ("stop", "-t", "60")):
            wait_until(lambda: all_replicas_are_up(containers), STARTS_S)
            sessions = [client.create("ROMEO:", seed=7) for _ in range(6)]
            streams = [session.generate(8000) for session in sessions]
            texts = [next(stream) for stream in streams]
            victim = containers.of_project("app")[0]
            with ThreadPoolExecutor(len(streams) + 1) as pool:
                ended = pool.submit(containers.run, *end, victim)
                rests = [pool.submit("".join, stream) for stream in streams]
                answers = [complete() for _ in range(20)]
                lost = [answer for status, answer in answers if status != 200]
                assert all(answer["error"]["code"] == "outcome_unknown" for answer in lost), lost
                assert len(lost) <= (end == ("kill",)), lost
                texts = [text + rest.result(120) for text, rest in zip(texts, rests, strict=True)]
                ended.result(120)
            assert texts == [whole] * 6
            state = containers.inspect(victim)["State"]
            assert not state["Running"]
            assert state["ExitCode"] == (137 if end == ("kill",) else 0), json.dumps(state)

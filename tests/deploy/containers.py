"""Docker or podman: build images, run containers, bring the compose file up and down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "gru-serve-test"
_PROJECT_LABELS = ("com.docker.compose.project", "io.podman.compose.project")
_TIMEOUT_S = 900
# Of each container in the report of a failure.
_REPORT_LINES, _REPORT_COLUMNS = 300, 300


@dataclass(frozen=True)
class Containers:
    """A container engine that is called by its command line."""

    engine: str  # "docker" or "podman"
    compose: tuple[str, ...]  # the words that begin a command of compose
    build_options: tuple[str, ...] = ()  # more options that `build` needs

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command of the engine; return what it prints."""
        return _output([self.engine, *words], check=check)

    def inspect(self, name: str) -> Any:
        """Return the engine's facts about a container or an image."""
        return json.loads(self.run("inspect", name))[0]

    def build(self, tag: str, *options: str) -> None:
        """Build the Dockerfile."""
        self.run("build", *self.build_options, "-t", tag, *options, str(ROOT))

    @contextmanager
    def started(self, *words: str) -> Iterator[str]:
        """Run a container until the block ends; return its id."""
        container = self.run("run", "-d", *words).strip().splitlines()[-1]
        try:
            with self.explaining(container):
                yield container
        finally:
            self._remove(container)

    def _remove(self, container: str) -> None:
        """Remove a container with its volumes, also one that runs; podman would wait until it has drained."""
        self.run("kill", container, check=False)
        self.run("rm", "-f", "-v", container, check=False)

    def execute(self, container: str, *words: str) -> tuple[int, str]:
        """Run a command inside a container; return its exit code and output."""
        result = subprocess.run(
            [self.engine, "exec", container, *words], capture_output=True, text=True, timeout=60, check=False
        )
        return result.returncode, result.stdout + result.stderr

    def logs(self, container: str) -> str:
        """Return all that a container has written to its standard output and error."""
        result = subprocess.run([self.engine, "logs", container], capture_output=True, text=True, check=True)
        return result.stdout + result.stderr

    @contextmanager
    def explaining(self, *names: str) -> Iterator[None]:
        """Add to an exception that leaves the block the state of containers and the ends of their logs.

        Args:
            names: Of the containers; none: all of the project.
        """
        try:
            yield
        except BaseException as error:
            reports = [self._report(name) for name in names or self.of_project(also_stopped=True)]
            error.add_note("\n".join(reports) or "no container of the project was created")
            raise

    def _report(self, name: str) -> str:
        """Return what a container does and the end of its log, bounded in size.

        A replica logs no check that it has passed, so these lines cover a minute at least.
        """
        state = self.run("inspect", "--format", "{{json .State}}", name, check=False).strip()
        log = subprocess.run(
            [self.engine, "logs", "--timestamps", "--tail", str(_REPORT_LINES), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        return "\n".join(line[:_REPORT_COLUMNS] for line in [f"===== {name}: {state}", *log.splitlines()])

    @contextmanager
    def up(self, num_replicas: int, environment: dict[str, str]) -> Iterator[None]:
        """Run the compose file's containers with this number of replicas; remove all of them after the block."""
        command = [*self.compose, "-p", PROJECT, "-f", str(ROOT / "docker-compose.yml")]
        try:
            with self.explaining():
                _output([*command, "up", "-d", "--scale", f"app={num_replicas}"], environment)
                yield
        finally:
            for container in self.of_project():
                self.run("kill", container, check=False)
            _output([*command, "down", "-v"], environment, check=False)
            # podman-compose forgets how many containers it started, and one on which others depend is removed only
            # after them: hence several passes.
            for _ in range(3):
                for container in self.of_project(also_stopped=True):
                    self._remove(container)
            for network in ("front", "back"):
                self.run("network", "rm", f"{PROJECT}_{network}", check=False)
            self.run("volume", "rm", f"{PROJECT}_redis", check=False)

    def of_project(self, service: str | None = None, *, also_stopped: bool = False) -> list[str]:
        """Return the names of the compose file's containers that run; on request also of those that have stopped."""
        found: set[str] = set()
        for label in _PROJECT_LABELS:
            options = ["--filter", f"label={label}={PROJECT}", "--format", "{{.Names}}"]
            found |= set(self.run("ps", *(["-a"] if also_stopped else []), *options).split())
        return sorted(name for name in found if service is None or service in name.removeprefix(PROJECT))


def find_containers() -> Containers:
    """Return the engine of this machine. Skip the test if there is none; fail it where CI is set."""
    if _succeeds("docker", "info") and _succeeds("docker", "compose", "version"):
        return Containers("docker", ("docker", "compose"))
    if _succeeds("podman", "info") and shutil.which("podman-compose"):
        # Docker's image format: podman's own has no HEALTHCHECK.
        return Containers("podman", ("podman-compose",), ("--network", "host", "--format", "docker"))
    missing = "neither docker with compose nor podman with podman-compose is usable here"
    return (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


def _succeeds(*words: str) -> bool:
    if shutil.which(words[0]) is None:
        return False
    return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


def _output(command: Sequence[str], environment: dict[str, str] | None = None, *, check: bool = True) -> str:
    result = subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(command)}: {result.stdout[-3000:]}{result.stderr[-3000:]}")
    return result.stdout

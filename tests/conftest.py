"""Fixtures for every test: a leak check, a small model in a store, and a Redis server."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny
from tests.harness.redis_process import redis_process
from tests.harness.redis_topologies import redis_cluster

# Hundreds of processes that tests start load the same modules: they are compiled once, also where the environment says
# that nothing is stored (a fifth of a server's start).
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes, and how long it takes to draw it, is a question of what else the machine does.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

# The networks of the tests are small: a second thread gains little with them, and while it waits it occupies a core
# that the servers of other tests need. Tests of several threads set their own number.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of workers of `-n auto`."""
    from tests.harness.workers import num_workers  # not at the top: it needs pytest-xdist

    return num_workers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests among workers, if there are any."""
    from tests.harness.workers import FileScheduling  # not at the top: it needs pytest-xdist

    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store that holds `tiny@1`. Tests must not change it."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store)
    return store


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis server that tests share; each test uses a key prefix of its own."""
    with redis_process(tmp_path_factory.mktemp("redis")) as process:
        yield process.url


@pytest.fixture(scope="session")
def redis_cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis Cluster of three masters that tests share; each test uses a key prefix of its own."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster.url


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread or an open file, and restore the number of torch threads."""
    threads, files, torch_threads = set(threading.enumerate()), _open_files(), torch.get_num_threads()
    yield
    torch.set_num_threads(torch_threads)
    deadline = time.monotonic() + 30  # of a machine that stalls; a test that leaves nothing waits for nothing
    while True:
        left_threads = [thread for thread in threading.enumerate() if thread not in threads]
        left_files = {fd: target for fd, target in _open_files().items() if files.get(fd) != target}
        if not left_threads and not left_files:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"not closed: threads {left_threads}, files {left_files}")
        gc.collect()
        time.sleep(0.01)


def _open_files() -> dict[str, str]:
    found = {}
    try:
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue  # the descriptor that this listing used
    except FileNotFoundError:
        return {}  # not Linux
    # matplotlib never closes the fonts that it has used.
    return {
        fd: target for fd, target in found.items() if not target.startswith("/proc/") and not target.endswith(".ttf")
    }

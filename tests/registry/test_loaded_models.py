"""Which versions are in memory: loaded one at a time, shared between clients, and evicted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from service.engine.engine import Engine
from service.engine.request import Request
from service.errors import GruServeError, InvalidArtifact, Overloaded
from service.model.artifact import Artifact
from service.registry.loaded_models import LoadedModels
from service.shares import work_for
from service.store.model_store import _INDEX, ModelStore, ModelVersion
from tests.harness.models import engine_settings, publish_tiny
from tests.harness.wait import wait_until

NUM_VERSIONS = 12
PROMPT = np.zeros(1, np.int64)


class SlowStore(ModelStore):
    """A store whose loads can be held up, and which counts them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.allowed = threading.Event()
        self.allowed.set()
        self.num_loads = self.num_loading = self.most_loading = 0
        self._lock = threading.Lock()

    def load(self, ref: str) -> tuple[ModelVersion, Artifact]:
        with self._lock:
            self.num_loads += 1
            self.num_loading += 1
            self.most_loading = max(self.most_loading, self.num_loading)
        try:
            assert self.allowed.wait(60)
            return super().load(ref)
        finally:
            with self._lock:
                self.num_loading -= 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for seed in range(NUM_VERSIONS):
        publish_tiny(ModelStore(root), seed=seed)
    return root


@pytest.fixture
def store(root: Path) -> Iterator[SlowStore]:
    store = SlowStore(root)
    yield store
    store.allowed.set()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """All engines that are made, in their order."""
    made: list[Engine] = []

    class Noted(Engine):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr("service.registry.loaded_models.Engine", Noted)
    return made


def refs(*numbers: int) -> list[str]:
    return [f"tiny@{number}" for number in numbers]


def outcome(models: LoadedModels, ref: str, client: str = "") -> str:
    """Return the code of the error that getting a model raises, or its name."""
    work_for(client)
    try:
        return models.get(ref).version.ref
    except GruServeError as error:
        return error.code
    finally:
        work_for("")


def test_loaded_models__loads_and_evictions_at_the_same_time_leave_no_engine_behind(store: SlowStore) -> None:
    """Two threads that load one version, with an eviction between, once left an engine whose thread never ended."""
    num_threads, before = 8, set(threading.enumerate())
    with closing(LoadedModels(store, 1, engine_settings())) as models:

        def use(seed: int) -> None:
            chance = np.random.default_rng(seed)
            for _ in range(25):
                with suppress(Overloaded):  # the evicted model is still in use
                    model = models.get(f"tiny@{chance.integers(1, 4)}")
                    model.engine.submit([Request(PROMPT, 3, 0)])[0].wait()

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(use, range(num_threads)))
        assert len(models.all()) == 1
        wait_until(lambda: [thread.name for thread in threading.enumerate() if thread not in before] == ["engine"])


def test_loaded_models__many_requests_for_one_version_load_it_once(store: SlowStore) -> None:
    store.allowed.clear()
    with closing(LoadedModels(store, 2, engine_settings())) as models, ThreadPoolExecutor(20) as pool:
        wanted = [pool.submit(outcome, models, "tiny@1", f"client{number}") for number in range(20)]
        wait_until(lambda: store.num_loading == 1)
        store.allowed.set()
        assert {future.result() for future in wanted} == {"tiny@1"}
        assert store.num_loads == 1


def test_loaded_models__a_client_has_few_versions_in_the_queue(store: SlowStore) -> None:
    store.allowed.clear()
    with closing(LoadedModels(store, 20, engine_settings())) as models, ThreadPoolExecutor(20) as pool:
        wanted = [pool.submit(outcome, models, ref, "greedy") for ref in refs(*range(1, 9))]
        wait_until(lambda: models.num_waiting == 8)
        assert outcome(models, "tiny@9", "greedy") == "overloaded"
        wanted.append(pool.submit(outcome, models, "tiny@9", "other"))  # has a place all the same
        wait_until(lambda: models.num_waiting == 9)
        wanted.append(pool.submit(outcome, models, "tiny@9", "greedy"))  # waits for what is loaded anyway
        store.allowed.set()
        assert [future.result() for future in wanted] == refs(*range(1, 10), 9)
        assert (store.most_loading, models.num_waiting) == (1, 0)


def test_loaded_models__a_damaged_version_is_read_once_for_all_that_wait(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    publish_tiny(store)
    (store.resolve("tiny").path / "model.safetensors").write_bytes(b"")
    store.allowed.clear()
    errors: list[GruServeError] = []

    def get(models: LoadedModels) -> None:
        with pytest.raises(InvalidArtifact) as caught:
            models.get("tiny@1")
        errors.append(caught.value)

    with closing(LoadedModels(store, 1, engine_settings())) as models, ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(get, models) for _ in range(5)]
        wait_until(lambda: models.num_waiting == 5)
        store.allowed.set()
        for future in waiting:
            future.result()
        assert store.num_loads == 1
        assert len(set(map(id, errors))) == 5
        assert len({error.message for error in errors}) == 1


def test_loaded_models__evicted_models_in_use_are_limited(store: SlowStore, engines: list[Engine]) -> None:
    with closing(LoadedModels(store, 2, engine_settings())) as models:
        handles = [models.get(ref).engine.submit([Request(PROMPT, 10**7, 0)])[0] for ref in refs(1, 2, 3, 4)]
        assert outcome(models, "tiny@5") == "overloaded"
        assert [model.version.ref for model in models.all()] == refs(3, 4)
        assert outcome(models, "tiny@3") == "tiny@3"
        with pytest.raises(Overloaded):
            models.for_state("tiny@1", "another identity")
        handles[0].cancel()
        wait_until(lambda: engines[0].num_open == 0)
        assert outcome(models, "tiny@5") == "tiny@5"
        for handle in handles:
            handle.cancel()


def test_loaded_models__a_refresh_is_not_refused_while_models_are_in_use(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "other")
    with closing(LoadedModels(store, 1, engine_settings())) as models:
        handles = [models.get(name).engine.submit([Request(PROMPT, 10**7, 0)])[0] for name in ("tiny", "other")]
        publish_tiny(store, seed=1)
        assert {(one.model, one.code) for one in models.resolver.refresh()} == {("tiny@2", None), ("other@1", None)}
        for handle in handles:
            handle.cancel()


def test_get__waits_for_its_turn_for_a_limited_time(store: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.registry.loaded_models._PENDING_WAIT_S", 0.05)
    store.allowed.clear()
    with closing(LoadedModels(store, 2, engine_settings())) as models, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(outcome, models, "tiny@1")
        wait_until(lambda: store.num_loading == 1)
        began = time.monotonic()
        assert outcome(models, "tiny@2") == "overloaded"
        assert time.monotonic() - began < 10
        store.allowed.set()
        assert loading.result() == "tiny@1"


def test_resolve__on_a_file_system_that_hangs_takes_few_threads(tmp_path: Path) -> None:
    """As a network's does while its server is silent. Here a named pipe into which nobody writes."""
    store = ModelStore(tmp_path)
    publish_tiny(store)
    with closing(LoadedModels(store, 2, engine_settings())) as models, ThreadPoolExecutor(40) as pool:
        model = models.get("tiny")
        index = tmp_path / "tiny" / _INDEX
        content = index.read_bytes()
        index.unlink()
        os.mkfifo(index)
        try:
            requests = [pool.submit(models.resolve, "tiny@an-alias") for _ in range(40)]
            wait_until(lambda: sum(request.done() for request in requests) == 32, 20)
            assert all(isinstance(request.exception(), Overloaded) for request in requests if request.done())
            assert models.get("tiny") is model  # what is in memory needs no file
        finally:
            writers = [os.open(index, os.O_WRONLY)]
            index.unlink()
            index.write_bytes(content)
            os.write(writers[0], content)
            os.close(writers[0])
        with suppress(GruServeError):
            models.resolve("tiny@an-alias")

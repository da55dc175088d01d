"""Which version a name stands for while the server runs, and when it switches to another."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog.testing

from service.errors import InvalidArtifact, ModelNotFound, Overloaded
from service.periodic import PeriodicThread
from service.registry.loaded_models import LoadedModels
from service.registry.version_resolver import Resolution, VersionResolver
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings, publish_tiny
from tests.harness.wait import wait_until


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    return store


@pytest.fixture
def models(store: ModelStore) -> Iterator[LoadedModels]:
    models = LoadedModels(store, 4, engine_settings())
    models.get("tiny")
    yield models
    models.close()


def damage(store: ModelStore, ref: str) -> None:
    (store.resolve(ref).path / "model.safetensors").write_bytes(b"")


def test_loaded_models__a_name_keeps_its_version_until_a_refresh(store: ModelStore, models: LoadedModels) -> None:
    store.set_alias("tiny", "stable", 1)
    assert models.get("tiny@stable").version.ref == "tiny@1"
    publish_tiny(store, seed=1)
    store.set_alias("tiny", "stable", 2)
    names = ("tiny", "tiny@latest", "tiny@stable")
    assert {models.get(name).version.ref for name in names} == {"tiny@1"}
    assert models.get("tiny@2").version.ref == "tiny@2"
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@2"), Resolution("tiny@stable", "tiny@2")]
    assert {models.get(name).version.ref for name in names} == {"tiny@2"}
    store.set_alias("tiny", "stable", 1)  # back again
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@2"), Resolution("tiny@stable", "tiny@1")]
    assert models.resolver.num_switched == 3


def test_refresh__a_damaged_version_leaves_the_previous_one_in_use(store: ModelStore, models: LoadedModels) -> None:
    publish_tiny(store, seed=1)
    damage(store, "tiny@2")
    broken = Resolution("tiny", "tiny@1", "tiny@2", "invalid_artifact")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            assert models.resolver.refresh() == [broken]
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "a new version can't be served: the previous one stays in use"
    ]
    assert models.resolver.resolutions() == [broken]
    assert models.get("tiny").version.ref == "tiny@1"
    with pytest.raises(InvalidArtifact):
        models.get("tiny@2")
    publish_tiny(store, seed=2)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@3")] == models.resolver.resolutions()


def test_refresh__tries_a_damaged_version_again_only_on_request(store: ModelStore, models: LoadedModels) -> None:
    publish_tiny(store, seed=1)
    weights = (store.resolve("tiny@2").path / "model.safetensors").read_bytes()
    damage(store, "tiny@2")
    for retry_failed, num_failed in ((False, 1), (False, 1), (True, 2), (False, 2)):
        models.resolver.refresh(retry_failed)
        assert models.resolver.num_failed == num_failed
    (store.resolve("tiny@2").path / "model.safetensors").write_bytes(weights)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@2")]


def test_poll__tries_a_version_again_while_its_files_arrive(store: ModelStore, models: LoadedModels) -> None:
    """As rsync and cp copy it: a folder, then one file after the other, each in parts."""
    publish_tiny(store, seed=1)
    version = store.resolve("tiny@2")
    files = {path.name: path.read_bytes() for path in sorted(version.path.iterdir())}
    shutil.rmtree(version.path)
    version.path.mkdir()
    models.resolver.poll()
    num_failed = models.resolver.num_failed
    assert num_failed == 1
    models.resolver.poll()
    assert models.resolver.num_failed == num_failed, "nothing has changed"
    for name, content in files.items():
        for end in (len(content) // 2, len(content)):
            assert models.get("tiny").version.ref == "tiny@1"
            (version.path / name).write_bytes(content[:end])
            models.resolver.poll()
    assert models.get("tiny").version.ref == "tiny@2"
    assert models.resolver.resolutions() == [Resolution("tiny", "tiny@2")]


@pytest.mark.parametrize("error", [MemoryError(), OSError("a disk"), ValueError("a kernel")])
def test_refresh__any_error_leaves_the_previous_version_in_use(
    store: ModelStore, models: LoadedModels, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: str) -> None:
        raise error

    publish_tiny(store, seed=1)
    monkeypatch.setattr(store, "load", fail)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1", "tiny@2", "internal_error")]
    assert models.get("tiny").version.ref == "tiny@1"


def test_refresh__a_version_deleted_from_the_store_is_served_from_memory(
    store: ModelStore, models: LoadedModels
) -> None:
    store.root.rename(store.root.with_name("elsewhere"))
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1", None, "model_not_found")]
    assert models.get("tiny").version.ref == "tiny@1"
    with pytest.raises(ModelNotFound):
        models.get("tiny@1")  # a full name is looked up in the store
    with pytest.raises(ModelNotFound):
        models.get("other")
    store.root.with_name("elsewhere").rename(store.root)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1")]


def test_loaded_models__a_name_whose_version_was_evicted_and_deleted_is_resolved_again(store: ModelStore) -> None:
    models = LoadedModels(store, 1, engine_settings())
    models.get("tiny")
    publish_tiny(store, "other")
    publish_tiny(store, seed=1)
    models.get("other")  # evicts tiny@1
    assert models.get("tiny").version.ref == "tiny@1"  # loads it again
    models.get("other")
    store.delete("tiny@1")
    assert models.get("tiny").version.ref == "tiny@2"
    assert models.resolver.resolutions() == [Resolution("other", "other@1"), Resolution("tiny", "tiny@2")]
    models.close()


def test_refresh__requests_use_the_previous_version_while_a_new_one_loads(
    store: ModelStore, models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(store, seed=1)
    load, loading, release = store.load, threading.Event(), threading.Event()

    def slow(ref: str) -> object:
        loading.set()
        assert release.wait(30)
        return load(ref)

    monkeypatch.setattr(store, "load", slow)
    thread = threading.Thread(target=models.resolver.refresh)
    thread.start()
    assert loading.wait(30)
    assert models.get("tiny").version.ref == "tiny@1"
    assert models.resolve("tiny").ref == "tiny@1"
    with pytest.raises(Overloaded):
        models.resolver.refresh()  # only one thread refreshes at a time
    release.set()
    thread.join()
    assert models.get("tiny").version.ref == "tiny@2"


def test_replace__a_slow_load_of_an_old_version_does_not_undo_a_switch(store: ModelStore) -> None:
    resolver = VersionResolver(store, lambda _: None)
    old = store.resolve("tiny")
    publish_tiny(store, seed=1)
    new = store.resolve("tiny")
    resolver.replace("tiny", None, new)
    resolver.replace("tiny", None, old)  # this thread, too, found no version remembered when it began
    assert resolver.get("tiny") == new
    resolver.replace("tiny@1", None, old)
    assert resolver.get("tiny@1") is None  # a full name stands for itself and is not remembered


def test_poll__switches_to_new_versions_and_passes_over_a_damaged_one(store: ModelStore, models: LoadedModels) -> None:
    with closing(PeriodicThread("polling", 0.01, models.resolver.poll)):
        publish_tiny(store, seed=1)
        wait_until(lambda: models.get("tiny").version.ref == "tiny@2")
        broken = store.root / "broken"
        shutil.copytree(store.root / "tiny" / "2", broken)
        (broken / "model.safetensors").write_bytes(b"")
        broken.rename(store.root / "tiny" / "3")
        wait_until(lambda: models.resolver.resolutions()[0].code is not None)
        publish_tiny(store, seed=3)
        wait_until(lambda: models.get("tiny").version.ref == "tiny@4")


def test_load__logs_a_changed_card_and_serves(
    store: ModelStore, models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(store, seed=1)
    (store.resolve("tiny@2").path / "README.md").write_text("# my notes")
    monkeypatch.setattr(structlog, "is_configured", lambda: True)  # as in a server
    with structlog.testing.capture_logs() as logs:
        models.get("tiny@2")
    assert [(line["log_level"], line["model"]) for line in logs] == [("warning", "tiny@2")]

"""Which version a name means while the server runs."""

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
from tests.conftest import engine_settings, publish_tiny
from tests.serving import wait_until


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


def test_a_name_keeps_its_meaning_until_it_is_looked_up_again(store: ModelStore, models: LoadedModels) -> None:
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


def test_a_broken_version_leaves_the_old_one_serving(store: ModelStore, models: LoadedModels) -> None:
    publish_tiny(store, seed=1)
    damage(store, "tiny@2")
    broken = Resolution("tiny", "tiny@1", "tiny@2", "invalid_artifact")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            assert models.resolver.refresh() == [broken]
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "a new version can't be served: the old one goes on"
    ]
    assert models.resolver.resolutions() == [broken]
    assert models.get("tiny").version.ref == "tiny@1"
    with pytest.raises(InvalidArtifact):
        models.get("tiny@2")
    publish_tiny(store, seed=2)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@3")] == models.resolver.resolutions()


def test_polling_tries_a_broken_version_once_and_a_reload_every_time(store: ModelStore, models: LoadedModels) -> None:
    publish_tiny(store, seed=1)
    weights = (store.resolve("tiny@2").path / "model.safetensors").read_bytes()
    damage(store, "tiny@2")
    for again, num_failed in ((False, 1), (False, 1), (True, 2), (False, 2)):
        models.resolver.refresh(again)
        assert models.resolver.num_failed == num_failed
    (store.resolve("tiny@2").path / "model.safetensors").write_bytes(weights)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@2")]


@pytest.mark.parametrize("error", [MemoryError(), OSError("a disk"), ValueError("a kernel")])
def test_whatever_goes_wrong_the_old_version_stays(
    store: ModelStore, models: LoadedModels, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: str) -> None:
        raise error

    publish_tiny(store, seed=1)
    monkeypatch.setattr(store, "load", fail)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1", "tiny@2", "internal_error")]
    assert models.get("tiny").version.ref == "tiny@1"


def test_what_is_gone_from_the_store_is_served_from_memory(store: ModelStore, models: LoadedModels) -> None:
    store.root.rename(store.root.with_name("elsewhere"))
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1", None, "model_not_found")]
    assert models.get("tiny").version.ref == "tiny@1"
    with pytest.raises(ModelNotFound):
        models.get("tiny@1")  # by its full name it is what the store has
    with pytest.raises(ModelNotFound):
        models.get("other")
    store.root.with_name("elsewhere").rename(store.root)
    assert models.resolver.refresh() == [Resolution("tiny", "tiny@1")]


def test_a_served_version_that_was_let_go_of_and_is_gone_gives_way_to_what_is_there(store: ModelStore) -> None:
    models = LoadedModels(store, 1, engine_settings())
    models.get("tiny")
    publish_tiny(store, "other")
    publish_tiny(store, seed=1)
    models.get("other")  # tiny@1 goes
    assert models.get("tiny").version.ref == "tiny@1"  # and is loaded again
    models.get("other")
    store.delete("tiny@1")
    assert models.get("tiny").version.ref == "tiny@2"
    assert models.resolver.resolutions() == [Resolution("other", "other@1"), Resolution("tiny", "tiny@2")]
    models.close()


def test_nobody_waits_while_a_new_version_is_loaded(
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
        models.resolver.refresh()  # one at a time
    release.set()
    thread.join()
    assert models.get("tiny").version.ref == "tiny@2"


def test_a_late_load_of_an_old_version_does_not_undo_a_newer_one(store: ModelStore) -> None:
    served = VersionResolver(store, lambda _: None)
    old = store.resolve("tiny")
    publish_tiny(store, seed=1)
    new = store.resolve("tiny")
    served.replace("tiny", None, new)
    served.replace("tiny", None, old)  # who comes late saw no meaning either
    assert served.get("tiny") == new
    served.replace("tiny@1", None, old)
    assert served.get("tiny@1") is None  # a full name means itself


def test_polling_finds_new_versions_and_ends(store: ModelStore, models: LoadedModels) -> None:
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

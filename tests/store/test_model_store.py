"""The model store: names resolve, and versions appear whole or not at all and never change."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidArtifact, InvalidValue, ModelNotFound, StoreError
from service.model.artifact import write_artifact
from service.model.manifest import MANIFEST
from service.store.model_store import ModelStore, ModelVersion
from tests.harness.models import publish_tiny, random_tensors, tiny_config


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def test_resolve__an_absent_store_has_no_models(store: ModelStore) -> None:
    assert store.names() == []
    with pytest.raises(ModelNotFound, match="it has: none"):
        store.resolve("any")


def test_publish__numbers_the_versions_of_a_name_from_one(store: ModelStore) -> None:
    assert [publish_tiny(store), publish_tiny(store), publish_tiny(store, "other")] == ["tiny@1", "tiny@2", "other@1"]
    assert store.names() == ["other", "tiny"]
    assert [version.ref for version in store.versions("tiny")] == ["tiny@1", "tiny@2"]


def test_resolve__finds_names_numbers_latest_and_aliases(store: ModelStore) -> None:
    for _ in range(3):
        publish_tiny(store)
    store.set_alias("tiny", "stable", 2)
    found = {ref: store.resolve(ref).number for ref in ("tiny", "tiny@latest", "tiny@1", "tiny@3", "tiny@stable")}
    assert found == {"tiny": 3, "tiny@latest": 3, "tiny@1": 1, "tiny@3": 3, "tiny@stable": 2}
    store.set_alias("tiny", "stable", 3)
    assert store.resolve("tiny@stable").number == 3
    store.remove_alias("tiny", "stable")
    with pytest.raises(ModelNotFound, match="no version or alias 'stable'"):
        store.resolve("tiny@stable")


@pytest.mark.parametrize(
    "ref",
    ["", "@", "@1", "tiny@", "tiny@0", "tiny@9", "tiny@01", "tiny@-1", "tiny@1@1", "no", "../tiny", "tiny/1", ".", "..",
     "tiny@..", "tiny\x00", "tiny@" + "9" * 5000, "x" * 5000, "tiny@1\n", "\ud800"],
)  # fmt: skip
def test_resolve__refuses_every_other_name_in_a_short_message(store: ModelStore, ref: str) -> None:
    publish_tiny(store)
    with pytest.raises(ModelNotFound) as caught:
        store.resolve(ref)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65, "ä", "a b", "a@1"])
def test_publish__refuses_impossible_names(store: ModelStore, name: str) -> None:
    with pytest.raises(InvalidValue):
        publish_tiny(store, name)


@pytest.mark.parametrize("alias", ["latest", "3", "", "a/b", "../x", "x" * 65])
def test_set_alias__refuses_impossible_aliases(store: ModelStore, alias: str) -> None:
    publish_tiny(store)
    with pytest.raises(InvalidValue):
        store.set_alias("tiny", alias, 1)


def test_set_alias__needs_an_existing_version(store: ModelStore) -> None:
    publish_tiny(store)
    with pytest.raises(ModelNotFound):
        store.set_alias("tiny", "stable", 2)
    with pytest.raises(ModelNotFound):
        store.remove_alias("tiny", "stable")


def test_publish__never_uses_a_number_twice(store: ModelStore) -> None:
    publish_tiny(store)
    publish_tiny(store)
    store.delete("tiny@2")
    assert [version.number for version in store.versions("tiny")] == [1]
    assert publish_tiny(store) == "tiny@3"
    store.delete("tiny@3")
    store.delete("tiny@1")
    assert store.names() == []
    assert publish_tiny(store) == "tiny@4"


def test_delete__needs_the_number_and_no_alias(store: ModelStore) -> None:
    publish_tiny(store)
    store.set_alias("tiny", "stable", 1)
    for ref in ("tiny", "tiny@latest", "tiny@stable"):
        with pytest.raises(StoreError, match="by its number"):
            store.delete(ref)
    with pytest.raises(StoreError, match="tiny@stable"):
        store.delete("tiny@1")
    store.resolve("tiny@1")


def test_publish__refuses_a_version_that_would_not_load(store: ModelStore) -> None:
    def write(directory: Path) -> None:
        write_artifact(directory, tiny_config(), random_tensors(tiny_config()), {}, {})
        (directory / "config.json").write_text("{}")

    with pytest.raises(InvalidArtifact):
        store.publish("tiny", write)
    assert store.names() == []
    assert not (store.root / "tiny").exists()


def test_publish__a_failing_writer_leaves_no_trace(store: ModelStore) -> None:
    publish_tiny(store)

    def write(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        store.publish("tiny", write)
    assert sorted(path.name for path in (store.root / "tiny").iterdir()) == [".lock", "1", "store.json"]


def test_verify__finds_damage_that_listing_does_not_see(store: ModelStore) -> None:
    publish_tiny(store)
    weights = store.resolve("tiny").path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [version.number for version in store.versions("tiny")] == [1]
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        store.verify("tiny")


def test_index__a_damaged_one_is_an_error_and_is_not_replaced(store: ModelStore) -> None:
    publish_tiny(store)
    (store.root / "tiny" / "store.json").write_text("{")
    with pytest.raises(StoreError, match=r"store\.json"):
        store.resolve("tiny@stable")
    with pytest.raises(StoreError, match=r"store\.json"):
        publish_tiny(store)
    assert store.resolve("tiny@1").number == 1


def test_publish__concurrent_threads_get_different_numbers(store: ModelStore) -> None:
    refs: list[str] = []
    threads = [threading.Thread(target=lambda: refs.append(publish_tiny(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refs) == [f"tiny@{number}" for number in range(1, 9)]


def test_publish__concurrent_processes_get_different_numbers(store: ModelStore) -> None:
    publish = "print(c.publish_tiny(c.ModelStore(pathlib.Path(sys.argv[1]))))"
    code = f"import sys, pathlib, tests.harness.models as c\nfor _ in range(6): {publish}"
    command = [sys.executable, "-c", code, str(store.root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    refs = [ref for process in processes for ref in process.communicate()[0].split()]
    assert sorted(int(ref.removeprefix("tiny@")) for ref in refs) == list(range(1, 13))


def test_publish__concurrent_readers_see_whole_versions_only(store: ModelStore) -> None:
    def write() -> None:
        for _ in range(15):
            publish_tiny(store)

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while writer.is_alive():
        for version in store.versions("tiny")[seen:]:
            store.verify(version.ref)
            seen = version.number
    writer.join()
    assert seen, "no version was read while others were written"
    assert len(store.versions("tiny")) == 15


def test_publish__killed_at_100_random_moments_leaves_whole_versions_only(store: ModelStore) -> None:
    config = tiny_config(num_units=64)
    helper = subprocess.Popen(
        [sys.executable, "-m", "tests.store.publish_forever", str(store.root), json.dumps(config.model_dump())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    chance = random.Random(5)
    interrupted = 0
    with helper:
        assert helper.stdin
        assert helper.stdout
        for _ in range(100):
            helper.stdin.write("go\n")
            publisher = int(helper.stdout.readline())
            time.sleep(chance.uniform(0, 0.05))
            os.kill(publisher, signal.SIGKILL)
            directory = store.root / "m"
            interrupted += directory.exists() and any(path.name.startswith(".staging") for path in directory.iterdir())
            for version in store.versions("m")[-3:]:
                store.verify(version.ref)
        helper.stdin.close()
    for version in store.versions("m"):
        store.verify(version.ref)
    assert interrupted > 10, "too few processes were killed while they wrote a version for this test to mean anything"
    # The next publisher removes what the killed ones left, and its number is higher than any of theirs.
    number = store.versions("m")[-1].number if store.versions("m") else 0
    assert int(publish_tiny(store, "m").removeprefix("m@")) > number
    assert not [path for path in (store.root / "m").iterdir() if path.name.startswith((".staging", ".trash"))]


def test_load__refuses_a_directory_without_manifest(store: ModelStore) -> None:
    (store.root / "m" / "1").mkdir(parents=True)
    with pytest.raises(InvalidArtifact, match=MANIFEST):
        store.load("m")


def test_names__ignore_everything_that_is_not_a_version(store: ModelStore) -> None:
    publish_tiny(store)
    (store.root / "README.md").write_text("hello")
    (store.root / "tiny" / "notes").mkdir()
    (store.root / "tiny" / "01").mkdir()
    (store.root / "empty").mkdir()
    assert store.names() == ["tiny"]
    assert [version.number for version in store.versions("tiny")] == [1]


def test_reading__writes_nothing(store: ModelStore) -> None:
    publish_tiny(store)
    store.set_alias("tiny", "stable", 1)

    def modification_times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in [store.root, *store.root.rglob("*")]}

    before = modification_times()
    store.load("tiny@stable")
    store.describe(store.resolve("tiny"))
    store.verify("tiny@1")
    assert store.names() == ["tiny"]
    assert modification_times() == before


def test_delete__of_two_concurrent_calls_the_second_finds_no_version(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(store)
    resolve, calls = store.resolve, []

    def resolve_while_another_deletes(ref: str) -> ModelVersion:
        version = resolve(ref)
        calls.append(ref)
        if len(calls) == 1:
            ModelStore(store.root).delete(ref)
        return version

    monkeypatch.setattr(store, "resolve", resolve_while_another_deletes)
    with pytest.raises(ModelNotFound):
        store.delete("tiny@1")
    publish_tiny(ModelStore(store.root))
    calls.clear()
    with pytest.raises(ModelNotFound):
        store.set_alias("tiny", "stable", 2)
    assert store.aliases("tiny") == {}


def test_describe__a_version_deleted_meanwhile_is_not_found(store: ModelStore) -> None:
    def publish_and_delete() -> None:
        for _ in range(20):
            store.delete(publish_tiny(store))

    writer = threading.Thread(target=publish_and_delete)
    writer.start()
    seen = 0
    while writer.is_alive():
        for version in store.versions("tiny"):
            try:
                seen += store.describe(version).version == version
            except ModelNotFound:
                continue
    writer.join()
    assert seen, "no version was described while others were published and deleted"


def test_publish__tolerates_a_staging_directory_that_its_writer_removes_meanwhile(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(store)
    staging = store.root / "tiny" / ".staging-other"
    staging.mkdir()
    flock = fcntl.flock
    removed: list[Path] = []

    def flock_after_removal(file: Any, operation: int) -> None:
        if operation & fcntl.LOCK_NB and not removed:
            removed.append(staging)
            staging.rmdir()
        flock(file, operation)

    monkeypatch.setattr("service.store.staging.fcntl.flock", flock_after_removal)
    assert publish_tiny(store) == "tiny@2"
    assert removed
    assert sorted(path.name for path in (store.root / "tiny").iterdir()) == [".lock", "1", "2", "store.json"]


def test_check_writable__refuses_what_publishing_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        ModelStore(tmp_path / "file").check_writable("tiny")
    ModelStore(tmp_path / "store").check_writable("tiny")
    assert ModelStore(tmp_path / "store").names() == []


def test_publish__that_is_refused_makes_no_store(tmp_path: Path) -> None:
    """An empty store would replace the shipped models."""
    store = ModelStore(tmp_path / "models" / "store")

    def write(directory: Path) -> None:
        (directory / "README.md").write_text("no model")

    for refuse in (store.check_writable, store.publish):
        with pytest.raises(InvalidArtifact):
            refuse("tiny", write)
        assert list(tmp_path.iterdir()) == []
    store.check_writable("tiny")
    assert (store.root / "tiny").is_dir()
    with pytest.raises(InvalidArtifact):
        store.publish("tiny", write)
    assert publish_tiny(store) == "tiny@1"
    with pytest.raises(InvalidArtifact):
        store.publish("tiny", write)
    assert store.names() == ["tiny"]


@pytest.mark.parametrize(
    "facts", [{"losses": [1]}, {"losses": {"validation_nats_per_char": "x"}}, {"corpus": [1]}, {"published_at": -1}]
)
def test_publish__refuses_training_facts_that_readers_could_not_read(
    store: ModelStore, facts: dict[str, object]
) -> None:
    config = tiny_config()
    with pytest.raises(InvalidArtifact, match=r"training\.json"):
        store.publish("tiny", lambda d: write_artifact(d, config, random_tensors(config), facts, {}))

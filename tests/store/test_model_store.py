"""The model store: names resolve, versions appear whole or not at all, and never change."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from service.errors import InvalidArtifact, InvalidValue, ModelNotFound, StoreError
from service.model.artifact import write_artifact
from service.model.manifest import MANIFEST
from service.store.model_store import ModelStore, ModelVersion
from tests.conftest import publish_tiny, random_tensors, tiny_config


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def test_an_empty_or_absent_store_has_no_models(store: ModelStore) -> None:
    assert store.names() == []
    with pytest.raises(ModelNotFound, match="there are: none"):
        store.resolve("any")


def test_versions_are_numbered_from_one(store: ModelStore) -> None:
    assert [publish_tiny(store), publish_tiny(store), publish_tiny(store, "other")] == ["tiny@1", "tiny@2", "other@1"]
    assert store.names() == ["other", "tiny"]
    assert [version.ref for version in store.versions("tiny")] == ["tiny@1", "tiny@2"]


def test_names_numbers_latest_and_aliases_resolve(store: ModelStore) -> None:
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
def test_what_is_not_there_is_not_found(store: ModelStore, ref: str) -> None:
    publish_tiny(store)
    with pytest.raises(ModelNotFound) as caught:
        store.resolve(ref)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65, "ä", "a b", "a@1"])
def test_impossible_names_are_refused(store: ModelStore, name: str) -> None:
    with pytest.raises(InvalidValue):
        publish_tiny(store, name)


@pytest.mark.parametrize("alias", ["latest", "3", "", "a/b", "../x", "x" * 65])
def test_impossible_aliases_are_refused(store: ModelStore, alias: str) -> None:
    publish_tiny(store)
    with pytest.raises(InvalidValue):
        store.set_alias("tiny", alias, 1)


def test_an_alias_needs_a_version_that_is_there(store: ModelStore) -> None:
    publish_tiny(store)
    with pytest.raises(ModelNotFound):
        store.set_alias("tiny", "stable", 2)
    with pytest.raises(ModelNotFound):
        store.remove_alias("tiny", "stable")


def test_a_number_is_never_given_out_twice(store: ModelStore) -> None:
    publish_tiny(store)
    publish_tiny(store)
    store.delete("tiny@2")
    assert [version.number for version in store.versions("tiny")] == [1]
    assert publish_tiny(store) == "tiny@3"
    store.delete("tiny@3")
    store.delete("tiny@1")
    assert store.names() == []
    assert publish_tiny(store) == "tiny@4"


def test_deleting_needs_the_number_and_no_alias(store: ModelStore) -> None:
    publish_tiny(store)
    store.set_alias("tiny", "stable", 1)
    for ref in ("tiny", "tiny@latest", "tiny@stable"):
        with pytest.raises(StoreError, match="by its number"):
            store.delete(ref)
    with pytest.raises(StoreError, match="tiny@stable"):
        store.delete("tiny@1")
    store.resolve("tiny@1")


def test_a_version_that_would_not_load_is_not_published(store: ModelStore) -> None:
    def write(directory: Path) -> None:
        write_artifact(directory, tiny_config(), random_tensors(tiny_config()), {}, {})
        (directory / "config.json").write_text("{}")

    with pytest.raises(InvalidArtifact):
        store.publish("tiny", write)
    assert store.names() == []
    assert [path.name for path in (store.root / "tiny").iterdir()] == [".lock"]


def test_a_writer_that_fails_leaves_nothing(store: ModelStore) -> None:
    publish_tiny(store)

    def write(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        store.publish("tiny", write)
    assert sorted(path.name for path in (store.root / "tiny").iterdir()) == [".lock", "1", "store.json"]


def test_verify_finds_damage_that_listing_does_not_read(store: ModelStore) -> None:
    publish_tiny(store)
    weights = store.resolve("tiny").path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [version.number for version in store.versions("tiny")] == [1]
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        store.verify("tiny")


def test_a_damaged_index_is_an_error_and_not_a_reset(store: ModelStore) -> None:
    publish_tiny(store)
    (store.root / "tiny" / "store.json").write_text("{")
    with pytest.raises(StoreError, match=r"store\.json"):
        store.resolve("tiny@stable")
    with pytest.raises(StoreError, match=r"store\.json"):
        publish_tiny(store)
    assert store.resolve("tiny@1").number == 1


def test_concurrent_publishers_get_different_numbers(store: ModelStore) -> None:
    refs: list[str] = []
    threads = [threading.Thread(target=lambda: refs.append(publish_tiny(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(refs) == [f"tiny@{number}" for number in range(1, 9)]


def test_concurrent_processes_get_different_numbers(store: ModelStore) -> None:
    publish = "print(c.publish_tiny(c.ModelStore(pathlib.Path(sys.argv[1]))))"
    code = f"import sys, pathlib, tests.conftest as c\nfor _ in range(4): {publish}"
    command = [sys.executable, "-c", code, str(store.root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    refs = [ref for process in processes for ref in process.communicate()[0].split()]
    assert sorted(int(ref.removeprefix("tiny@")) for ref in refs) == list(range(1, 13))


def test_readers_see_whole_versions_while_writers_write(store: ModelStore) -> None:
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
    assert len(store.versions("tiny")) == 15


def test_kill_9_at_100_random_moments_of_publishing_leaves_whole_versions_only(store: ModelStore) -> None:
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
    assert interrupted > 10, "too few kills fell into the writing of a version for this test to mean anything"
    # The next publisher clears away what the killed ones left, and goes on after every number they used.
    number = store.versions("m")[-1].number if store.versions("m") else 0
    assert int(publish_tiny(store, "m").removeprefix("m@")) > number
    assert not [path for path in (store.root / "m").iterdir() if path.name.startswith((".staging", ".trash"))]


def test_a_directory_without_manifest_is_no_model_that_loads(store: ModelStore) -> None:
    (store.root / "m" / "1").mkdir(parents=True)
    with pytest.raises(InvalidArtifact, match=MANIFEST):
        store.load("m")


def test_other_things_in_the_store_are_ignored(store: ModelStore) -> None:
    publish_tiny(store)
    (store.root / "README.md").write_text("hello")
    (store.root / "tiny" / "notes").mkdir()
    (store.root / "tiny" / "01").mkdir()
    (store.root / "empty").mkdir()
    assert store.names() == ["tiny"]
    assert [version.number for version in store.versions("tiny")] == [1]


def test_reading_writes_nothing(store: ModelStore) -> None:
    publish_tiny(store)
    store.set_alias("tiny", "stable", 1)

    def everything() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in [store.root, *store.root.rglob("*")]}

    before = everything()
    store.load("tiny@stable")
    store.describe(store.resolve("tiny"))
    store.verify("tiny@1")
    assert store.names() == ["tiny"]
    assert everything() == before


def test_of_two_that_delete_one_version_the_second_is_told(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_readers_of_versions_that_come_and_go_see_whole_ones_or_none(store: ModelStore) -> None:
    def come_and_go() -> None:
        for _ in range(40):
            store.delete(publish_tiny(store))

    writer = threading.Thread(target=come_and_go)
    writer.start()
    seen = 0
    while writer.is_alive():
        for version in store.versions("tiny"):
            try:
                seen += store.describe(version).version == version
            except ModelNotFound:
                continue
    writer.join()
    assert seen


def test_an_abandoned_folder_that_vanishes_meanwhile_is_no_error(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(store)
    (store.root / "tiny" / ".staging-gone").mkdir()
    os_open = os.open

    def gone(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".staging-gone"):
            raise FileNotFoundError(path)
        return os_open(path, flags, mode)

    monkeypatch.setattr("service.store.staging.os.open", gone)
    assert publish_tiny(store) == "tiny@2"


def test_a_store_that_can_not_be_written_to_says_so_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        ModelStore(tmp_path / "file").prepare("tiny")
    ModelStore(tmp_path / "store").prepare("tiny")
    assert ModelStore(tmp_path / "store").names() == []


@pytest.mark.parametrize(
    "facts", [{"losses": [1]}, {"losses": {"validation_nats_per_char": "x"}}, {"corpus": [1]}, {"published_at": -1}]
)
def test_facts_that_others_could_not_read_are_not_published(store: ModelStore, facts: dict[str, object]) -> None:
    config = tiny_config()
    with pytest.raises(InvalidArtifact, match=r"training\.json"):
        store.publish("tiny", lambda d: write_artifact(d, config, random_tensors(config), facts, {}))

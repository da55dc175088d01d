"""The files of a model version: what was written is read back, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from service.errors import InvalidArtifact
from service.model.artifact import (
    CARD,
    CHAT,
    CONFIG,
    WEIGHTS,
    TrainingFacts,
    read_artifact,
    read_description,
    write_artifact,
)
from service.model.chat_template import PRESETS
from service.model.manifest import MANIFEST, Manifest
from tests.harness.models import random_tensors, tiny_config


@pytest.fixture
def version(tmp_path: Path) -> Path:
    directory = tmp_path / "1"
    directory.mkdir()
    config = tiny_config()
    chat = PRESETS["play"].to_json().encode()
    write_artifact(
        directory, config, random_tensors(config), {"losses": {}}, {"README.md": b"# card\n", "chat.json": chat}
    )
    return directory


def seal(directory: Path) -> None:
    """Write a manifest that matches the files, as an attacker would."""
    (directory / MANIFEST).unlink(missing_ok=True)
    (directory / MANIFEST).write_text(Manifest.of(directory).to_json())


def assert_damaged(directory: Path, changed: Path) -> None:
    """A version with a changed file is refused. A changed card is a warning, because it decides nothing."""
    if changed.name == CARD:
        assert CARD in "".join(read_artifact(directory).warnings)
    else:
        with pytest.raises(InvalidArtifact):
            read_artifact(directory)


def test_read_artifact__returns_what_was_written(version: Path) -> None:
    artifact, config = read_artifact(version), tiny_config()
    assert artifact.config == config
    assert artifact.training == TrainingFacts()
    for name, tensor in random_tensors(config).items():
        assert np.array_equal(artifact.tensors[name], tensor)
        assert artifact.tensors[name].dtype == np.float32


def test_read_artifact__returns_the_chat_template_and_needs_none(version: Path) -> None:
    assert read_artifact(version).chat == PRESETS["play"]
    assert read_description(version)[3] == PRESETS["play"]
    (version / CHAT).unlink()
    with pytest.raises(InvalidArtifact, match=r"chat\.json is missing"):
        read_artifact(version)
    seal(version)
    assert read_artifact(version).chat is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user": "{name}:\n"}, "user: the text of a turn has {content} once"),
        ({"assistant": "{content}{content}"}, "assistant: the text of a turn has {content} once"),
        ({"system": "{name}: {content}"}, "system: instructions have no speaker"),
        ({"stop": []}, "stop: List should have at least 1 item"),
        ({"stop": ["z" * 257]}, "stop.0: String should have at most 256 characters"),
        ({"stop": ["#"]}, "the model doesn't know '#' (U+0023), which the template writes"),
        ({"names": {"user": "X", "assistant": "ROMEO"}}, "the model doesn't know 'X' (U+0058)"),
        ({"format": 2}, "format: Input should be 1"),
        ({"jinja": "{{ 1 }}"}, "jinja: Extra inputs are not permitted"),
    ],
)
def test_read_artifact__refuses_a_chat_template_that_cant_be_used(
    version: Path, changes: dict[str, object], reason: str
) -> None:
    (version / CHAT).write_text(json.dumps(PRESETS["play"].model_dump() | changes))
    seal(version)
    with pytest.raises(InvalidArtifact, match=re.escape(reason)):
        read_artifact(version)
    with pytest.raises(InvalidArtifact, match=re.escape(reason)):
        read_description(version)


def test_digest__depends_on_config_and_weights_only(version: Path, tmp_path: Path) -> None:
    other = tmp_path / "2"
    other.mkdir()
    config = tiny_config()
    write_artifact(other, config, random_tensors(config), {"other": 1}, {"README.md": b"# other\n"})
    assert read_artifact(other).digest == read_artifact(version).digest
    third = tmp_path / "3"
    third.mkdir()
    write_artifact(third, config, random_tensors(config, seed=1), {"losses": {}}, {})
    assert read_artifact(third).digest != read_artifact(version).digest


def test_read_artifact__refuses_truncated_files(version: Path) -> None:
    for path in sorted(version.iterdir()):
        data = path.read_bytes()
        lengths = {*range(0, len(data), 4096), len(data) - 1, *range(min(64, len(data)))}
        for length in lengths:
            path.write_bytes(data[:length])
            assert_damaged(version, path)
        path.write_bytes(data)
    read_artifact(version)


def test_read_artifact__refuses_2000_random_bit_flips(version: Path) -> None:
    chance, files = random.Random(7), sorted(version.iterdir())
    for number in range(2000):
        path = files[number % len(files)]
        data = path.read_bytes()
        place = chance.randrange(len(data))
        flipped = bytes([data[place] ^ (1 << chance.randrange(8))])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        assert_damaged(version, path)
        path.write_bytes(data)
    read_artifact(version)


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "training.json"])
def test_read_artifact__never_unpickles_a_file_with_a_trusted_name(version: Path, tmp_path: Path, name: str) -> None:
    (version / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    seal(version)
    with pytest.raises(InvalidArtifact, match=name):
        read_artifact(version)
    assert not (tmp_path / "ran").exists()


def change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = random_tensors(tiny_config())
        change(tensors)
        (directory / WEIGHTS).write_bytes(save(tensors))

    return apply


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text()) | changes
        (directory / CONFIG).write_text(json.dumps(config))

    return apply


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (change_tensors(lambda t: t.pop("dense.bias")), "dense.bias is missing"),
    "foreign tensor": (
        change_tensors(lambda t: t.update(extra=np.zeros(1, np.float32))),
        "extra is not part of this model",
    ),
    "other dtype": (change_tensors(lambda t: t.update({"dense.bias": t["dense.bias"].astype(np.float64)})), "F64"),
    "other shape": (change_tensors(lambda t: t.update({"dense.bias": np.zeros(3, np.float32)})), "shape"),
    "transposed": (change_tensors(lambda t: t.update({"dense.weight": t["dense.weight"].T.copy()})), "shape"),
    "not a number": (change_tensors(lambda t: t["dense.bias"].fill(np.nan)), "not finite"),
    "infinite": (change_tensors(lambda t: t["gru.weight_hh_l0"].fill(np.inf)), "not finite"),
    "more units than weights": (change_config(num_units=8192), "shape"),
    "absurd units": (change_config(num_units=10**9), "num_units"),
    "no units": (change_config(num_units=0), "num_units"),
    "units as text": (change_config(num_units="16"), "num_units"),
    "unknown field": (change_config(code="import os"), "code"),
    "other architecture": (change_config(architecture="lstm"), "architecture"),
    "other format": (change_config(format=2), "format"),
    "charset with a double": (change_config(charset="aa"), "twice"),
    "deep JSON": (lambda d: (d / CONFIG).write_text("[" * 100_000), "config.json"),
    "deep facts": (lambda d: (d / "training.json").write_text("[" * 100_000), "training.json"),
    "facts that are a list": (lambda d: (d / "training.json").write_text("[]"), "training.json"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "not a safetensors file"),
    "huge header": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 64), "header"),
    "header no JSON": (lambda d: (d / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{]"), "not JSON"),
    "header a list": (lambda d: (d / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"), "not a JSON object"),
    "entry no object": (lambda d: rewrite_header(d, lambda h: h.update({"dense.bias": 3})), "not an object"),
    "overlapping data": (
        lambda d: rewrite_header(
            d, lambda h: h["dense.weight"].update(data_offsets=[0, 4 * math.prod(h["dense.weight"]["shape"])])
        ),
        "not a safetensors file",
    ),
    "data out of file": (
        lambda d: rewrite_header(d, lambda h: h["dense.bias"].update(data_offsets=[10**12, 10**12 + 4])),
        "not a safetensors file",
    ),
    "trailing data": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"x" * 100), "bytes of weights"),
    "enormous weights": (lambda d: os.truncate(d / WEIGHTS, 10**9), "1000000000 bytes, at most"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_read_artifact__refuses_hostile_files_with_a_reason(version: Path, case: str) -> None:
    spoil, reason = HOSTILE[case]
    spoil(version)
    if case == "enormous weights":
        manifest = json.loads((version / MANIFEST).read_text())
        assert manifest["files"][WEIGHTS]["num_bytes"] < 10**9  # the manifest stays: summing 10**9 zeros takes long
    else:
        seal(version)
    with pytest.raises(InvalidArtifact, match=reason):
        read_artifact(version)


def test_read_artifact__refuses_files_that_the_manifest_lacks(version: Path) -> None:
    (version / "extra.bin").write_bytes(b"")
    with pytest.raises(InvalidArtifact, match=r"extra\.bin is not in the manifest"):
        read_artifact(version)


def test_read_artifact__refuses_a_pipe_without_waiting(version: Path) -> None:
    (version / CONFIG).unlink()
    os.mkfifo(version / CONFIG)
    with pytest.raises(InvalidArtifact, match="not a regular file"):
        read_artifact(version)


def test_read_artifact__names_a_missing_file(version: Path) -> None:
    (version / WEIGHTS).unlink()
    with pytest.raises(InvalidArtifact, match=r"model\.safetensors is missing"):
        read_artifact(version)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", "a/b"])
def test_manifest__reads_no_file_outside_its_directory(version: Path, name: str) -> None:
    manifest = Manifest.read(version)
    entries = manifest.files | {name: manifest.files[CONFIG]}
    lines = "".join(f"{entries[key].sha256} {entries[key].num_bytes} {key}\n" for key in sorted(entries))
    forged = Manifest(files=entries, sha256=hashlib.sha256(lines.encode()).hexdigest())
    (version / MANIFEST).write_text(forged.to_json())
    with pytest.raises(InvalidArtifact, match=f"{re.escape(name)} is missing"):
        Manifest.read(version)
    with pytest.raises(InvalidArtifact, match=re.escape(f"has no file {name!r}")):
        forged.read_file(version, name, 10**6)

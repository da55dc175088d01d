"""TensorFlow checkpoints and SavedModels: what is imported computes what Keras computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.crc32c import crc32c
from service.importing.detection import read_foreign
from service.importing.protobuf import field
from tests.harness.foreign_models import (
    CHARSET,
    UNITS,
    checkpointed,
    imported_log_probs,
    keras_log_probs,
    keras_weights,
    write_bundle,
    write_saved_model,
)

IDS = np.random.default_rng(1).integers(0, len(CHARSET), 40)


def same(path: Path, weights: Any, charset: str | None = CHARSET) -> None:
    np.testing.assert_allclose(imported_log_probs(path, charset)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_checkpoint__is_found_by_every_name_that_means_it(tmp_path: Path, num_layers: int) -> None:
    weights = keras_weights(num_layers)
    prefix = write_bundle(tmp_path / "ckpt_7", checkpointed(weights, [f"rnn{index}" for index in range(num_layers)]))
    for name in ("ckpt_7", "ckpt_7.index", "ckpt_7.data-00000-of-00001"):
        same(tmp_path / name, weights)
    same(tmp_path, weights)
    write_bundle(tmp_path / "ckpt_8", checkpointed(keras_weights(seed=9)))
    with pytest.raises(InvalidModelFile, match="2 checkpoints"):
        read_foreign(tmp_path)
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "/elsewhere/{prefix.name}"\n')
    same(tmp_path, weights)


def test_checkpoint__lists_of_variables_as_keras_exports_them(tmp_path: Path) -> None:
    weights = keras_weights(2)
    arrays = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    named = {f"variables/{index * 2}/.ATTRIBUTES/VARIABLE_VALUE": array for index, array in enumerate(arrays)}
    named |= {f"_all_variables/{9 - index}/.ATTRIBUTES/VARIABLE_VALUE": array for index, array in enumerate(arrays)}
    same(write_bundle(tmp_path / "m", named), weights)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_saved_model__vocabulary_is_read_from_the_graph(tmp_path: Path, first: int, num_layers: int) -> None:
    weights = keras_weights(num_layers, vocab=len(CHARSET) + first)
    path = write_saved_model(tmp_path / "one_step", weights, CHARSET, range(first, first + len(CHARSET)))
    masked = keras_log_probs(weights, IDS + first)[:, first:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path)(IDS), masked, atol=2e-6)


def test_saved_model__words_are_refused(tmp_path: Path) -> None:
    words = ["the", "cat", "sat", "on", "mat"]
    path = write_saved_model(tmp_path / "words", keras_weights(vocab=5), words, range(5))
    with pytest.raises(UnsupportedModel, match="tokens of several characters"):
        imported_log_probs(path)


def test_checkpoint__reset_before_is_refused(tmp_path: Path) -> None:
    arrays = checkpointed(keras_weights())
    arrays["model/gru/cell/bias/.ATTRIBUTES/VARIABLE_VALUE"] = np.zeros(3 * UNITS, np.float32)
    with pytest.raises(UnsupportedModel, match="reset_after=False"):
        read_foreign(write_bundle(tmp_path / "m", arrays))


def test_checkpoint__a_changed_number_or_name_is_found_by_its_checksum(tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", checkpointed(keras_weights()))
    for name in ("m.data-00000-of-00001", "m.index"):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(InvalidModelFile, match="checksum"):
            read_foreign(prefix)
        path.write_bytes(data[:-9])
        with pytest.raises(InvalidModelFile):
            read_foreign(prefix)
        path.write_bytes(data)
    (tmp_path / "m.data-00000-of-00001").unlink()
    with pytest.raises(InvalidModelFile, match="can't read"):
        read_foreign(prefix)


@pytest.mark.parametrize("size", [0, 1, 9, 4096, 4097, 100_003])
def test_crc32c__is_the_same_in_stripes(size: int) -> None:
    data = b"123456789" * (size // 9) + os.urandom(size % 9)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("name", ["opt", "trainer/adam"])
def test_tensorflow__optimizer_of_any_name_is_left_out(tmp_path: Path, name: str) -> None:
    weights = keras_weights(2)
    arrays = checkpointed(weights, ("gru", "gru_1"))
    moments = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays |= {f"{name}/_variables/{2 + index}{ending}": one for index, one in enumerate([*moments, *moments])}
    arrays |= {f"{name}/_iterations{ending}": np.array(5), f"{name}/_learning_rate{ending}": np.array(1e-3, "f4")}
    path = write_bundle(tmp_path / "ckpt", arrays)
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


def test_tensorflow__variables_that_only_the_optimizer_names_are_read(tmp_path: Path) -> None:
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    for num_layers in (1, 2):
        weights = keras_weights(num_layers)
        grus = [array for gru in weights.grus for array in gru]
        ends = {
            "net/emb/_embeddings": weights.embedding,
            "net/head/_kernel": weights.dense,
            "net/head/bias": weights.bias,
        }
        some = ends | {f"opt/_trainable_variables/{index + 1}": array for index, array in enumerate(grus)}
        every = [weights.embedding, *grus, weights.dense, weights.bias]
        all_of_them = {f"optimizer/_trainable_variables/{index}": array for index, array in enumerate(every)}
        for name, arrays in (("some", some), ("all", all_of_them)):
            stem = "opt" if name == "some" else "optimizer"
            arrays |= {f"{stem}/_variables/{2 + index}": array for index, array in enumerate([*every, *every])}
            arrays |= {f"{stem}/_iterations": np.array(5), f"{stem}/_learning_rate": np.array(1e-3, "f4")}
            path = write_bundle(
                tmp_path / f"{name}{num_layers}", {f"{key}{ending}": one for key, one in arrays.items()}
            )
            np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize(("operation", "refused"), [("Relu", True), ("ReverseV2", True), ("Tanh", False)])
def test_tensorflow__graph_with_other_operations_is_refused(tmp_path: Path, operation: str, refused: bool) -> None:
    folder = write_saved_model(
        tmp_path / "m", keras_weights(vocab=len(CHARSET) + 1), CHARSET, range(1, len(CHARSET) + 1)
    )
    path = folder / "saved_model.pb"
    function = field(1, field(3, field(1, "name") + field(2, operation)))
    path.write_bytes(path.read_bytes() + field(2, field(2, field(2, function))))
    if refused:
        with pytest.raises(UnsupportedModel, match=f"operation {operation}"):
            read_foreign(folder)
    else:
        assert read_foreign(folder)[0].tokens == (None, *CHARSET)


def test_tensorflow__graph_that_masks_a_character_is_refused(tmp_path: Path) -> None:
    folder = write_saved_model(tmp_path / "m", keras_weights(), CHARSET, range(len(CHARSET)))
    path = folder / "saved_model.pb"
    imported_log_probs(folder)
    path.write_bytes(path.read_bytes() + field(2, field(2, field(1, field(2, "NotEqual")))))
    with pytest.raises(UnsupportedModel, match="mask_zero=True"):
        imported_log_probs(folder)


def test_tensorflow__bidirectional_checkpoint_whose_names_are_lost_is_refused(tmp_path: Path) -> None:
    weights = keras_weights(2)
    every = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays = {f"opt/_trainable_variables/{index}{ending}": one for index, one in enumerate(every)}
    children = field(1, field(1, 1) + field(2, "forward_layer")) + field(1, field(1, 2) + field(2, "backward_layer"))
    objects = np.frombuffer(field(1, children), np.uint8)
    padded = np.concatenate([objects, np.zeros(-len(objects) % 8, np.uint8)]).view("<i8")
    path = write_bundle(tmp_path / "m", arrays | {"_CHECKPOINTABLE_OBJECT_GRAPH": padded})
    with pytest.raises(UnsupportedModel, match="is bidirectional"):
        read_foreign(path)

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

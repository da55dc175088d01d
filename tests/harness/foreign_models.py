"""Foreign models with random weights, written as their libraries write them, and what these libraries compute."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from service.importing.conversion import convert
from service.importing.crc32c import masked_crc32c
from service.importing.detection import read_foreign
from service.importing.float_loss import log_probabilities
from service.importing.protobuf import field, write_varint
from service.importing.vocabulary import fit

Array = NDArray[Any]
CHARSET = "\n !'abcdefgh"
UNITS, DIM = 6, 5


@dataclass
class KerasWeights:
    """The weights of a Keras model: embedding (V, E), for each GRU kernel, recurrent kernel and bias; dense, bias."""

    embedding: Array
    grus: list[tuple[Array, Array, Array]]
    dense: Array
    bias: Array


def keras_weights(num_layers: int = 1, vocab: int = len(CHARSET), dim: int = DIM, seed: int = 0) -> KerasWeights:
    """Return random weights, large enough that every gate matters."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return random.normal(0, 0.7, shape).astype(np.float32)

    grus = [
        (draw(dim if layer == 0 else UNITS, 3 * UNITS), draw(UNITS, 3 * UNITS), draw(2, 3 * UNITS))
        for layer in range(num_layers)
    ]
    return KerasWeights(draw(vocab, dim), grus, draw(UNITS, vocab), draw(vocab))


def keras_log_probs(weights: KerasWeights, ids: Array) -> Array:
    """Return (n, V) log-probabilities after each of (n,) ids, as Keras defines GRU(reset_after=True)."""
    inputs = weights.embedding.astype(np.float64)[ids]
    for kernel, recurrent, bias in weights.grus:
        hidden, states = np.zeros(recurrent.shape[0]), []
        for row in inputs:
            xz, xr, xh = np.split(row @ kernel + bias[0], 3)
            rz, rr, rh = np.split(hidden @ recurrent + bias[1], 3)
            update, reset = 1 / (1 + np.exp(-xz - rz)), 1 / (1 + np.exp(-xr - rr))
            hidden = update * hidden + (1 - update) * np.tanh(xh + reset * rh)
            states.append(hidden)
        inputs = np.array(states)
    logits = inputs @ weights.dense + weights.bias
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def imported_log_probs(path: Path, charset: str | None = None, order: tuple[str, ...] = ()) -> Callable[[Array], Array]:
    """Import a file. Return a function from (n,) ids of the imported model to its (n, V) log-probabilities."""
    model, _ = read_foreign(path, order)
    tokens = charset if charset is not None else model.tokens
    assert tokens is not None
    config, tensors = convert(model, fit(tuple(tokens), model.vocab_size, "the test")[0])

    def compute(ids: Array) -> Array:
        hidden = np.zeros((config.num_layers, config.num_units), np.float32)
        return log_probabilities(config, tensors, ids, hidden)

    return compute


def write_hdf5(path: Path, arrays: Mapping[str, Array], attributes: Mapping[str, Any] | None = None) -> Path:
    """Write arrays at their paths, and attributes of the root."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        for name, value in (attributes or {}).items():
            file.attrs[name] = value
    return path


def subclassed(weights: KerasWeights, names: tuple[str, ...] = ("gru",)) -> dict[str, Array]:
    """Return path -> array as `save_weights` of Keras 3 writes a subclassed model, with an optimizer's variables."""
    arrays = {"table/vars/0": weights.embedding, "head/vars/0": weights.dense, "head/vars/1": weights.bias}
    for name, gru in zip(names, weights.grus, strict=True):
        arrays |= {f"{name}/cell/vars/{index}": array for index, array in enumerate(gru)}
    return arrays | {"optimizer/vars/0": np.array(7), "optimizer/vars/1": weights.embedding}


def sequential(weights: KerasWeights) -> dict[str, Array]:
    """Return path -> array as Keras 3 writes a Sequential model."""
    names = ["gru"] + [f"gru_{index}" for index in range(1, len(weights.grus))]
    return {f"layers/{path}": array for path, array in subclassed(weights, tuple(names)).items() if path[:3] != "opt"}


def keras_config(num_layers: int = 1, **changes: Any) -> dict[str, Any]:
    """Return the config of a Sequential model. changes: other values in the configs of its GRU layers."""
    gru = {"units": UNITS, "activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True} | changes
    layers: list[dict[str, Any]] = [{"class_name": "Embedding", "config": {"name": "table"}}]
    layers += [
        {"class_name": "GRU", "config": {"name": f"layer_{chr(98 - index)}", **gru}} for index in range(num_layers)
    ]
    layers += [{"class_name": "Dense", "config": {"name": "head", "activation": "linear"}}]
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": layers}}


def legacy(weights: KerasWeights) -> dict[str, Array]:
    """Return path -> array as Keras 2 writes a whole model in HDF5; GRU layers are named against their order."""
    arrays = {
        "model_weights/table/table/embeddings:0": weights.embedding,
        "model_weights/head/head/kernel:0": weights.dense,
        "model_weights/head/head/bias:0": weights.bias,
        "optimizer_weights/Adam/m/kernel:0": weights.dense,
    }
    for index, gru in enumerate(weights.grus):
        name = f"layer_{chr(98 - index)}"
        for part, array in zip(("kernel", "recurrent_kernel", "bias"), gru, strict=True):
            arrays[f"model_weights/{name}/{name}/gru_cell/{part}:0"] = array
    return arrays


def write_keras(path: Path, arrays: Mapping[str, Array], config: Any, **members: bytes) -> Path:
    """Write a `.keras` archive."""
    inner = write_hdf5(path.with_suffix(".inner"), arrays)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(inner, "model.weights.h5")
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    inner.unlink()
    return path


# TensorFlow


def write_bundle(prefix: Path, arrays: Mapping[str, Array]) -> Path:
    """Write a TensorFlow checkpoint; return its path without `.index`."""
    data, entries = b"", [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name, array in sorted(arrays.items()):
        raw = np.ascontiguousarray(array).tobytes()
        dims = b"".join(field(2, field(1, length)) for length in array.shape)
        kind = {"f4": 1, "f8": 2, "f2": 19, "i8": 9}[array.dtype.str[1:]]
        entry = field(1, kind) + field(2, dims) + field(4, len(data)) + field(5, len(raw))
        entries.append((name.encode(), entry + b"\x35" + struct.pack("<I", masked_crc32c(raw))))
        data += raw
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)
    prefix.with_name(prefix.name + ".index").write_bytes(table_of(entries))
    return prefix


def table_of(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a table as LevelDB writes it, with one block and shared prefixes."""
    out = b""

    def block(items: Sequence[tuple[bytes, bytes]]) -> bytes:
        nonlocal out
        body, before = b"", b""
        for key, value in items:
            shared = next(
                (i for i, pair in enumerate(zip(before, key, strict=False)) if pair[0] != pair[1]),
                min(len(before), len(key)),
            )
            body += write_varint(shared) + write_varint(len(key) - shared) + write_varint(len(value))
            body += key[shared:] + value
            before = key
        body += struct.pack("<II", 0, 1)
        handle = write_varint(len(out)) + write_varint(len(body))
        out += body + b"\0" + struct.pack("<I", masked_crc32c(body + b"\0"))
        return handle

    data, meta = block(entries), block([])
    index = block([(b"z", data)])
    return out + (meta + index).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def checkpointed(weights: KerasWeights, names: Sequence[str] = ("gru",)) -> dict[str, Array]:
    """Return name -> array as tf.train.Checkpoint(model=...) writes a subclassed model."""
    arrays = {
        "model/table/_embeddings": weights.embedding,
        "model/head/_kernel": weights.dense,
        "model/head/bias": weights.bias,
        "model/optimizer/_variables/2": weights.embedding,
        "save_counter": np.array(1),
    }
    for name, gru in zip(names, weights.grus, strict=True):
        for part, array in zip(("kernel", "recurrent_kernel", "bias"), gru, strict=True):
            arrays[f"model/{name}/cell/{part}"] = array
    return {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": array for name, array in arrays.items()}


def write_saved_model(folder: Path, weights: KerasWeights, tokens: Sequence[str], ids: Sequence[int]) -> Path:
    """Write a SavedModel whose graph has a lookup table from tokens to ids."""
    (folder / "variables").mkdir(parents=True)
    names = [f"rnn_{index}" for index in range(len(weights.grus))]
    write_bundle(folder / "variables" / "variables", checkpointed(weights, names))

    def constant(tensor: bytes) -> bytes:
        value = field(1, "value") + field(2, field(8, tensor))
        return field(1, field(1, "Const") + field(2, "Const") + field(5, value))

    shape = field(2, field(2, field(1, len(tokens))))
    keys = constant(field(1, 7) + shape + b"".join(field(8, token) for token in tokens))
    values = constant(field(1, 9) + shape + field(4, np.array(ids, "<i8").tobytes()))
    names_of_inputs = constant(field(1, 7) + field(8, "a name") + field(8, "another"))
    (folder / "saved_model.pb").write_bytes(field(1, 1) + field(2, field(2, names_of_inputs + keys + values)))
    return folder

"""Keras: a Sequential model of Embedding, GRU and Dense in Keras 3's format.

    model = keras.models.load_model("model.keras")
    logits = model(ids)

The format is a zip archive of the layers as JSON and the weights in HDF5.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import IO, Any

import numpy as np

from service.arrays import Float32
from service.errors import MissingLibrary
from service.model.artifact import Tensors
from service.model.config import ModelConfig

_KERAS_VERSION = "3.0.0"  # the oldest that reads this


def write_keras(file: IO[bytes], config: ModelConfig, tensors: Tensors) -> None:
    """Write a model into an empty file. Raises MissingLibrary if h5py is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise MissingLibrary("this format needs h5py, which is not installed: run pip install h5py") from error
    weights = io.BytesIO()
    with h5py.File(weights, "w") as hdf5:
        hdf5.create_group("vars")
        hdf5["layers/embedding/vars/0"] = tensors["embedding.weight"]
        for layer in range(config.num_layers):
            group = f"layers/gru{f'_{layer}' if layer else ''}"
            hdf5.create_group(f"{group}/vars")
            weight_ih, weight_hh, bias_ih, bias_hh = (
                _zrh(tensors[f"gru.{name}_l{layer}"]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            for index, array in enumerate((weight_ih.T, weight_hh.T, np.stack((bias_ih, bias_hh)))):
                hdf5[f"{group}/cell/vars/{index}"] = array
        hdf5["layers/dense/vars/0"] = tensors["dense.weight"].T
        hdf5["layers/dense/vars/1"] = tensors["dense.bias"]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": _KERAS_VERSION, "date_saved": ""}))
        archive.writestr("config.json", json.dumps(_layers(config)))
        archive.writestr("model.weights.h5", weights.getbuffer())
        archive.writestr("charset.json", json.dumps(list(config.charset)))  # Keras ignores it


def _zrh(stacked: Float32) -> Float32:
    """Return gates, which are stacked r, z, n, in Keras's order z, r, h."""
    reset, update, candidate = np.split(stacked, 3)
    return np.concatenate((update, reset, candidate))


def _layers(config: ModelConfig) -> dict[str, Any]:
    vocab, units = config.vocab_size, config.num_units
    layers = [
        _layer("InputLayer", "ids", batch_shape=[None, None], dtype="int32"),
        _layer("Embedding", "embedding", [None, None], input_dim=vocab, output_dim=config.embedding_dim),
    ]
    for index in range(config.num_layers):
        size = config.embedding_dim if index == 0 else units
        layers.append(
            _layer(
                "GRU", f"gru_{index}", [None, None, size], units=units, return_sequences=True, activation="tanh",
                recurrent_activation="sigmoid", use_bias=True, reset_after=True,
            )
        )  # fmt: skip
    layers.append(_layer("Dense", "dense", [None, None, units], units=vocab, activation="linear", use_bias=True))
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "gru_serve", "layers": layers},
        "registered_name": None,
        "build_config": {"input_shape": [None, None]},
    }


def _layer(kind: str, name: str, input_shape: list[int | None] | None = None, **config: Any) -> dict[str, Any]:
    layer: dict[str, Any] = {"module": "keras.layers", "class_name": kind, "registered_name": None}
    layer["config"] = {"name": name, **config}
    if input_shape is not None:
        layer["build_config"] = {"input_shape": input_shape}
    return layer

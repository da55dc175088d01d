"""A model version's weights for libraries that stack the gates as z, r, n; torch stacks r, z, n."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Weights:
    """A model with one GRU layer; all float32, gates in the order z, r, n.

    embedding: (V, E). inputs: (3H, E), recurrent: (3H, H), bias: (2, 3H), that of inputs and the recurrent one.
    dense: (V, H), dense_bias: (V,).
    """

    charset: str
    embedding: Float32
    inputs: Float32
    recurrent: Float32
    bias: Float32
    dense: Float32
    dense_bias: Float32

    @classmethod
    def read(cls, directory: Path) -> Weights:
        """Those in `config.json` and `model.safetensors`."""
        config = json.loads((directory / "config.json").read_text())
        if config["num_layers"] != 1:
            raise ValueError(f"only models with one layer, not {config['num_layers']}")
        tensors = load_file(directory / "model.safetensors")
        names = ("gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0", "gru.bias_hh_l0")
        inputs, recurrent, bias, recurrent_bias = (_update_gate_first(tensors[name]) for name in names)
        return cls(
            config["charset"],
            tensors["embedding.weight"],
            inputs,
            recurrent,
            np.stack([bias, recurrent_bias]),
            tensors["dense.weight"],
            tensors["dense.bias"],
        )


def _update_gate_first(stacked: Float32) -> Float32:
    reset, update, candidate = np.split(stacked, 3)
    return np.concatenate([update, reset, candidate])

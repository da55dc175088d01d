"""The weights of a model version, for libraries that stack the gates as z, r, n. torch stacks them as r, z, n."""

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
    """The weights of a model with one GRU layer, with the gates in the order z, r, n."""

    charset: str
    embedding: Float32  # (V, E)
    inputs: Float32  # (3H, E)
    recurrent: Float32  # (3H, H)
    bias: Float32  # (2, 3H): of the input gates, and of the hidden gates
    dense: Float32  # (V, H)
    dense_bias: Float32  # (V,)

    @classmethod
    def read(cls, directory: Path) -> Weights:
        """Read `config.json` and `model.safetensors`. Raises ValueError for a model with more than one layer."""
        config = json.loads((directory / "config.json").read_text())
        if config["num_layers"] != 1:
            raise ValueError(f"the model has {config['num_layers']} layers; only models with one layer can be compared")
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

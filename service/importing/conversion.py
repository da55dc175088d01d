"""A foreign model and its characters -> our config and weights: order of gates, biases, rows, one-hot inputs.

Weights are only moved: every number of the result is a number of the file in float32, 0 or 1. So converting what
`gru-serve export` wrote gives the same weights to the bit.
"""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError

from service.arrays import Float32
from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import BFLOAT16, Array, ForeignLayer, ForeignModel, Tokens
from service.model.artifact import Tensors
from service.model.config import ModelConfig
from service.model.manifest import describe_first_error

_OURS = "rzn"


def convert(model: ForeignModel, tokens: Tokens) -> tuple[ModelConfig, Tensors]:
    """Return the config and the weights of a foreign model.

    Args:
        model: the foreign model.
        tokens: a character for each row of its embedding; None for a row that is left out.

    Raises:
        UnsupportedModel: the sizes are larger than accepted, or the model doesn't read one of the characters.
        InvalidModelFile: a weight is not finite in float32.
    """
    if model.skips_row_0 and tokens[0] is not None:
        raise UnsupportedModel(
            f"the embedding has mask_zero=True, and the id 0 is the character {tokens[0]!r}: the model reads a text "
            "without it. Train it with mask_zero=False, or with an id 0 that is padding"
        )
    rows = np.array([index for index, token in enumerate(tokens) if token is not None])
    keeps_all = len(rows) == len(tokens)
    # One-hot vectors select a column of the first product. As an embedding that is the identity: of the characters, or
    # of the gates, whichever is smaller.
    is_one_hot = model.embedding is None
    if model.embedding is not None:
        embedding_dim = int(model.embedding.shape[1])
    else:
        embedding_dim = min(len(rows), 3 * model.layers[0].num_units)
    config = _config(model, tokens, embedding_dim)
    tensors: Tensors = {}
    for index, layer in enumerate(model.layers):
        weights = _gates(layer, layer.inputs, "input weights")
        if index == 0 and is_one_hot:
            columns = weights if keeps_all else weights[:, rows]
            if embedding_dim == len(rows):
                tensors["embedding.weight"], weights = np.eye(embedding_dim, dtype=np.float32), columns
            else:
                tensors["embedding.weight"] = np.ascontiguousarray(columns.T)
                weights = np.eye(embedding_dim, dtype=np.float32)
        tensors[f"gru.weight_ih_l{index}"] = np.ascontiguousarray(weights)
        tensors[f"gru.weight_hh_l{index}"] = _gates(layer, layer.recurrent, "recurrent weights")
        tensors[f"gru.bias_ih_l{index}"] = _gates(layer, layer.input_bias, "biases")
        tensors[f"gru.bias_hh_l{index}"] = _gates(layer, layer.recurrent_bias, "biases")
    if model.embedding is not None:
        tensors["embedding.weight"] = _float32(model.embedding if keeps_all else model.embedding[rows], "embedding")
    tensors["dense.weight"] = _float32(model.dense if keeps_all else model.dense[rows], "output layer")
    if model.dense_bias is None:
        tensors["dense.bias"] = np.zeros(len(rows), np.float32)
    else:
        tensors["dense.bias"] = _float32(model.dense_bias[rows], "bias of the output layer")
    return config, {name: tensors[name] for name in config.tensor_shapes()}


def _config(model: ForeignModel, tokens: Tokens, embedding_dim: int) -> ModelConfig:
    """Return the config of a model whose layers have equal sizes. Raises UnsupportedModel."""
    first = model.layers[0]
    try:
        config = ModelConfig(
            charset="".join(token for token in tokens if token is not None),
            embedding_dim=embedding_dim,
            num_units=first.num_units,
            num_layers=len(model.layers),
        )
    except ValidationError as error:
        raise UnsupportedModel(
            f"the model is larger than this service accepts: {describe_first_error(error)}"
        ) from error
    for layer in model.layers:
        if layer.num_units != first.num_units:
            raise UnsupportedModel(
                f"the GRU layers have {first.num_units} and {layer.num_units} units, and this service needs equal "
                "numbers: train a model whose layers have equal sizes"
            )
    return config


def _gates(layer: ForeignLayer, stacked: Array | None, what: str) -> Float32:
    """Return the rows of a layer in the order r, z, n; zeros for a bias that the layer lacks."""
    units = layer.num_units
    if stacked is None:
        return np.zeros(3 * units, np.float32)
    out = np.empty(stacked.shape, np.float32)
    for target, gate in enumerate(_OURS):
        source = layer.gates.index(gate)
        _fill(out[target * units : (target + 1) * units], stacked[source * units : (source + 1) * units])
    _check_finite(out, f"{what} of {layer.name}")
    return out


def _float32(array: Array, what: str) -> Float32:
    """Return a copy in float32, row by row in memory."""
    out = np.empty(array.shape, np.float32)
    _fill(out, array)
    _check_finite(out, what)
    return out


def _fill(out: Float32, numbers: Array) -> None:
    """Set an array to numbers of any precision, without a second copy of them."""
    if numbers.dtype.names == BFLOAT16.names:
        bits = out.view(np.uint32)
        bits[...] = numbers["bfloat16"]
        bits <<= 16
        return
    with np.errstate(over="ignore"):
        out[...] = numbers


def _check_finite(array: Float32, what: str) -> None:
    # The sum of squares is finite only if all numbers are; where it overflows, each number is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.vdot(array, array))
    if not np.isfinite(total) and not np.isfinite(array).all():
        raise InvalidModelFile(
            f"{what} contains a number that is not finite: the training diverged, or the file is damaged"
        )

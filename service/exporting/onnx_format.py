"""ONNX: a graph from (batch, n) ids and the (L, batch, H) state before them to (batch, n, V) logits and the next state.

    session = onnxruntime.InferenceSession("model.onnx")
    logits, state = session.run(None, {"ids": ids, "state": state})

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from service import __version__
from service.arrays import Float32
from service.importing.protobuf import field
from service.model.artifact import Tensors
from service.model.config import ModelConfig

_IR_VERSION, _OPSET = 8, 17
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7  # AttributeProto.AttributeType


def write_onnx(file: IO[bytes], config: ModelConfig, tensors: Tensors) -> None:
    """Write a model into an empty file."""
    nodes = [_node("Gather", ["embedding", "ids"], ["embedded"]), _transpose("embedded", "x0")]
    constants = [_tensor("embedding", tensors["embedding.weight"]), _tensor("one", np.array([1], np.int64))]
    states = []
    for layer in range(config.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            _zrn(tensors[f"gru.{name}_l{layer}"]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        names = [f"{part}{layer}" for part in ("W", "R", "B")]
        biases = np.concatenate((bias_ih, bias_hh))
        constants += [
            _tensor(name, array[None]) for name, array in zip(names, (weight_ih, weight_hh, biases), strict=True)
        ]
        constants += [_tensor(f"layer{layer}", np.array([layer], np.int64))]
        nodes += [
            _node("Gather", ["state", f"layer{layer}"], [f"before{layer}"]),
            _node(
                "GRU", [f"x{layer}", *names, "", f"before{layer}"], [f"y{layer}", f"after{layer}"],
                hidden_size=config.num_units, linear_before_reset=1,
            ),
            _node("Squeeze", [f"y{layer}", "one"], [f"x{layer + 1}"]),
        ]  # fmt: skip
        states.append(f"after{layer}")
    constants += [_tensor("dense", tensors["dense.weight"].T), _tensor("bias", tensors["dense.bias"])]
    nodes += [
        _node("Concat", states, ["state_after"], axis=0),
        _transpose(f"x{config.num_layers}", "states"),
        _node("MatMul", ["states", "dense"], ["product"]),
        _node("Add", ["product", "bias"], ["logits"]),
    ]
    state: list[int | str] = [config.num_layers, "batch", config.num_units]
    graph = b"".join(
        [
            *(field(1, node) for node in nodes),
            field(2, "gru"),
            *(field(5, constant) for constant in constants),
            field(11, _value("ids", _INT64, ["batch", "n"])),
            field(11, _value("state", _FLOAT, state)),
            field(12, _value("logits", _FLOAT, ["batch", "n", config.vocab_size])),
            field(12, _value("state_after", _FLOAT, state)),
        ]
    )
    charset = field(1, "charset") + field(2, json.dumps(list(config.charset)))
    file.write(field(1, _IR_VERSION) + field(2, "gru-serve") + field(3, __version__))
    file.write(field(7, graph) + field(8, field(1, "") + field(2, _OPSET)) + field(14, charset))


def _zrn(stacked: Float32) -> Float32:
    """Return gates, which are stacked r, z, n, in ONNX's order z, r, n."""
    reset, update, candidate = np.split(stacked, 3)
    return np.concatenate((update, reset, candidate))


def _transpose(source: str, target: str) -> bytes:
    """Return a node that swaps batch and time."""
    return _node("Transpose", [source], [target], perm=[1, 0, 2])


def _node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | list[int]) -> bytes:
    parts = [*(field(1, name) for name in inputs), *(field(2, name) for name in outputs), field(4, op)]
    for name, value in attributes.items():
        if isinstance(value, int):
            body = field(3, value) + field(20, _ATTRIBUTE_INT)
        else:
            body = b"".join(field(8, one) for one in value) + field(20, _ATTRIBUTE_INTS)
        parts.append(field(5, field(1, name) + body))
    return b"".join(parts)


def _tensor(name: str, array: NDArray[np.generic]) -> bytes:
    kind, dtype = (_INT64, "<i8") if array.dtype.kind == "i" else (_FLOAT, "<f4")
    dims = b"".join(field(1, length) for length in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, np.ascontiguousarray(array, dtype).tobytes())


def _value(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(field(1, field(1 if isinstance(length, int) else 2, length)) for length in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))

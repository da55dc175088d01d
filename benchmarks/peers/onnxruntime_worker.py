"""ONNX Runtime: the GRU operator in float32, with sampling in numpy.

python -m benchmarks.peers.onnxruntime_worker DIRECTORY THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Not installed in the development environment, so mypy does not know its types.
import onnxruntime  # type: ignore[import-not-found,import-untyped,unused-ignore]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper  # type: ignore[import-not-found,import-untyped,unused-ignore]

from benchmarks.peers.weights import Float32, Weights
from benchmarks.peers.worker import Worker

Ids = NDArray[np.int64]


class OnnxRuntime(Worker):
    """A graph that computes one step, and a loop that calls it."""

    def __init__(self, weights: Weights, threads: int) -> None:
        self._charset, self._units = weights.charset, weights.recurrent.shape[1]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            step_graph(weights).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._rng = np.random.default_rng(0)

    def logits(self, text: str) -> list[float]:
        """See Worker."""
        hidden, logits = self._initial_hidden(1), np.empty((1, 0), np.float32)
        for char in text:
            logits, hidden = self._step(np.array([self._charset.index(char)]), hidden)
        return [float(logit) for logit in logits[0]]

    def generator(self, num_rows: int) -> Callable[[], object]:
        """See Worker."""
        chars, hidden = np.zeros(num_rows, np.int64), self._initial_hidden(num_rows)

        def generate() -> None:
            nonlocal chars, hidden
            logits, hidden = self._step(chars, hidden)
            chars = self._draw(logits)

        return generate

    def _step(self, chars: Ids, hidden: Float32) -> tuple[Float32, Float32]:
        """Step over (B,) ids from the state (1, B, H). Return logits (B, V) and the new state (1, B, H)."""
        logits, after = self._session.run(["logits", "after"], {"chars": chars[None], "hidden": hidden})
        return logits, after

    def _draw(self, logits: Float32) -> Ids:
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(weights, axis=1)
        points = self._rng.random((len(logits), 1), np.float32) * cumulative[:, -1:]
        drawn: Ids = np.minimum(np.count_nonzero(cumulative <= points, axis=1), logits.shape[1] - 1)
        return drawn

    def _initial_hidden(self, num_rows: int) -> Float32:
        return np.zeros((1, num_rows, self._units), np.float32)


def step_graph(weights: Weights) -> Any:
    """Return the graph of one step.

    Its inputs are chars (1, B) int64 and hidden (1, B, H). Its outputs are logits (B, V) and after (1, B, H), the new
    state.
    """
    vocab, units = weights.dense.shape
    constants = {
        "embedding": weights.embedding,
        "inputs": weights.inputs[None],
        "recurrent": weights.recurrent[None],
        "bias": weights.bias.reshape(1, -1),
        "dense": weights.dense,
        "dense_bias": weights.dense_bias,
        "axis": np.array([0]),
    }
    gru = ["embedded", "inputs", "recurrent", "bias", "", "hidden"]
    nodes = [
        helper.make_node("Gather", ["embedding", "chars"], ["embedded"]),  # (1, B, E)
        helper.make_node("GRU", gru, ["", "after"], hidden_size=units, linear_before_reset=1),
        helper.make_node("Squeeze", ["after", "axis"], ["last"]),  # (B, H)
        helper.make_node("Gemm", ["last", "dense", "dense_bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "step",
        [_value("chars", TensorProto.INT64, [1, "B"]), _value("hidden", TensorProto.FLOAT, [1, "B", units])],
        [_value("logits", TensorProto.FLOAT, ["B", vocab]), _value("after", TensorProto.FLOAT, [1, "B", units])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _value(name: str, kind: int, shape: list[int | str]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


if __name__ == "__main__":
    OnnxRuntime(Weights.read(Path(sys.argv[1])), int(sys.argv[2])).serve()

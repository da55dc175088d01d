"""A worker of `benchmarks.peers` in plain numpy, which needs no virtual environment of its own.

python -m tests.commands.numpy_peer DIRECTORY THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers.weights import Float32, Weights
from benchmarks.peers.worker import Worker


class Numpy(Worker):
    """Steps one character at a time and always takes the likeliest one."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def logits(self, text: str) -> list[float]:
        """See Worker."""
        hidden, logits = self._initial_hidden(1), np.empty((1, 0), np.float32)
        for char in text:
            logits, hidden = self._step(np.array([self._weights.charset.index(char)]), hidden)
        return [float(logit) for logit in logits[0]]

    def generator(self, num_rows: int) -> Callable[[], object]:
        """See Worker."""
        chars, hidden = np.zeros(num_rows, np.int64), self._initial_hidden(num_rows)

        def generate() -> None:
            nonlocal chars, hidden
            logits, hidden = self._step(chars, hidden)
            chars = logits.argmax(axis=1)

        return generate

    def _step(self, chars: np.ndarray, hidden: Float32) -> tuple[Float32, Float32]:
        """Step (B,) ids and (B, H) hidden; return (B, V) logits and (B, H) hidden."""
        weights = self._weights
        z, r, n = np.split(weights.embedding[chars] @ weights.inputs.T + weights.bias[0], 3, axis=1)
        hidden_z, hidden_r, hidden_n = np.split(hidden @ weights.recurrent.T + weights.bias[1], 3, axis=1)
        update, reset = 1 / (1 + np.exp(-z - hidden_z)), 1 / (1 + np.exp(-r - hidden_r))
        hidden = (1 - update) * np.tanh(n + reset * hidden_n) + update * hidden
        return hidden @ weights.dense.T + weights.dense_bias, hidden

    def _initial_hidden(self, num_rows: int) -> Float32:
        return np.zeros((num_rows, self._weights.recurrent.shape[1]), np.float32)


if __name__ == "__main__":
    Numpy(Weights.read(Path(sys.argv[1]))).serve()

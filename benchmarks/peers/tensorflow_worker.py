"""TensorFlow: the model and the one-step loop of the tutorial "Text generation with an RNN".

python -m benchmarks.peers.tensorflow_worker DIRECTORY THREADS

As in the tutorial, one `tf.function` does everything for a character: it looks up the ids of strings, computes the
embedding, the GRU and the dense layer, masks "[UNK]", draws with `tf.random.categorical` and looks up the strings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Not installed in the development environment, so mypy does not know its types.
import tensorflow as tf  # type: ignore[import-not-found,import-untyped,unused-ignore]

from benchmarks.peers.weights import Float32, Weights
from benchmarks.peers.worker import Worker


class TensorFlow(Worker):
    """The tutorial's layers with the weights of a model version. "[UNK]" is character 0, and its weights are zero."""

    def __init__(self, weights: Weights, threads: int) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        layers = tf.keras.layers
        self._ids_from_chars = layers.StringLookup(vocabulary=list(weights.charset), mask_token=None)
        vocabulary = self._ids_from_chars.get_vocabulary()
        self._chars_from_ids = layers.StringLookup(vocabulary=vocabulary, invert=True, mask_token=None)
        self._mask = tf.constant([-np.inf] + [0.0] * len(weights.charset), tf.float32)
        vocab, units = weights.dense.shape
        self._embedding = layers.Embedding(vocab + 1, weights.embedding.shape[1])
        self._gru = layers.GRU(units, return_sequences=True, return_state=True)
        self._dense = layers.Dense(vocab + 1)
        self._call(tf.zeros((1, 1), tf.int64), None)  # creates the variables
        self._embedding.set_weights([_with_unknown(weights.embedding)])
        self._gru.set_weights([weights.inputs.T, weights.recurrent.T, weights.bias])
        self._dense.set_weights([_with_unknown(weights.dense).T, _with_unknown(weights.dense_bias)])
        self._one_step = tf.function(self._generate_one_step)

    def logits(self, text: str) -> list[float]:
        """See Worker."""
        ids = self._ids_from_chars(tf.strings.unicode_split(tf.constant([text]), "UTF-8")).to_tensor()
        logits, _ = self._call(ids, None)
        return [float(logit) for logit in logits.numpy()[0, -1, 1:]]

    def generator(self, num_rows: int) -> Callable[[], object]:
        """See Worker."""
        chars, states = tf.constant(["\n"] * num_rows), None

        def generate() -> None:
            nonlocal chars, states
            chars, states = self._one_step(chars, states)

        return generate

    def _call(self, ids: Any, states: Any) -> tuple[Any, Any]:
        """Return the logits (B, T, V + 1) and the states after the ids (B, T)."""
        embedded = self._embedding(ids)
        if states is None:
            states = self._gru.get_initial_state(tf.shape(embedded)[0])
            states = states[0] if isinstance(states, list) else states
        outputs, states = self._gru(embedded, initial_state=states)
        return self._dense(outputs), states

    def _generate_one_step(self, chars: Any, states: Any) -> tuple[Any, Any]:
        ids = self._ids_from_chars(tf.strings.unicode_split(chars, "UTF-8")).to_tensor()
        logits, states = self._call(ids, states)
        drawn = tf.random.categorical(logits[:, -1, :] / 1.0 + self._mask, num_samples=1)
        return self._chars_from_ids(tf.squeeze(drawn, axis=-1)), states


def _with_unknown(weight: Float32) -> Float32:
    """Insert a row of zeros before the first."""
    return np.concatenate([np.zeros_like(weight[:1]), weight])


if __name__ == "__main__":
    TensorFlow(Weights.read(Path(sys.argv[1])), int(sys.argv[2])).serve()

"""The loss of a model on texts in float32, in numpy: what `--corpus` compares the integers with, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Float64
from service.model.config import ModelConfig
from service.model.encoded_text import EncodedText

_CHUNK = 512  # characters between two progress reports; bounds the memory


def float_loss(
    config: ModelConfig,
    tensors: Mapping[str, Float32],
    text: EncodedText,
    progress: Callable[[int], object] = lambda _: None,
) -> float:
    """Return the mean loss of texts in nats a character, with the state carried from zero through each whole text.

    Calls `progress` with the number of characters scored since its last call. At least one must be scored.
    """
    total, num_scored = 0.0, 0
    for begin, end in text.spans():
        hidden = np.zeros((config.num_layers, config.num_units), np.float32)
        is_first_scored = begin > 0 and text.scores_starts
        before = _log_softmax(_logits(tensors, hidden[-1:]))
        for start in range(begin, end, _CHUNK):
            ids = text.ids[start : min(start + _CHUNK, end)]
            after = log_probabilities(config, tensors, ids, hidden)
            predicted = np.concatenate((before, after[:-1]))[np.arange(len(ids)), ids]
            before = after[-1:]
            predicted = predicted[0 if is_first_scored or start > begin else 1 :]
            total -= float(predicted.sum())
            num_scored += len(predicted)
            progress(len(predicted))
    return total / num_scored


def log_probabilities(
    config: ModelConfig, tensors: Mapping[str, Float32], ids: NDArray[np.integer], hidden: Float32
) -> Float64:
    """Read (n,) ids; return the (n, V) log-probabilities of the next character after each.

    hidden: (L, H) float32, the state before the first; it becomes that after the last.
    """
    inputs = tensors["embedding.weight"][ids]
    for index in range(config.num_layers):
        inputs = _read_layer(tensors, index, inputs, hidden[index])
    return _log_softmax(_logits(tensors, inputs))


def _read_layer(tensors: Mapping[str, Float32], index: int, inputs: Float32, hidden: Float32) -> Float32:
    """Run one layer over (n, I) inputs: return the (n, H) states. `hidden`, (H,), becomes the last one."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        tensors[f"gru.{name}_l{index}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    units = len(hidden)
    gates = inputs @ weight_ih.T + bias_ih  # (n, 3H): r, z, n
    states = np.empty((len(inputs), units), np.float32)
    for position, row in enumerate(gates):
        product = weight_hh @ hidden + bias_hh
        reset, update = np.split(_sigmoid(row[: 2 * units] + product[: 2 * units]), 2)
        candidate = np.tanh(row[2 * units :] + reset * product[2 * units :])
        hidden[:] = candidate + update * (hidden - candidate)
        states[position] = hidden
    return states


def _logits(tensors: Mapping[str, Float32], states: Float32) -> Float32:
    return np.asarray(states @ tensors["dense.weight"].T + tensors["dense.bias"])


def _sigmoid(x: Float32) -> Float32:
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5, np.float32)  # unlike 1 / (1 + exp(-x)), it can't overflow


def _log_softmax(logits: Float32) -> Float64:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

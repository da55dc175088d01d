"""The step of a GRU layer, after its integer products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32
from service.engine.arithmetic import SIGMOID, TANH, activate
from service.model.quantize import QuantizedLinear

MAX_ROWS = 32  # rows whose gates are computed together: scratch memory for more would leave the cache of a core
_LIMITS = {
    activation: (np.array(-activation.limit, np.float32), np.array(activation.limit, np.float32))
    for activation in (SIGMOID, TANH)
}


def gate_scales(units: int) -> Float32:
    """Return the (3H,) float32 factors of the inputs of gates r, z and n: the scales of their activations."""
    return np.repeat([SIGMOID.scale, SIGMOID.scale, TANH.scale], units).astype(np.float32)


class Gates:
    """Computes the gates of a GRU layer, and from them its new state. Only one thread at a time may use it.

    It works in contiguous scratch memory, on a few rows at a time: numpy takes twice as long with strided operands, and
    even longer with memory outside the cache.
    """

    def __init__(self, recurrent: QuantizedLinear) -> None:
        units = self._units = recurrent.weight.shape[1]
        scales = gate_scales(units)
        scale = recurrent.scale * scales
        self._scale, self._scale_n = scale[: 2 * units], scale[2 * units :]
        self._bias_n = recurrent.bias[2 * units :] * scales[2 * units :]
        self._gates, self._square, self._top = (np.empty((MAX_ROWS, 2 * units), np.float32) for _ in range(3))
        self._candidate, self._square_n, self._top_n = (np.empty((MAX_ROWS, units), np.float32) for _ in range(3))

    def advance(self, products: NDArray[np.int32], input_gates: Float32, hidden: Float32) -> None:
        """Replace the states `hidden` by the states after the step.

        With s for `gate_scales`, and the scale and bias of the recurrent weights, this computes

            r, z = sigmoid(input_gates + s scale * product)
            n = tanh(input_gates + r * (s scale * product + s b_hn))
            h = n + z * (h - n)

        Args:
            products: (B, >= 3H) int32, of rounded states and recurrent weights.
            input_gates: (B, 3H) float32, the input's part of the gates, times `gate_scales`.
            hidden: (B, H) float32, updated in place.
        """
        for start in range(0, len(hidden), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            self._advance(products[rows], input_gates[rows], hidden[rows])

    def values(self, products: NDArray[np.int32], input_gates: Float32) -> tuple[Float32, Float32, Float32]:
        """Return r, z and n of `advance`, (B, H) float32 each, with the same bits. Changes no state."""
        units, parts = self._units, []
        for start in range(0, len(products), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            gates, candidate = self._compute(products[rows], input_gates[rows])
            parts.append((gates[:, :units].copy(), gates[:, units:].copy(), candidate.copy()))
        reset, update, candidates = (np.concatenate(part) for part in zip(*parts, strict=True))
        return reset, update, candidates

    def _advance(self, products: NDArray[np.int32], input_gates: Float32, hidden: Float32) -> None:
        gates, candidate = self._compute(products, input_gates)
        np.subtract(hidden, candidate, hidden)
        np.multiply(hidden, gates[:, self._units :], hidden)
        np.add(hidden, candidate, hidden)

    def _compute(self, products: NDArray[np.int32], input_gates: Float32) -> tuple[Float32, Float32]:
        """Return r and z, (B, 2H), and n, (B, H), as views of the scratch memory."""
        units, b = self._units, len(products)
        gates = self._gates[:b]
        np.copyto(gates, products[:, : 2 * units])
        np.multiply(gates, self._scale, gates)
        np.add(gates, input_gates[:, : 2 * units], gates)
        np.clip(gates, *_LIMITS[SIGMOID], out=gates)
        activate(SIGMOID, gates, self._square[:b], self._top[:b])

        candidate = self._candidate[:b]
        np.copyto(candidate, products[:, 2 * units : 3 * units])
        np.multiply(candidate, self._scale_n, candidate)
        np.add(candidate, self._bias_n, candidate)
        np.multiply(candidate, gates[:, :units], candidate)
        np.add(candidate, input_gates[:, 2 * units :], candidate)
        np.clip(candidate, *_LIMITS[TANH], out=candidate)
        activate(TANH, candidate, self._square_n[:b], self._top_n[:b])
        return gates, candidate

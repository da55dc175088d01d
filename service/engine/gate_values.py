"""Computes the gates of earlier steps again, from the states before and after them. This needs no engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Ids
from service.engine.gates import Gates, gate_scales
from service.model.quantize import STATE_SCALE, QuantizedGRU, QuantizedLinear

_EXACT_FLOAT32 = 2**24  # float32 holds every integer up to this one
_ROWS = 256  # of weights that are converted to floats at a time: limits the memory


class GateValues:
    """Computes the gates of a quantised model with the same bits as a stepper. Safe for any number of threads."""

    def __init__(self, model: QuantizedGRU) -> None:
        self._layers, self._table = model.layers, model.table
        self._scales = gate_scales(model.config.num_units)
        self._recurrent = [_Product(layer.recurrent) for layer in model.layers]
        self._inputs = [None if layer.inputs is None else _Product(layer.inputs) for layer in model.layers]

    def __call__(self, chars: Ids, before: Float32, after: Float32) -> tuple[Float32, Float32, Float32]:
        """Return reset gates, update gates and candidates of n steps, (n, L, H) float32 each.

        Args:
            chars: (n,) ids that the steps consumed.
            before: (n, L, H) float32, the state before each step.
            after: (n, L, H) float32, the state after each step.
        """
        gates = [np.empty(before.shape, np.float32) for _ in range(3)]
        for index, (layer, recurrent, inputs) in enumerate(
            zip(self._layers, self._recurrent, self._inputs, strict=True)
        ):
            if inputs is None:
                input_gates = self._table[chars] * self._scales
            else:
                below = inputs(after[:, index - 1]).astype(np.float32)
                input_gates = below * (inputs.linear.scale * self._scales) + inputs.linear.bias * self._scales
            products = recurrent(before[:, index])
            for values, value in zip(gates, Gates(layer.recurrent).values(products, input_gates), strict=True):
                values[:, index] = value
        return gates[0], gates[1], gates[2]


class _Product:
    """Multiplies rounded states with integer weights: (n, H) float32 -> (n, rows) int32.

    Multiplies the integers as floats. That is exact, because a float of the chosen size holds every partial sum.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        self.linear = linear
        largest = STATE_SCALE * int(np.abs(linear.weight.astype(np.int16)).sum(axis=1, dtype=np.int64).max(initial=0))
        self._exact = np.float32 if largest < _EXACT_FLOAT32 else np.float64

    def __call__(self, states: Float32) -> NDArray[np.int32]:
        weight = self.linear.weight
        rounded = np.rint(states * np.float32(STATE_SCALE)).astype(self._exact)
        out = np.empty((len(states), len(weight)), np.int32)
        for start in range(0, len(weight), _ROWS):
            out[:, start : start + _ROWS] = rounded @ weight[start : start + _ROWS].astype(self._exact).T
        return out

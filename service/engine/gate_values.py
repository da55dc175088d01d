"""What the gates were when a text was read: computed afterwards, from its states, beside the engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Ids
from service.engine.gates import Gates, gate_scales
from service.model.quantize import STATE_SCALE, QuantizedGRU, QuantizedLinear

_EXACT_FLOAT32 = 2**24  # float32 holds every integer up to here
_ROWS = 256  # of weights, widened at a time: bounds the memory


class GateValues:
    """Gates of a quantised model, to the bit as a stepper computes them. Safe for any number of threads."""

    def __init__(self, model: QuantizedGRU) -> None:
        self._layers, self._table = model.layers, model.table
        self._scales = gate_scales(model.config.num_units)
        self._recurrent = [_Product(layer.recurrent) for layer in model.layers]
        self._inputs = [None if layer.inputs is None else _Product(layer.inputs) for layer in model.layers]

    def __call__(self, chars: Ids, before: Float32, after: Float32) -> tuple[Float32, Float32, Float32]:
        """Reset gates, update gates and candidates, (n, L, H) float32 each, of the steps that read (n,) ids.

        before, after: (n, L, H) float32, the states before and after each of them.
        """
        found = [np.empty(before.shape, np.float32) for _ in range(3)]
        for index, (layer, recurrent, inputs) in enumerate(
            zip(self._layers, self._recurrent, self._inputs, strict=True)
        ):
            if inputs is None:
                added = self._table[chars] * self._scales
            else:
                below = inputs(after[:, index - 1]).astype(np.float32)
                added = below * (inputs.linear.scale * self._scales) + inputs.linear.bias * self._scales
            products = recurrent(before[:, index])
            for values, value in zip(found, Gates(layer.recurrent).values(products, added), strict=True):
                values[:, index] = value
        return found[0], found[1], found[2]


class _Product:
    """(n, H) states -> (n, rows) int32, what integer weights make of their rounded numbers.

    Multiplied as floats, which is exact: every partial sum is an integer that they hold.
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

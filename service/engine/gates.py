"""One step of a GRU layer after its integer products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32
from service.engine.arithmetic import SIGMOID, TANH, activate
from service.model.quantize import QuantizedLinear

MAX_ROWS = 32  # rows whose gates are computed together: their scratch stays in the cache of a core
_LIMITS = {one: (np.array(-one.limit, np.float32), np.array(one.limit, np.float32)) for one in (SIGMOID, TANH)}


def gate_scales(units: int) -> Float32:
    """(3H,) float32: what the inputs of r, z and n are multiplied by, to be in the units of their activations."""
    return np.repeat([SIGMOID.scale, SIGMOID.scale, TANH.scale], units).astype(np.float32)


class Gates:
    """Turns states into new ones.

    Works in scratch memory, a few rows at a time: strided operands cost numpy double, and what leaves the cache more.
    """

    def __init__(self, recurrent: QuantizedLinear) -> None:
        units = self._units = recurrent.weight.shape[1]
        scales = gate_scales(units)
        scale = recurrent.scale * scales
        self._scale, self._scale_n = scale[: 2 * units], scale[2 * units :]
        self._bias_n = recurrent.bias[2 * units :] * scales[2 * units :]
        self._gates, self._square, self._top = (np.empty((MAX_ROWS, 2 * units), np.float32) for _ in range(3))
        self._candidate, self._square_n, self._top_n = (np.empty((MAX_ROWS, units), np.float32) for _ in range(3))

    def advance(self, products: NDArray[np.int32], added: Float32, hidden: Float32) -> None:
        """Turn hidden (B, H) into the new state.

        products: (B, >= 3H) int32, of rounded states and recurrent weights. added: (B, 3H), what the input adds to the
        gates, times `gate_scales`. With s for `gate_scales`:

            r, z = sigmoid(added + s scale * product)
            n = tanh(added + r * (s scale * product + s b_hn))
            h = n + z * (h - n)
        """
        for start in range(0, len(hidden), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            self._advance(products[rows], added[rows], hidden[rows])

    def values(self, products: NDArray[np.int32], added: Float32) -> tuple[Float32, Float32, Float32]:
        """r, z and n of `advance`, (B, H) float32 each, to the bit; no state is changed."""
        units, parts = self._units, []
        for start in range(0, len(products), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            gates, candidate = self._computed(products[rows], added[rows])
            parts.append((gates[:, :units].copy(), gates[:, units:].copy(), candidate.copy()))
        reset, update, candidates = (np.concatenate(part) for part in zip(*parts, strict=True))
        return reset, update, candidates

    def _advance(self, products: NDArray[np.int32], added: Float32, hidden: Float32) -> None:
        gates, candidate = self._computed(products, added)
        np.subtract(hidden, candidate, hidden)
        np.multiply(hidden, gates[:, self._units :], hidden)
        np.add(hidden, candidate, hidden)

    def _computed(self, products: NDArray[np.int32], added: Float32) -> tuple[Float32, Float32]:
        """(B, 2H) r and z, (B, H) n, in the scratch memory."""
        units, b = self._units, len(products)
        gates = self._gates[:b]
        np.copyto(gates, products[:, : 2 * units])
        np.multiply(gates, self._scale, gates)
        np.add(gates, added[:, : 2 * units], gates)
        np.clip(gates, *_LIMITS[SIGMOID], out=gates)
        activate(SIGMOID, gates, self._square[:b], self._top[:b])

        candidate = self._candidate[:b]
        np.copyto(candidate, products[:, 2 * units : 3 * units])
        np.multiply(candidate, self._scale_n, candidate)
        np.add(candidate, self._bias_n, candidate)
        np.multiply(candidate, gates[:, :units], candidate)
        np.add(candidate, added[:, 2 * units :], candidate)
        np.clip(candidate, *_LIMITS[TANH], out=candidate)
        activate(TANH, candidate, self._square_n[:b], self._top_n[:b])
        return gates, candidate

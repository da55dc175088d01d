"""One step of a GRU layer after its integer product, on numpy and torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from service.engine.arithmetic import TANH_LIMIT, sigmoid_of_double, tanh
from service.engine.integer_product import IntegerProduct
from service.engine.stepper import Float32
from service.model.quantize import QuantizedLinear

MAX_ROWS = 16  # rows whose gates are computed together: their scratch stays in the cache of a core


class Linear:
    """A quantised layer: (B, K) int8 -> (B, N), as integers or as float32 with scale and bias."""

    def __init__(self, linear: QuantizedLinear) -> None:
        self.product = IntegerProduct(linear.weight)
        self.scale, self.bias = linear.scale, linear.bias

    def __call__(self, left: Tensor) -> Float32:
        product: Float32 = self.product(left).to(torch.float32).numpy()
        np.multiply(product, self.scale, product)
        np.add(product, self.bias, product)
        return product


class Gates:
    """What a step does after its product, in scratch memory: contiguous, because strided operands cost numpy double."""

    def __init__(self, units: int) -> None:
        self._units = units
        self._gates, self._square, self._top = (np.empty((MAX_ROWS, 2 * units), np.float32) for _ in range(3))
        self._candidate, self._square_n, self._top_n = (np.empty((MAX_ROWS, units), np.float32) for _ in range(3))
        self._gates_tensor, self._candidate_tensor = torch.from_numpy(self._gates), torch.from_numpy(self._candidate)

    def advance(self, products: Tensor, added: Float32, recurrent: Linear, hidden: Float32) -> None:
        """Turn hidden (b, H) into the new state, from (b, 3H) integer products and what the input adds to the gates.

        r, z = sigmoid(added + scale * product)
        n = tanh(added + r * (scale * product + b_hn))
        h = n + z * (h - n)
        """
        units, b = self._units, len(hidden)
        gates, candidate = self._gates[:b], self._candidate[:b]
        self._gates_tensor[:b].copy_(products[:, : 2 * units])
        np.multiply(gates, recurrent.scale[: 2 * units], gates)
        np.add(gates, added[:, : 2 * units], gates)
        torch.clamp(self._gates_tensor[:b], -TANH_LIMIT, TANH_LIMIT, out=self._gates_tensor[:b])
        sigmoid_of_double(gates, self._square[:b], self._top[:b])
        reset, update = gates[:, :units], gates[:, units:]

        self._candidate_tensor[:b].copy_(products[:, 2 * units :])
        np.multiply(candidate, recurrent.scale[2 * units :], candidate)
        np.add(candidate, recurrent.bias[2 * units :], candidate)
        np.multiply(candidate, reset, candidate)
        np.add(candidate, added[:, 2 * units :], candidate)
        torch.clamp(self._candidate_tensor[:b], -TANH_LIMIT, TANH_LIMIT, out=self._candidate_tensor[:b])
        tanh(candidate, self._square_n[:b], self._top_n[:b])

        np.subtract(hidden, candidate, hidden)
        np.multiply(hidden, update, hidden)
        np.add(hidden, candidate, hidden)

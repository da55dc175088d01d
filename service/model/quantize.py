"""Float weights -> the integers, scales and table that the engine steps with.

Everything here is the same number on every machine. A product of integers is exact in any order of summation, and what
is not a product is done element by element; so equal weights give equal quantised weights, and equal texts after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Float64
from service.model.config import ModelConfig

IntegerPrecision = Literal["int8", "int4"]
Precision = Literal["float32", "int8", "int4"]

MAX_LOSS = 0.003  # nats a character that a serving precision may cost against float32

_LARGEST: dict[IntegerPrecision, int] = {"int8": 127, "int4": 7}
STATE_SCALE = 127  # a GRU's state lies in [-1, 1]: round(127 h) fills int8, without calibration
_CLIPS = np.arange(40, 17, -1) / 40  # where to clip a row, as fractions of its largest weight: 1 ... 0.45
_ROWS = 256  # quantised at a time: bounds the memory

Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class QuantizedLinear:
    """Rows of integers. The product with round(127 x), times `scale`, plus `bias`, approximates W @ x + b.

    weight: (rows, columns) int8, within +-127 (int8) or +-7 (int4); scale, bias: (rows,) float32.
    """

    weight: Int8
    scale: Float32
    bias: Float32


@dataclass(frozen=True)
class QuantizedLayer:
    """One GRU layer. Gates are stacked r, z, n.

    recurrent: (3H, H); its bias is zero but for b_hn, which belongs inside the reset gate.
    inputs: (3H, H), of layers above the first, with all other biases; the first one has the table.
    """

    recurrent: QuantizedLinear
    inputs: QuantizedLinear | None


@dataclass(frozen=True)
class QuantizedGRU:
    """A model as the engine steps it.

    table: (V, 3H) float32, what each character adds to the gates of the first layer: E @ W_ih.T and every bias but
    b_hn. dense: (V, H), int8 always: it is small.
    """

    config: ModelConfig
    precision: IntegerPrecision
    table: Float32
    layers: tuple[QuantizedLayer, ...]
    dense: QuantizedLinear

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every number in it: equal digests step equally."""
        total = hashlib.sha256(self.precision.encode())
        for array in self._arrays():
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def _arrays(self) -> list[NDArray[np.generic]]:
        linears = [linear for layer in self.layers for linear in (layer.recurrent, layer.inputs) if linear is not None]
        return [self.table, *(getattr(linear, f.name) for linear in (*linears, self.dense) for f in fields(linear))]


def enough(losses: Mapping[Precision, float]) -> IntegerPrecision:
    """The smallest precision that costs at most MAX_LOSS, of losses by precision; int8 if none does."""
    fits = losses["int4"] <= losses["float32"] + MAX_LOSS
    return "int4" if fits else "int8"


def quantize(config: ModelConfig, tensors: Mapping[str, Float32], precision: IntegerPrecision) -> QuantizedGRU:
    """A model of these weights (names and shapes as in `config.tensor_shapes()`) in integers."""
    units = config.num_units
    layers = []
    table = np.empty((0, 3 * units), np.float32)
    for index in range(config.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            tensors[f"gru.{name}_l{index}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        bias, recurrent_bias = bias_ih.astype(np.float64), bias_hh.astype(np.float64)
        bias[: 2 * units] += recurrent_bias[: 2 * units]
        recurrent_bias[: 2 * units] = 0
        recurrent = _linear(weight_hh, recurrent_bias, precision)
        if index == 0:
            product = _exact_product(tensors["embedding.weight"], weight_ih)
            table = (product + bias).astype(np.float32)
            layers.append(QuantizedLayer(recurrent, None))
        else:
            layers.append(QuantizedLayer(recurrent, _linear(weight_ih, bias, precision)))
    dense = _linear(tensors["dense.weight"], tensors["dense.bias"].astype(np.float64), "int8")
    return QuantizedGRU(config, precision, table, tuple(layers), dense)


def _linear(weight: Float32, bias: Float64, precision: IntegerPrecision) -> QuantizedLinear:
    integers, scale = quantize_rows(weight, _LARGEST[precision])
    return QuantizedLinear(integers, (scale / STATE_SCALE).astype(np.float32), bias.astype(np.float32))


def quantize_rows(weight: Float32, largest: int) -> tuple[Int8, Float64]:
    """(rows, columns) -> int8 integers within +-largest and (rows,) scales, integers * scale ~ weight.

    The scale of a row clips its largest weights where that makes the sum of squared errors least.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float64)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        integers[rows], scales[rows] = _quantize_block(weight[rows].astype(np.float64), largest)
    return integers, scales


def _quantize_block(weight: Float64, largest: int) -> tuple[Int8, Float64]:
    peaks = np.abs(weight).max(axis=1, keepdims=True)
    peaks[peaks == 0] = 1.0  # a row of zeros: any scale will do
    best_error = np.full((len(weight), 1), np.inf)
    best_scale, best = peaks / largest, np.zeros_like(weight)
    for clip in _CLIPS:
        scale = clip * peaks / largest
        rounded = np.clip(np.rint(weight / scale), -largest, largest)
        error = np.square(weight - rounded * scale).sum(axis=1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        np.copyto(best, rounded, where=better)
    return best.astype(np.int8), best_scale[:, 0]


def _exact_product(left: Float32, right: Float32) -> Float64:
    """Product of left (n, k) and right.T (k, m) in float64, the same on every machine.

    Both are rounded to fixed point with so few bits that every sum of products is an integer below 2**53: exact,
    whatever the order in which a BLAS adds. 22 bits for the usual 256 columns; float32 has 24.
    """
    bits = (53 - (left.shape[1] - 1).bit_length()) // 2
    (left_fixed, left_unit), (right_fixed, right_unit) = _fixed_point(left, bits), _fixed_point(right, bits)
    return np.asarray(left_fixed @ right_fixed.T) * (left_unit * right_unit)


def _fixed_point(values: Float32, bits: int) -> tuple[Float64, float]:
    """Integers of at most `bits` bits, as float64, and the power of two that they are multiples of."""
    _, exponent = np.frexp(np.abs(values).max(initial=0.0))  # the largest is below 2**exponent
    unit = 2.0 ** (int(exponent) - bits)
    limit = 2.0**bits
    return np.clip(np.rint(values.astype(np.float64) / unit), -limit, limit), unit

"""Float weights -> the integers, scales and table that the engine computes with.

Every number is the same on every machine: integer products are exact in any order of summation, and everything else is
elementwise. So equal weights give equal quantised weights, and these give equal texts.
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

IntegerPrecision = Literal["int8", "int4"]  # of the recurrent weights
Precision = Literal["float32", IntegerPrecision]

MAX_ADDED_LOSS = 0.003  # nats per character by which a serving precision may be worse than float32

_LARGEST: dict[IntegerPrecision, int] = {"int8": 127, "int4": 7}
STATE_SCALE = 127  # a GRU's state is in [-1, 1], so round(127 h) uses all of int8 without calibration
_CLIPS = np.arange(40, 17, -1) / 40  # where a row may be clipped, as fractions of its largest weight: 1 ... 0.45
_ROWS = 256  # rows quantised at a time; limits the memory used

Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer in integers: scale * (weight @ round(127 x)) + bias approximates W @ x + b."""

    weight: Int8  # (rows, columns) int8, within +-127 for int8 and +-7 for int4
    scale: Float32  # (rows,) float32
    bias: Float32  # (rows,) float32


@dataclass(frozen=True)
class QuantizedLayer:
    """One GRU layer. Gates are stacked r, z, n."""

    recurrent: QuantizedLinear  # (3H, H); its bias is zero except b_hn, which the reset gate multiplies
    inputs: QuantizedLinear | None  # (3H, H), with all other biases; None in the first layer, which uses the table


@dataclass(frozen=True)
class QuantizedGRU:
    """A model in the form that the engine computes with."""

    config: ModelConfig
    precision: IntegerPrecision  # of the recurrent weights and the inputs of the upper layers
    table: Float32  # (V, 3H) float32 input gates of the first layer: E @ W_ih.T plus all biases except b_hn
    layers: tuple[QuantizedLayer, ...]
    dense: QuantizedLinear  # (V, H); always int8, because it is small

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every number of the model: equal digests give equal states and probabilities."""
        total = hashlib.sha256(self.precision.encode())
        for array in self._arrays():
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def _arrays(self) -> list[NDArray[np.generic]]:
        linears = [linear for layer in self.layers for linear in (layer.recurrent, layer.inputs) if linear is not None]
        return [self.table, *(getattr(linear, f.name) for linear in (*linears, self.dense) for f in fields(linear))]


def choose_precision(losses: Mapping[Precision, float]) -> IntegerPrecision:
    """Return int4 if its loss is at most MAX_ADDED_LOSS above that of float32, else int8.

    `losses` are in nats per character, on the same text.
    """
    is_sufficient = losses["int4"] <= losses["float32"] + MAX_ADDED_LOSS
    return "int4" if is_sufficient else "int8"


def quantize(config: ModelConfig, tensors: Mapping[str, Float32], precision: IntegerPrecision) -> QuantizedGRU:
    """Return the model with these float32 weights, named and shaped as in `config.tensor_shapes()`, in integers."""
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
    """Quantise each row of a (rows, columns) matrix.

    A row's scale may clip its largest weights: of the scales in `_CLIPS`, the one with the smallest sum of squared
    errors is chosen.

    Returns:
        (rows, columns) int8 integers within +-largest and (rows,) float64 scales, so that integers * scale ~ weight.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float64)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        integers[rows], scales[rows] = _quantize_block(weight[rows].astype(np.float64), largest)
    return integers, scales


def _quantize_block(weight: Float64, largest: int) -> tuple[Int8, Float64]:
    peaks = np.abs(weight).max(axis=1, keepdims=True)
    peaks[peaks == 0] = 1.0  # a row of zeros can have any scale
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
    """Return left (n, k) @ right.T (k, m) in float64, the same on every machine.

    Both are first rounded to fixed point, with few enough bits that every sum of products is an integer below 2**53.
    Float64 represents these exactly, so the order in which a BLAS adds doesn't matter. For the usual 256 columns these
    are 22 bits; float32 has 24.
    """
    bits = (53 - (left.shape[1] - 1).bit_length()) // 2
    (left_fixed, left_unit), (right_fixed, right_unit) = _fixed_point(left, bits), _fixed_point(right, bits)
    return np.asarray(left_fixed @ right_fixed.T) * (left_unit * right_unit)


def _fixed_point(values: Float32, bits: int) -> tuple[Float64, float]:
    """Return integers of at most `bits` bits, as float64, and the unit, a power of two: integers * unit ~ values."""
    _, exponent = np.frexp(np.abs(values).max(initial=0.0))  # the largest absolute value is below 2**exponent
    unit = 2.0 ** (int(exponent) - bits)
    limit = 2.0**bits
    return np.clip(np.rint(values.astype(np.float64) / unit), -limit, limit), unit

"""The stepper in C++, from Python's side: models go in once, rows at every call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int8, c_void_p

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32
from service.engine.gates import gate_scales
from service.engine.native.binding import Layer, Linear, Model, check, load, variants
from service.engine.native.rows import Rows
from service.engine.stepper import Row, StepResult
from service.model.quantize import QuantizedGRU

_BITS = {"int8": 8, "int4": 4}


class NativeStepper:
    """Implements `Stepper` for a quantised model.

    num_threads: threads that compute together, the caller's among them; the others are started at the first call and
    end with the stepper. variant: one of `variants()`; None: the best. always_together: threads share every step of a
    few rows, even while one of them would be faster alone; for tests and measurements.
    """

    def __init__(
        self,
        model: QuantizedGRU,
        num_threads: int = 1,
        variant: str | None = None,
        always_together: bool = False,
    ) -> None:
        self.config = model.config
        library, there = load(), variants()
        if library is None or not there:
            raise RuntimeError("the kernel was not compiled when this package was installed")
        self.variant = variant or there[0]
        self._library = library
        self._kernel = _create(library, model, self.variant, num_threads, always_together)
        weakref.finalize(self, library.gru_destroy, self._kernel)

    def initial_hidden(self) -> Float32:
        """See Stepper."""
        return np.zeros((self.config.num_layers, self.config.num_units), np.float32)

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        """See Stepper."""
        taken = Rows(rows, num_chars, (self.config.num_layers, self.config.num_units), self.config.vocab_size)
        if taken.active:
            check(self._library.gru_advance(self._kernel, taken.records.ctypes.data, len(taken.active)))
        return taken.hand_back()

    def recurrent_products(self, states: NDArray[np.int8], layer: int = 0, repeats: int = 1) -> NDArray[np.int32]:
        """(B, H) rounded states, within +-127 -> (B, 3H), what the recurrent weights make of them: for measurements."""
        num_rows, units = states.shape
        if units != self.config.num_units or states.dtype != np.int8:
            raise ValueError("states have to be (B, H) int8")
        states, out = np.ascontiguousarray(states), np.empty((num_rows, 3 * units), np.int32)
        products = self._library.gru_recurrent_products
        check(products(self._kernel, layer, states.ctypes.data, num_rows, repeats, out.ctypes.data))
        return out


def _create(
    library: ctypes.CDLL, model: QuantizedGRU, variant: str, num_threads: int, always_together: bool
) -> c_void_p:
    """A kernel that holds a packed copy of the model."""
    units = model.config.num_units
    scales = gate_scales(units)
    arrays: list[NDArray[np.generic]] = []  # alive until they were packed

    def address(array: NDArray[np.generic], shape: tuple[int, ...], dtype: type[np.generic], kind: type) -> object:
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"expected {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}")
        arrays.append(np.ascontiguousarray(array))
        return ctypes.cast(arrays[-1].ctypes.data, POINTER(kind))

    def floats(array: Float32, *shape: int) -> object:
        return address(array, shape, np.float32, c_float)

    def weight(array: NDArray[np.int8], rows: int) -> object:
        return address(array, (rows, units), np.int8, c_int8)

    layers = (Layer * len(model.layers))()
    for layer, packed in zip(model.layers, layers, strict=True):
        linear = layer.recurrent
        bias_n = linear.bias[2 * units :] * scales[2 * units :]
        packed.recurrent = Linear(
            weight(linear.weight, 3 * units), floats(linear.scale * scales, 3 * units), floats(bias_n, units)
        )
        if layer.inputs is not None:
            linear = layer.inputs
            packed.inputs = Linear(
                weight(linear.weight, 3 * units),
                floats(linear.scale * scales, 3 * units),
                floats(linear.bias * scales, 3 * units),
            )
    vocab, dense = model.config.vocab_size, model.dense
    table = floats(model.table * scales, vocab, 3 * units)
    dense_linear = Linear(weight(dense.weight, vocab), floats(dense.scale, vocab), floats(dense.bias, vocab))
    description = Model(vocab, units, len(model.layers), _BITS[model.precision], table, layers, dense_linear)
    kernel = c_void_p()
    about = ctypes.byref(description)
    check(library.gru_create(about, variant.encode(), num_threads, always_together, ctypes.byref(kernel)))
    return kernel

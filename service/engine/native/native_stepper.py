"""The stepper in C++, seen from Python: a model is passed once, rows with every call."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from ctypes import c_void_p
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32
from service.engine.gates import gate_scales
from service.engine.native.binding import Library, check, load, supported_variants
from service.engine.native.packed_reading import PackedReading
from service.engine.native.rows import PackedBatch, PackedRow, address_of
from service.engine.native.self_check import EXPECTED, EXPECTED_WITH_AUTOMATON, digest_of
from service.engine.short_text import ReadText, ShortText
from service.engine.stepper import Batch, InvalidRows, Row, Steps
from service.model.quantize import QuantizedGRU

log = logging.getLogger(__name__)

_BITS = {"int8": 8, "int4": 4}
# The engine's ticks have fewer characters. For longer calls, the length of the rows limits the memory for characters.
_MANY_CHARS = 256


@cache
def variants() -> tuple[str, ...]:
    """Return the variants of the kernel that this processor can run and that compute what they must, best first.

    Checking them takes a few milliseconds, at the first call. A variant that fails is logged.
    """
    checked = []
    for name in supported_variants():
        make_stepper = partial(NativeStepper, variant=name)
        digests = digest_of(make_stepper), digest_of(make_stepper, with_automaton=True)
        if digests == (EXPECTED, EXPECTED_WITH_AUTOMATON):
            checked.append(name)
        else:
            log.error(
                "the variant %s of the native kernel is not used, because it computes other numbers than it must: "
                "install the package again without flags such as -ffast-math",
                name,
            )
    return tuple(checked)


def _best() -> str:
    available = variants()
    if not available:
        raise RuntimeError("no variant of the native kernel computes what it must: the log has their names")
    return available[0]


class NativeStepper:
    """Implements `Stepper` for a quantised model.

    Args:
        num_threads: threads that compute, the caller's included. The others start with the first call and end with the
            stepper.
        variant: one of `variants()`, or None for the best.
        always_together: make all threads share every step of a few rows, even while one thread would be faster. For
            tests and measurements.
    """

    def __init__(
        self,
        model: QuantizedGRU,
        num_threads: int = 1,
        variant: str | None = None,
        always_together: bool = False,
    ) -> None:
        self.config = model.config
        library = load()
        if library is None:
            raise RuntimeError("the native kernel was not compiled for this version of the package")
        self.variant = variant if variant is not None else _best()
        self._library = library
        self._sums: Any = library.make_stepped()  # over all rows of the last call
        self._sums_address = ctypes.addressof(self._sums)
        self._kernel = _create(library, model, self.variant, num_threads, always_together)
        weakref.finalize(self, library.functions.gru_destroy, self._kernel)

    def initial_hidden(self) -> Float32:
        """See Stepper."""
        return np.zeros((self.config.num_layers, self.config.num_units), np.float32)

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        """See Stepper."""
        batch = rows if isinstance(rows, Batch) else Batch(rows)
        packed: PackedBatch = batch.packed or self._packed(batch)
        if num_chars > _MANY_CHARS:
            longest = max([len(row.request.prompt) + row.request.max_chars for row in batch], default=0)
            num_chars = min(num_chars, longest)
        special = packed.begin(batch, num_chars)
        drawn, sums = np.empty((len(batch), num_chars), np.int64), self._sums
        outputs = address_of(drawn), packed.stepped_address, self._sums_address
        check(self._library.functions.gru_advance(self._kernel, packed.address, len(batch), num_chars, *outputs))
        num_drawn = sums.num_drawn
        steps = Steps(
            drawn,
            None if 0 < num_drawn == drawn.size else packed.stepped["num_drawn"].copy(),
            packed.stepped["num_withheld"].copy() if sums.num_withheld else None,
            {},
            [],
            sums.num_read,
            num_drawn,
        )
        if sums.is_finished:
            finished: list[int] = np.flatnonzero(packed.stepped["is_finished"]).tolist()
            steps.finished = [i for i in finished if batch[i].finished is None]
            for i in steps.finished:
                packed.rows[i].finish(batch[i], has_stopped=bool(packed.stepped["has_stopped"][i]))
        if special:
            steps.results = packed.store(batch, special, drawn)
        return steps

    def read(self, texts: Sequence[ShortText]) -> list[ReadText]:
        """See ShortTextReader."""
        library, reading = self._library, PackedReading(texts, self.config, self._library.make_row)
        make_stepped: Any = library.make_stepped
        stepped = np.empty(len(texts), make_stepped.dtype)
        outputs = reading.drawn.ctypes.data, stepped.ctypes.data, self._sums_address
        check(
            library.functions.gru_advance(self._kernel, reading.address, len(texts), reading.drawn.shape[1], *outputs)
        )
        return reading.results()

    def _packed(self, batch: Batch) -> PackedBatch:
        try:
            packed: list[PackedRow] = [row.packed or self._pack(row) for row in batch]
        except Exception as error:  # nothing has been computed yet
            if invalid := InvalidRows.among(batch, self._pack):
                raise invalid from error
            raise
        batch.packed = result = PackedBatch(batch, packed, self._library.make_stepped)
        return result

    def _pack(self, row: Row) -> PackedRow:
        record: Any = self._library.make_row()
        row.packed = packed = PackedRow(row, self.config, record)
        row.progress = record
        return packed

    def recurrent_products(self, states: NDArray[np.int8], layer: int = 0, repeats: int = 1) -> NDArray[np.int32]:
        """Multiply (B, H) int8 states within +-127 with the recurrent weights of a layer, for measurements.

        Returns (B, 3H) int32. The same product is computed `repeats` times.
        """
        num_rows, units = states.shape
        if units != self.config.num_units or states.dtype != np.int8:
            raise ValueError(f"states must be (B, {self.config.num_units}) int8")
        states, out = np.ascontiguousarray(states), np.empty((num_rows, 3 * units), np.int32)
        products = self._library.functions.gru_recurrent_products
        check(products(self._kernel, layer, states.ctypes.data, num_rows, repeats, out.ctypes.data))
        return out


def _create(library: Library, model: QuantizedGRU, variant: str, num_threads: int, always_together: bool) -> c_void_p:
    """Return a kernel that holds a packed copy of the model."""
    units = model.config.num_units
    scales = gate_scales(units)
    arrays: list[NDArray[np.generic]] = []  # keeps copies alive until the kernel has packed them

    def address(array: NDArray[np.generic], shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> int:
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"expected {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}")
        arrays.append(np.ascontiguousarray(array))
        return arrays[-1].ctypes.data

    layers = np.zeros(len(model.layers), library.layer)
    for layer, recurrent, inputs in zip(model.layers, layers["recurrent"], layers["inputs"], strict=True):
        linear = layer.recurrent
        recurrent["weight"] = address(linear.weight, (3 * units, units), np.int8)
        recurrent["scale"] = address(linear.scale * scales, (3 * units,))
        recurrent["bias"] = address(linear.bias[2 * units :] * scales[2 * units :], (units,))
        if layer.inputs is not None:
            linear = layer.inputs
            inputs["weight"] = address(linear.weight, (3 * units, units), np.int8)
            inputs["scale"] = address(linear.scale * scales, (3 * units,))
            inputs["bias"] = address(linear.bias * scales, (3 * units,))
    vocab, dense = model.config.vocab_size, model.dense
    record = np.zeros(1, library.model)
    record["vocab"], record["units"], record["num_layers"] = vocab, units, len(layers)
    record["bits"], record["layers"] = _BITS[model.precision], layers.ctypes.data
    record["table"] = address(model.table * scales, (vocab, 3 * units))
    record["dense"]["weight"] = address(dense.weight, (vocab, units), np.int8)
    record["dense"]["scale"], record["dense"]["bias"] = address(dense.scale, (vocab,)), address(dense.bias, (vocab,))
    kernel = c_void_p()
    create = library.functions.gru_create
    check(create(record.ctypes.data, variant.encode(), num_threads, always_together, ctypes.byref(kernel)))
    return kernel

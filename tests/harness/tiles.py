"""The variant that computes tiles in plain C++, for processors without AMX, and cases for any variant.

`python -m tests.harness.tiles LIBRARY VARIANT` runs some cases with another compiled kernel. It fails, and names those
that differ, if there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from service.engine.native import native_stepper
from service.engine.native.binding import open_library
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.model.quantize import QuantizedGRU
from tests.harness.models import tiny_config
from tests.harness.rows import CHARSET, outcome, quantized, row

REFERENCE = "amx_int8_reference"
# What the contract of steppers is tested with: what the kernel offers, and the reference of the tiles, if there is one.
TESTED_VARIANTS = (*variants(), *([REFERENCE] if variants() else []))

# With fewer than 8 rows, vectors compute; a block has two tiles of 16 rows; a thread advances up to 128.
_NUMBERS = (7, 8, 16, 17, 31, 32, 33, 47, 63, 130)


def cases(variant: str, numbers: Sequence[int] = _NUMBERS) -> Iterator[tuple[str, bool]]:
    """Yield what was computed, and whether the variant computed the bits of the portable one.

    The rows of a call have different lengths, so that rows in the middle of a block end first.

    Args:
        variant: A name.
        numbers: Of rows in a call.
    """
    models: dict[str, QuantizedGRU] = {
        "130 units, 8 bits": quantized(tiny_config(num_units=130)),
        "64 units, 4 bits": quantized(tiny_config(num_units=64), "int4"),
        "3 layers of 77 units, 4 bits": quantized(tiny_config(num_units=77, num_layers=3), "int4"),
        "2 layers of 200 units, 8 bits": quantized(tiny_config(num_units=200, num_layers=2)),
    }
    for name, model in models.items():
        reference = NativeStepper(model, variant="portable")
        for number in numbers:
            expected = outcome(reference, _rows(reference, number))
            for num_threads, num_chars in ((1, 1000), (2, 3), (3, 1000)):
                stepper = NativeStepper(model, num_threads, variant, always_together=True)
                what = f"{name}, {number} rows, {num_threads} threads"
                yield what, outcome(stepper, _rows(stepper, number), num_chars) == expected


def _rows(stepper: NativeStepper, number: int) -> list[Any]:
    rows = []
    for index in range(number):
        sampling = (PLAIN, SamplingSettings(temperature=0.7, top_k=5), SamplingSettings(presence_penalty=0.5))[
            index % 3
        ]
        kind: dict[str, Any] = {"prompt": CHARSET.decode(np.arange(index % 5)), "max_chars": 3 + index % 4}
        one = row(stepper, seed=index, sampling=sampling, num_logprobs=2 if index % 7 == 0 else None, **kind)
        one.hidden[:] = np.random.default_rng(index).uniform(-1, 1, one.hidden.shape)
        rows.append(one)
    return rows


if __name__ == "__main__":
    library = open_library(sys.argv[1])
    native_stepper.load = lambda: library  # type: ignore[attr-defined, assignment]
    different = [what for what, is_equal in cases(sys.argv[2], (7, 33)) if not is_equal]
    sys.exit("\n".join(different) or 0)

"""The speed of the kernel over numbers of rows (texts side by side) and of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.candidates import Candidate, compare, stepper_turn
from service.engine.native.native_stepper import NativeStepper
from service.model.config import ModelConfig
from service.model.quantize import IntegerPrecision, QuantizedGRU, QuantizedLayer, QuantizedLinear

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_UNITS = (256, 512, 1024, 1536, 2048)


@dataclass(frozen=True)
class Point:
    """The speed of the kernel at one size."""

    over: str  # which number is varied: "rows" or "units"
    precision: str
    units: int
    rows: int
    threads: int
    chars_per_s: float  # of all rows together, median of the rounds


def sweep(
    models: dict[IntegerPrecision, QuantizedGRU], threads: Sequence[int], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure all points, print a line for each, and return them for JSON."""
    points: list[Point] = []
    for precision, model in models.items():
        for number in threads:
            stepper = NativeStepper(model, number)
            by_rows = [Candidate("rows", rows, number, stepper_turn(stepper, rows, number)) for rows in _ROWS]
            units = model.config.num_units
            points += [
                Point("rows", precision, units, m.rows, number, m.rate) for m in compare(by_rows, rounds, seconds / 2)
            ]
            for units in _UNITS:
                other = NativeStepper(random_model(units, precision), number)
                by_units = [Candidate("units", rows, number, stepper_turn(other, rows, number)) for rows in (1, 256)]
                points += [
                    Point("units", precision, units, m.rows, number, m.rate)
                    for m in compare(by_units, rounds, seconds / 2)
                ]
    for point in points:
        size = f"{point.precision}, {point.units} units, {point.threads} threads, {point.rows} rows"
        print(f"{size:<44}{point.chars_per_s:>12,.0f}")
    return [asdict(point) for point in points]


def random_model(units: int, precision: IntegerPrecision) -> QuantizedGRU:
    """Return a model of random integers with a charset of 65 characters. Its texts are nonsense, its speed is right."""
    rng = np.random.default_rng(units)
    charset = "".join(chr(code) for code in range(0x100, 0x100 + 65))
    config = ModelConfig(charset=charset, embedding_dim=256, num_units=units, num_layers=1)
    largest_weight = {"int8": 127, "int4": 7}[precision]

    def linear(rows: int, largest: int) -> QuantizedLinear:
        weight = rng.integers(-largest, largest + 1, (rows, units)).astype(np.int8)
        scale = np.full(rows, 1 / (127 * largest * units**0.5), np.float32)
        return QuantizedLinear(weight, scale, np.zeros(rows, np.float32))

    table = rng.normal(0, 1, (len(charset), 3 * units)).astype(np.float32)
    layer = QuantizedLayer(linear(3 * units, largest_weight), None)
    return QuantizedGRU(config, precision, table, (layer,), linear(len(charset), 127))


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw characters/s over rows, and over units for 1 and 256 rows, to a PNG or SVG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for over, axis, x in (("rows", left, "rows"), ("units", right, "units")):
        varied = [point for point in points if point["over"] == over]
        lines = sorted({(p["precision"], p["threads"], p["rows"] if over == "units" else 0) for p in varied})
        for precision, threads, rows in lines:
            line = [
                p for p in varied if (p["precision"], p["threads"]) == (precision, threads) and rows in (0, p["rows"])
            ]
            label = f"{precision}, {threads} thread{'s' * (threads > 1)}" + (f", {rows} rows" if rows else "")
            axis.plot([p[x] for p in line], [p["chars_per_s"] for p in line], marker=".", label=label)
        axis.set(xscale="log", yscale="log", xlabel={"rows": "texts side by side"}.get(x, x), ylabel="characters/s")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

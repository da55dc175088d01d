"""Compares the torch stepper with forty lines of torch that have the same weights, in characters/s.

    python -m benchmarks.decode [--json FILE] [--threads 2] [--rounds 7] [--rows 1,64,256]

Both draw from the unmodified distribution of the model. The stepper is called as the engine calls it, for a few
milliseconds of steps at a time. Both run with one thread and with --threads, and ratios are to the faster of the two
baselines. The number of threads is set before each turn, because torch has a single one for the whole process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.candidates import Measured, Shipped, best_baseline, compare
from benchmarks.table import machine, rows_of_json, spread, summary, table


@dataclass(frozen=True)
class Target:
    """A ratio of speeds that the stepper should reach."""

    rows: int
    at_least: float
    to_itself: bool = False  # compares with the stepper's speed for a single text, not with the baseline's

    def ratios(self, measured: Sequence[Measured], stepper: str) -> dict[int, list[float]]:
        """Return the ratios of the rounds by number of threads, for all numbers for which both sides were measured."""
        batched = {m.threads: m for m in measured if m.what == stepper and m.rows == self.rows}
        if not self.to_itself:
            return {threads: result.ratios(best_baseline(measured, self.rows)) for threads, result in batched.items()}
        single = {m.threads: m for m in measured if m.what == stepper and m.rows == 1}
        return {threads: result.ratios(single[threads]) for threads, result in batched.items() if threads in single}

    def __str__(self) -> str:
        other = "its own single text" if self.to_itself else "the forty lines"
        return f"{self.rows} row{'s' * (self.rows > 1)} >= {self.at_least:g} x {other}"


TARGETS = (Target(1, 8), Target(64, 3), Target(64, 4, to_itself=True))


def main() -> None:
    """Measure, and print a table and the ratios beside their targets."""
    parser = argparse.ArgumentParser(
        description="Compare the torch stepper with forty lines of torch, in characters/s."
    )
    parser.add_argument("--rows", type=numbers, default="1,64,256", help="numbers of texts side by side  [1,64,256]")
    parser.add_argument("--precision", choices=["int8", "int4"], help="of the stepper  [that of the served model]")
    options = parse(parser)
    shipped = Shipped.load(options.model, options.model_store, options.precision)
    threads = sorted({1, options.threads})
    conditions = machine() | {"threads": options.threads, "model": shipped.ref, "precision": shipped.precision}
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    measured = compare(shipped.candidates(options.rows, threads), options.rounds, options.seconds)
    print(table(measured))
    targets: list[dict[str, Any]] = []
    for target in TARGETS:
        for number, ratios in target.ratios(measured, shipped.stepper_name).items():
            print(f"target {target}: {spread(ratios)} with {number} thread{'s' * (number > 1)}")
            facts = {"target": str(target), "at_least": target.at_least, "threads": number, "ratio": summary(ratios)}
            targets.append(facts)
    if options.json:
        document = {"machine": conditions, "measured": rows_of_json(measured), "targets": targets}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options that this benchmark and the roofline share, and parse the command line."""
    parser.add_argument("--threads", type=positive, default=2, help="threads; runs with one thread are added  [2]")
    parser.add_argument("--rounds", type=positive, default=7, help="number of rounds  [7]")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of each turn  [0.5]")
    parser.add_argument("--model", default="shakespeare", help="model to generate with  [shakespeare]")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="[model_store]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse an option: an integer above 0."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def numbers(text: str) -> list[int]:
    """Parse an option: integers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

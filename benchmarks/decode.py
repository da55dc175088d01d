"""Generating: the torch stepper against forty lines of torch with the same weights, in characters/s.

    python -m benchmarks.decode [--json FILE] [--threads 2] [--rounds 7] [--rows 1,64,256]

Both draw from the model's distribution as it is. The stepper is called as the engine calls it: a few milliseconds of
steps at a time. Each is run with one thread and with --threads; its baseline is the better of the two. `torch` has one
number of threads for a process, so it is set before each turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import Measured, Shipped, best_baseline, compete
from benchmarks.table import machine, rows_of_json, spread, summary, table


@dataclass(frozen=True)
class Target:
    """A ratio to reach: the stepper with `rows` to the baseline with as many, or to itself with one."""

    rows: int
    at_least: float
    to_itself: bool = False

    def ratios(self, measured: Sequence[Measured], stepper: str) -> dict[int, list[float]]:
        """By number of threads; empty where what it takes was not measured."""
        mine = {m.threads: m for m in measured if m.what == stepper and m.rows == self.rows}
        if not self.to_itself:
            return {threads: one.ratios(best_baseline(measured, self.rows)) for threads, one in mine.items()}
        single = {m.threads: m for m in measured if m.what == stepper and m.rows == 1}
        return {threads: one.ratios(single[threads]) for threads, one in mine.items() if threads in single}

    def __str__(self) -> str:
        other = "its own single text" if self.to_itself else "the forty lines"
        return f"{self.rows} row{'s' * (self.rows > 1)} >= {self.at_least:g} x {other}"


TARGETS = (Target(1, 8), Target(64, 3), Target(64, 4, to_itself=True))


def main() -> None:
    """Print the table and how the targets are met."""
    options = parse(argparse.ArgumentParser(description="characters/s of generating against forty lines of torch"))
    shipped = Shipped.load(options.model, options.model_store, options.precision)
    threads = sorted({1, options.threads})
    about = machine() | {"threads": options.threads, "model": shipped.ref, "precision": shipped.precision}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    measured = compete(shipped.contestants(options.rows, threads), options.rounds, options.seconds)
    print(table(measured))
    targets: list[dict[str, Any]] = []
    for target in TARGETS:
        for number, ratios in target.ratios(measured, shipped.stepper_name).items():
            print(f"target {target}: {spread(ratios)} with {number} thread{'s' * (number > 1)}")
            facts = {"target": str(target), "at_least": target.at_least, "threads": number, "ratio": summary(ratios)}
            targets.append(facts)
    if options.json:
        document = {"machine": about, "measured": rows_of_json(measured), "targets": targets}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def parse(parser: argparse.ArgumentParser, rows: str = "1,64,256", rounds: int = 7) -> argparse.Namespace:
    """The options that this and the comparison with other libraries share."""
    parser.add_argument("--rows", type=numbers, default=rows, help=f"texts side by side  [{rows}]")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn  [0.5]")
    parser.add_argument("--precision", choices=["int8", "int4"], help="of the stepper  [the model's own]")
    parser.add_argument("--model", default="shakespeare")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


def positive(text: str) -> int:
    """An option's integer above 0."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def numbers(text: str) -> list[int]:
    """An option's integers above 0, separated by commas."""
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

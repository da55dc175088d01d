"""Compares the kernel with what the machine allows, with torch, and with other libraries, in characters/s.

    python -m benchmarks.roofline [--json FILE] [--threads 2] [--rounds 7] [--peers ""] [--sweep] [--plot FILE]

The speed of one text is limited by the time to read the recurrent weights, that of 256 texts by multiply-adds. "Product
alone" runs only the recurrent products and counts each as a character, so that it can be compared. "Peak" is as many
multiply-adds, on registers alone, with one of the instructions that the processor has (`peak.cpp`). The kernel computes
with its best variant; the others are measured on one thread. All candidates run in turns with the weights of the
shipped model.

TensorFlow (with the loop of its tutorial) and ONNX Runtime run in processes of their own. The first run creates their
environments, `peers/.venv-<name>`, of 2.3 GB together. A library that can't be installed is skipped.

--sweep also measures the kernel over numbers of texts and of units; --plot draws that and needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.candidates import (
    BASELINE,
    Candidate,
    Measured,
    Shipped,
    baseline_turn,
    compare,
    stepper_turn,
)
from benchmarks.decode import parse
from benchmarks.peaks import INSTRUCTIONS, Peaks, share_of
from benchmarks.peers.comparison import PEERS, peer_candidates
from benchmarks.peers.environment import Skipped
from benchmarks.sweep import plot, sweep
from benchmarks.table import machine, rows_of_json, spread, summary, table
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.torch_stepper import TorchStepper
from service.model.quantize import IntegerPrecision, QuantizedGRU, quantize

MANY = 256
KERNEL, OTHER, PEAK = "kernel, {}", "kernel {}, {}", "peak of {}"
PRODUCT, INT_MM, TORCH = "product alone, {}", "torch._int_mm alone", "torch stepper, int8"
PRECISIONS: tuple[IntegerPrecision, ...] = ("int8", "int4")


def main() -> None:
    """Measure, and print a table and the ratios beside their targets."""
    options = _options()
    shipped = Shipped.load(options.model, options.model_store, "int8")
    models = {p: quantize(shipped.artifact.config, shipped.artifact.tensors, p) for p in PRECISIONS}
    kernel = NativeStepper(models["int8"]).variant
    conditions = machine() | {"threads": options.threads, "model": shipped.ref, "kernel": kernel}
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    with ExitStack() as stack:
        compared, instructions, skipped = _everything(stack, shipped, models, options)
        try:
            measured = compare(compared, options.rounds, options.seconds)
        except Skipped as reason:
            raise SystemExit(f"the process of a library has ended; leave it out with --peers: {reason}") from reason
    print(table(measured))
    names = {m.what for m in measured}
    wanted = [target for target in _targets(options.threads, instructions) if target.against in names]
    targets = [_report(measured, target) for target in wanted]
    document: dict[str, Any] = {"machine": conditions, "measured": rows_of_json(measured), "targets": targets}
    document["variants"] = _against_peaks(measured, instructions)
    document |= {"skipped": skipped, "peers": _against_peers(measured)}
    if options.sweep or options.plot:
        document["sweep"] = points = sweep(
            models, sorted({1, options.threads}), min(options.rounds, 3), options.seconds
        )
        if options.plot:
            plot(points, options.plot)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the kernel with what the machine allows and with other libraries, in characters/s."
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure the kernel over numbers of texts and of units"
    )
    parser.add_argument(
        "--peers",
        type=_names,
        default=",".join(PEERS),
        help=f"libraries to compare with; may be empty  [{','.join(PEERS)}]",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="measure the sweep and draw it as PNG or SVG")
    return parse(parser)


def _everything(
    stack: ExitStack, shipped: Shipped, models: dict[IntegerPrecision, QuantizedGRU], options: argparse.Namespace
) -> tuple[list[Candidate], list[str], dict[str, str]]:
    """Return all candidates, the instructions whose peaks are among them, and why others are left out, by their name.

    stack: ends the processes of libraries.
    """
    threads = sorted({1, options.threads})
    compared, skipped = candidates(shipped, models, threads), dict[str, str]()
    compared += other_variants(models)
    instructions: list[str] = []
    try:
        peaks = Peaks(Path(stack.enter_context(TemporaryDirectory())))
        compared += peak_candidates(peaks, models["int8"])
        instructions = peaks.instructions
    except Skipped as reason:
        skipped["peak"] = str(reason)
        print(f"the processor's peak is skipped: {reason}")
    for name in options.peers:
        try:
            compared += peer_candidates(stack, name, shipped, (1, MANY), threads)
        except Skipped as reason:
            skipped[name] = str(reason)
            print(f"{name} is skipped: {reason}")
    return compared, instructions, skipped


def candidates(
    shipped: Shipped, models: dict[IntegerPrecision, QuantizedGRU], threads: Sequence[int]
) -> list[Candidate]:
    """Return all candidates except other libraries, each with one text and with 256."""
    compared = []
    reference, forty_lines = TorchStepper(models["int8"]), shipped.forty_lines()
    for rows in (1, MANY):
        for precision, model in models.items():
            for number in threads:
                stepper = NativeStepper(model, number)
                if number == 1:
                    what = PRODUCT.format(precision)
                    compared.append(Candidate(what, rows, 1, product_turn(stepper, model.config.num_units, rows)))
                compared.append(Candidate(KERNEL.format(precision), rows, number, stepper_turn(stepper, rows, number)))
        for number in threads:
            compared.append(Candidate(INT_MM, rows, number, int_mm_turn(models["int8"], rows, number)))
            compared.append(Candidate(TORCH, rows, number, stepper_turn(reference, rows, number)))
            compared.append(Candidate(BASELINE, rows, number, baseline_turn(forty_lines, rows, number)))
    return compared


def other_variants(models: dict[IntegerPrecision, QuantizedGRU]) -> list[Candidate]:
    """Return the variants of the kernel that this processor can run, without the best, on one thread."""
    return [
        Candidate(
            OTHER.format(variant, precision), rows, 1, stepper_turn(NativeStepper(model, 1, variant), rows, threads=1)
        )
        for variant in variants()[1:]
        for precision, model in models.items()
        for rows in (1, MANY)
    ]


def peak_candidates(peaks: Peaks, model: QuantizedGRU) -> list[Candidate]:
    """Return what each instruction of the processor multiplies, a character's recurrent products counted as one."""
    products = sum(layer.recurrent.weight.size for layer in model.layers)
    return [Candidate(PEAK.format(name), MANY, 1, peaks.turn(name, products)) for name in peaks.instructions]


def product_turn(stepper: NativeStepper, units: int, rows: int) -> Callable[[float], float]:
    """Return a turn that computes only the kernel's recurrent products."""
    states = np.random.default_rng(0).integers(-127, 128, (rows, units)).astype(np.int8)
    repeats = max(1, 256 // rows)
    return _repeat(lambda: stepper.recurrent_products(states, repeats=repeats), rows * repeats)


def int_mm_turn(model: QuantizedGRU, rows: int, threads: int) -> Callable[[float], float]:
    """Return a turn that computes the product of the same integers with torch, in the faster memory layout."""
    weight = torch.from_numpy(model.layers[0].recurrent.weight)
    right = weight.t() if rows == 1 else weight.t().contiguous()
    states = torch.randint(-127, 128, (rows, model.config.num_units), dtype=torch.int8)
    out = torch.empty(rows, len(weight), dtype=torch.int32)

    def multiply() -> None:
        torch._int_mm(states, right, out=out)

    repeated = _repeat(multiply, rows)

    def turn(seconds: float) -> float:
        torch.set_num_threads(threads)
        return repeated(seconds)

    return turn


def _repeat(call: Callable[[], object], chars: int) -> Callable[[float], float]:
    """Return a turn that repeats a call which counts as `chars` characters."""

    def turn(seconds: float) -> float:
        num_chars, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            call()
            num_chars += chars
        return num_chars / elapsed

    return turn


@dataclass(frozen=True)
class Target:
    """A ratio of speeds that a candidate should reach against another one with the same number of rows."""

    what: str
    rows: int
    threads: int
    against: str
    against_threads: int | None  # None compares with the faster number of threads
    at_least: float

    def __str__(self) -> str:
        number = f"{self.rows} row{'s' * (self.rows > 1)}, {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.what}, {number} >= {self.at_least:.2f} x {self.against}"


def _targets(threads: int, instructions: Sequence[str]) -> list[Target]:
    product = PRODUCT.format("int8")
    return [
        *(Target("kernel, int8", MANY, 1, PEAK.format(best), 1, share_of(best)) for best in instructions[:1]),
        Target("kernel, int8", 1, 1, product, 1, 1 / 1.2),
        Target("kernel, int8", 1, 1, BASELINE, None, 40),
        Target("kernel, int4", 1, 1, product, 1, 1 / 0.85),
        Target("kernel, int4", 1, 1, BASELINE, None, 55),
        Target("kernel, int4", 1, threads, BASELINE, None, 85),
        Target("kernel, int4", 1, threads, "onnxruntime", threads, 8),
        Target("kernel, int8", MANY, threads, INT_MM, threads, 0.6),
        Target("kernel, int4", MANY, threads, INT_MM, threads, 0.6),
        Target("kernel, int8", MANY, threads, TORCH, None, 1.5),
        Target("kernel, int8", MANY, threads, BASELINE, None, 4),
    ]


def _report(measured: Sequence[Measured], target: Target) -> dict[str, Any]:
    """Print the ratio that was measured for a target, and return it for JSON."""
    candidate = next(m for m in measured if (m.what, m.rows, m.threads) == (target.what, target.rows, target.threads))
    others = [
        m
        for m in measured
        if (m.what, m.rows) == (target.against, target.rows) and target.against_threads in (None, m.threads)
    ]
    ratios = candidate.ratios(max(others, key=lambda m: m.rate))
    print(f"target {target}: {spread(ratios)}")
    return {"target": str(target), "at_least": target.at_least, "ratio": summary(ratios)}


def _against_peaks(measured: Sequence[Measured], instructions: Sequence[str]) -> list[dict[str, Any]]:
    """Print the share of its instruction's peak, and of the processor's, that each variant reaches with many texts.

    Return the same for JSON.
    """
    by_name = {(m.what, m.rows): m for m in measured if m.threads == 1}
    comparisons = []
    for variant in variants():
        for precision in PRECISIONS:
            what = KERNEL.format(precision) if variant == variants()[0] else OTHER.format(variant, precision)
            kernel = by_name[what, MANY]
            for instruction in dict.fromkeys((INSTRUCTIONS.get(variant, ""), *instructions[:1])):
                if instruction in instructions:
                    ratios = kernel.ratios(by_name[PEAK.format(instruction), MANY])
                    print(
                        f"{variant}, {precision}, {MANY} rows, 1 thread: {spread(ratios)} of the peak of {instruction}"
                    )
                    facts = {"variant": variant, "precision": precision, "rows": MANY, "instruction": instruction}
                    comparisons.append(facts | {"ratio": summary(ratios)})
    return comparisons


def _against_peers(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Print how many times as fast as each library the kernel is, both with their faster number of threads.

    Return the same for JSON.
    """

    def best(what: str, rows: int) -> Measured:
        return max((m for m in measured if (m.what, m.rows) == (what, rows)), key=lambda m: m.rate)

    comparisons = []
    for peer, rows in sorted({(m.what, m.rows) for m in measured if m.what in PEERS}):
        for kernel in (best(KERNEL.format(precision), rows) for precision in PRECISIONS):
            ratios = kernel.ratios(best(peer, rows))
            print(f"{kernel.what}, {rows} row{'s' * (rows > 1)}: {spread(ratios)} times as fast as {peer}")
            comparisons.append({"peer": peer, "rows": rows, "what": kernel.what, "ratio": summary(ratios)})
    return comparisons


def _names(text: str) -> list[str]:
    """Parse an option: names of libraries, separated by commas."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    main()

"""The kernel against what the machine allows, torch, the forty lines, and other libraries. Characters/s.

    python -m benchmarks.roofline [--json FILE] [--threads 2] [--rounds 7] [--peers ""] [--sweep] [--plot FILE]

One text is limited by the time to read the recurrent weights, 256 texts by multiply-adds. Products alone are counted as
if each were a character, so that all can be compared. Everything runs in turns, with the shipped model's weights.
TensorFlow (the tutorial's loop) and ONNX Runtime do so in processes of their own, from environments that the first run
makes (`peers/.venv-<name>`, 2.3 GB in all); who can't be installed is skipped.
--sweep: the kernel over numbers of texts and of units too; --plot: draw that (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import (
    BASELINE,
    Contestant,
    Measured,
    Shipped,
    baseline_turn,
    best_baseline,
    compete,
    stepper_turn,
)
from benchmarks.decode import parse
from benchmarks.peers.contestants import PEERS, peer_contestants
from benchmarks.peers.environment import Skipped
from benchmarks.sweep import plot, sweep
from benchmarks.table import machine, rows_of_json, spread, summary, table
from service.engine.native.native_stepper import NativeStepper
from service.engine.torch_stepper import TorchStepper
from service.model.quantize import IntegerPrecision, QuantizedGRU, quantize

MANY = 256
PRODUCT, INT_MM, TORCH = "product alone, {}", "torch._int_mm alone", "torch stepper, int8"
PRECISIONS: tuple[IntegerPrecision, ...] = ("int8", "int4")


def main() -> None:
    """Print the table and how the targets are met."""
    parser = argparse.ArgumentParser(description="the kernel against what the machine allows")
    parser.add_argument("--sweep", action="store_true", help="the kernel over numbers of texts and units too")
    parser.add_argument("--peers", type=_names, default=",".join(PEERS), help="libraries to compare with")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep, as PNG or SVG")
    options = parse(parser, rows="1,256")
    shipped = Shipped.load(options.model, options.model_store, "int8")
    models = {p: quantize(shipped.artifact.config, shipped.artifact.tensors, p) for p in PRECISIONS}
    kernel = NativeStepper(models["int8"]).variant
    about = machine() | {"threads": options.threads, "model": shipped.ref, "kernel": kernel}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    threads = sorted({1, options.threads})
    with ExitStack() as stack:
        them, skipped = contestants(shipped, models, threads), dict[str, str]()
        for name in options.peers:
            try:
                them += peer_contestants(stack, name, shipped, (1, MANY), threads)
            except Skipped as reason:
                skipped[name] = str(reason)
                print(f"{name} skipped: {reason}")
        try:
            measured = compete(them, options.rounds, options.seconds)
        except Skipped as reason:
            raise SystemExit(f"a library has ended; leave it out with --peers: {reason}") from reason
    print(table(measured))
    targets = [_judge(measured, *target) for target in _targets(options.threads, {m.what for m in measured})]
    document: dict[str, Any] = {"machine": about, "measured": rows_of_json(measured), "targets": targets}
    document |= {"skipped": skipped, "peers": _against_peers(measured)}
    if options.sweep or options.plot:
        document["sweep"] = points = sweep(
            models, sorted({1, options.threads}), min(options.rounds, 3), options.seconds
        )
        if options.plot:
            plot(points, options.plot)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def contestants(
    shipped: Shipped, models: dict[IntegerPrecision, QuantizedGRU], threads: Sequence[int]
) -> list[Contestant]:
    """Everybody, with one text and with 256."""
    found = []
    reference, forty_lines = TorchStepper(models["int8"]), shipped.forty_lines()
    for rows in (1, MANY):
        for precision, model in models.items():
            for number in threads:
                stepper = NativeStepper(model, number)
                if number == 1:
                    what = PRODUCT.format(precision)
                    found.append(Contestant(what, rows, 1, product_turn(stepper, model.config.num_units, rows)))
                found.append(Contestant(f"kernel, {precision}", rows, number, stepper_turn(stepper, rows, number)))
        for number in threads:
            found.append(Contestant(INT_MM, rows, number, int_mm_turn(models["int8"], rows, number)))
            found.append(Contestant(TORCH, rows, number, stepper_turn(reference, rows, number)))
            found.append(Contestant(BASELINE, rows, number, baseline_turn(forty_lines, rows, number)))
    return found


def product_turn(stepper: NativeStepper, units: int, rows: int) -> Callable[[float], float]:
    """The kernel's recurrent product and nothing else."""
    states = np.random.default_rng(0).integers(-127, 128, (rows, units)).astype(np.int8)
    repeats = max(1, 256 // rows)
    return _repeat(lambda: stepper.recurrent_products(states, repeats=repeats), rows * repeats)


def int_mm_turn(model: QuantizedGRU, rows: int, threads: int) -> Callable[[float], float]:
    """Torch's product of the same integers, in the layout that is the faster one."""
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
    """A turn of calls that stand for so many characters each."""

    def turn(seconds: float) -> float:
        done, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            call()
            done += chars
        return done / elapsed

    return turn


Target = tuple[str, int, int, str, int, int | None, float]  # who, rows, threads, against whom, rows, threads, at least


def _targets(threads: int, there: Collection[str]) -> list[Target]:
    """Those that can be judged with who is there. Threads None: against the better number of threads."""
    targets = [
        ("kernel, int8", 1, 1, PRODUCT.format("int8"), 1, 1, 1 / 1.2),
        ("kernel, int8", 1, 1, BASELINE, 1, None, 40),
        ("kernel, int4", 1, 1, PRODUCT.format("int8"), 1, 1, 1 / 0.85),
        ("kernel, int4", 1, 1, BASELINE, 1, None, 55),
        ("kernel, int4", 1, threads, BASELINE, 1, None, 85),
        ("kernel, int4", 1, threads, "onnxruntime", 1, threads, 8),
        ("kernel, int8", MANY, threads, INT_MM, MANY, threads, 0.6),
        ("kernel, int4", MANY, threads, INT_MM, MANY, threads, 0.6),
        ("kernel, int8", MANY, threads, TORCH, MANY, None, 1.5),
        ("kernel, int8", MANY, threads, BASELINE, MANY, None, 4),
    ]
    return [target for target in targets if target[3] in there]


def _judge(measured: Sequence[Measured], *target: *Target) -> dict[str, Any]:
    """Print one target; the same for JSON."""
    who, rows, threads, whom, its_rows, its_threads, at_least = target
    mine = next(m for m in measured if (m.what, m.rows, m.threads) == (who, rows, threads))
    its = [m for m in measured if (m.what, m.rows) == (whom, its_rows) and its_threads in (None, m.threads)]
    ratios = mine.ratios(best_baseline(measured, rows) if whom == BASELINE else max(its, key=lambda m: m.rate))
    number = f"{rows} row{'s' * (rows > 1)}, {threads} thread{'s' * (threads > 1)}"
    what = f"{who}, {number} >= {at_least:.2f} x {whom}"
    print(f"target {what}: {spread(ratios)}")
    return {"target": what, "at_least": at_least, "ratio": summary(ratios)}


def _against_peers(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Print how many times as fast as each library the kernel is, either at its better number of threads."""

    def best(what: str, rows: int) -> Measured:
        return max((m for m in measured if (m.what, m.rows) == (what, rows)), key=lambda m: m.rate)

    found = []
    for peer, rows in sorted({(m.what, m.rows) for m in measured if m.what in PEERS}):
        for mine in (best(f"kernel, {precision}", rows) for precision in PRECISIONS):
            ratios = mine.ratios(best(peer, rows))
            print(f"{mine.what}, {rows} row{'s' * (rows > 1)}: {spread(ratios)} times as fast as {peer}")
            found.append({"peer": peer, "rows": rows, "what": mine.what, "ratio": summary(ratios)})
    return found


def _names(text: str) -> list[str]:
    """An option's libraries, separated by commas."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"not known: {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    main()

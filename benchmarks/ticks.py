"""Measures what a tick costs outside the kernel, in microseconds of processor time for each text.

    python -m benchmarks.ticks [--json FILE] [--rounds 7] [--rows 1,64,256] [--baseline CHECKOUT]

"Call" is what `NativeStepper.advance` takes before and after the kernel; "tick" is everything that the engine's thread
does between two calls of the kernel: choosing texts, the call, and publishing characters that nobody reads. Both are
medians over the calls of a turn, on one thread with the shipped model. --baseline names another checkout of this
project, with its kernel compiled, such as a git worktree of an earlier commit: both are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import service.engine.stepper as contract
from benchmarks.decode import numbers, parse
from service.engine.automaton.stops import with_stops
from service.engine.engine import Engine
from service.engine.native.native_stepper import NativeStepper
from service.engine.request import Request
from service.engine.stepper import Row
from service.model.quantize import quantize
from service.store.model_store import ModelStore

ROOT = Path(__file__).parents[1]
_AT_MOST_US = 0.5  # for each text, with many texts
_MANY = 64
_CALLS, _CHARS = 60, 4  # of each measurement


class _Timed:
    """The functions of the kernel's library, which notes the thread's time outside `gru_advance`."""

    def __init__(self, functions: Any) -> None:
        self._functions, self._left = functions, 0.0
        self.outside_us: list[float] = []  # between two calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def gru_advance(self, *arguments: Any) -> int:
        self.outside_us.append((time.thread_time() - self._left) * 1e6)
        code: int = self._functions.gru_advance(*arguments)
        self._left = time.thread_time()
        return code

    def median(self) -> float:
        """Return the median of the times since the last call of this function, without the first ones."""
        measured, self.outside_us = self.outside_us[5:], []
        return statistics.median(measured)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure what a tick costs outside the kernel.")
    parser.add_argument("--rows", default="1,64,256", help="numbers of texts  [1,64,256]")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)  # of this checkout, printed as JSON
    options = parse(parser)
    if options.turn:
        print(json.dumps(_turn(options)))
        return
    checkouts = {"now": ROOT} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
    arguments = ["--turn", "--rows", options.rows, "--model", options.model, "--model-store"]
    arguments += [str(options.model_store.resolve())]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            command = [sys.executable, "-P", __file__, *arguments]
            answer = subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE)
            turns[name].append(json.loads(answer.stdout))
    print(f"{'us for each text':<34}" + "".join(f"{name:>26}" for name in checkouts))
    for what in turns["now"][0]:
        spans = [[turn[what] for turn in of_checkout] for of_checkout in turns.values()]
        cells = [f"{statistics.median(span):.2f} ({min(span):.2f}..{max(span):.2f})" for span in spans]
        print(f"{what:<34}" + "".join(f"{cell:>26}" for cell in cells))
        if what.startswith("call") and "plain" in what and int(what.split()[1]) >= _MANY:
            print(f"target {what} <= {_AT_MOST_US}: {cells[0]}")
    if options.json:
        options.json.write_text(json.dumps(turns, indent=1) + "\n")


def _turn(options: argparse.Namespace) -> dict[str, float]:
    """Return the microseconds for each text of every case."""
    rows = numbers(options.rows)
    _, artifact = ModelStore(options.model_store).load(options.model)
    stepper = NativeStepper(quantize(artifact.config, artifact.tensors, "int4"))
    timed = _Timed(stepper._library.functions)
    stepper._library = replace(stepper._library, functions=timed)  # type: ignore[arg-type]
    size = len(artifact.config.charset)
    make_batch = getattr(contract, "Batch", list)  # a baseline may have no batches yet
    kinds = {"plain": None, "stop string": with_stops(None, [np.array([0, 1, 0, 1, 2])], size)}
    measured = {}
    for number in rows:
        for kind, automaton in kinds.items():
            requests = [Request(np.empty(0, np.int64), 2**52, seed, automaton=automaton) for seed in range(number)]
            texts = make_batch([Row(request, stepper.initial_hidden()) for request in requests])
            while len(timed.outside_us) < _CALLS:
                stepper.advance(texts, _CHARS)
            measured[f"call, {number} {kind}"] = timed.median() / number
            engine = Engine(stepper, size, max_running=max(rows), max_waiting=max(rows))
            engine.submit(requests)
            while len(timed.outside_us) < _CALLS:
                time.sleep(0.05)
            engine.close()
            measured[f"tick, {number} {kind}"] = timed.median() / number
    return measured


if __name__ == "__main__":
    main()

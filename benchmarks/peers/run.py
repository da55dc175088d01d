"""The same model in other libraries, in characters/s, beside our stepper and forty lines of torch.

    python -m benchmarks.peers.run [--json FILE] [--threads 2] [--rounds 5] [--rows 1,64]

Each library gets an environment of its own here (`.venv-<name>`, made at the first run) and a process for each number
of threads. They generate in turns; who has no turn waits for its standard input. A library that can't be installed is
skipped; so is one whose logits after a text are not the model's.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contestants import Contestant, Measured, Shipped, compete
from benchmarks.decode import parse
from benchmarks.peers.environment import Skipped
from benchmarks.peers.peer import Peer
from benchmarks.table import machine, rows_of_json, spread, summary, table
from service.model.gru import GRUCharModel

PEERS = ("tensorflow", "onnxruntime")


def main() -> None:
    """Print the table and how many times as fast as each library we are."""
    options = parse(argparse.ArgumentParser(description="characters/s of other libraries"), rows="1,64", rounds=5)
    shipped = Shipped.load(options.model, options.model_store, options.precision)
    threads = sorted({1, options.threads})
    about = machine() | {"threads": options.threads, "model": shipped.ref, "precision": shipped.precision}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        contestants = shipped.contestants(options.rows, threads)
        for name in PEERS:
            try:
                contestants += enter(stack, name, shipped, options.rows, threads)
            except Skipped as reason:
                skipped[name] = str(reason)
                print(f"{name} skipped: {reason}")
        measured = compete(contestants, options.rounds, options.seconds)
    print(table(measured))
    comparisons = compare(measured, shipped.stepper_name)
    for one in comparisons:
        rows = f"{one['rows']} row{'s' * (one['rows'] > 1)}"
        print(f"{shipped.stepper_name} is {spread(one['ratios'])} times as fast as {one['peer']} with {rows}")
    if options.json:
        document = {"machine": about, "measured": rows_of_json(measured), "skipped": skipped}
        document["peers"] = [
            {"peer": one["peer"], "rows": one["rows"], "ratio": summary(one["ratios"])} for one in comparisons
        ]
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def enter(stack: ExitStack, name: str, shipped: Shipped, rows: list[int], threads: list[int]) -> list[Contestant]:
    """A library's contestants. Their processes end with the stack. Raises Skipped."""
    text = "".join(shipped.artifact.config.charset[:20])
    expected = reference_logits(shipped, text)
    found = []
    for number in threads:
        peer = stack.enter_context(Peer(name, shipped.directory, number))
        peer.check(text, expected, rows)
        found += [Contestant(name, num_rows, number, partial(peer.chars_per_s, num_rows)) for num_rows in rows]
    return found


def reference_logits(shipped: Shipped, text: str) -> NDArray[np.float32]:
    """(V,) logits after a text in float32."""
    artifact = shipped.artifact
    model = GRUCharModel.from_tensors(artifact.config, artifact.tensors)
    ids = torch.tensor([[artifact.config.charset.index(char) for char in text]])
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(ids, model.initial_hidden(1))[0][0, -1].numpy()
    return logits


def compare(measured: list[Measured], stepper: str) -> list[dict[str, Any]]:
    """Ratios of the stepper to each library by number of rows, either at its better number of threads."""

    def best(what: str, rows: int) -> Measured:
        return max((m for m in measured if m.what == what and m.rows == rows), key=lambda m: m.rate)

    return [
        {"peer": what, "rows": rows, "ratios": best(stepper, rows).ratios(best(what, rows))}
        for what, rows in sorted({(m.what, m.rows) for m in measured if m.what in PEERS})
    ]


if __name__ == "__main__":
    main()

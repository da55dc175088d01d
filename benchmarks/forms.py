"""Compares texts that have a form with texts that have none, in characters/s of one kernel.

    python -m benchmarks.forms [--rows 256] [--threads 2] [--rounds 7] [--seconds 1]

All texts are endless, so the forms are: 200 characters up to each period, in 200 states; and words, numbers and dates,
separated by commas. Each is measured in turns with the same texts without a form. The last line compares two equal
sets of texts without a form: its spread is that of the measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import in_turns
from benchmarks.table import machine, spread
from service.commands.bench import Texts
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.engine.automaton.stops import with_stops
from service.engine.kernels import choose_kernel
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import Stepper
from service.model.charset import Charset
from service.model.quantize import quantize
from service.store.model_store import ModelStore

TARGET = 0.95  # of the characters/s without a form, with 200 states
SENTENCES = Form("regex", r"(?:[^.]{199}\.)*")
RECORDS = Form("regex", r"(?:(?:[A-Za-z]{1,20}|-?[A-Z]{1,9}\.[A-Z]{2}|[A-Z]{4}-[a-z]{2}-[a-z]{2})(?:, |\n))*")
RESTRICTING = SamplingSettings(temperature=0.8, top_k=20, top_p=0.95)


@dataclass(frozen=True)
class Case:
    """Texts that are compared with the same texts without an automaton."""

    what: str
    automaton: Automaton | None
    fields: dict[str, Any] = field(default_factory=dict)  # of all their requests


def main() -> None:
    """Measure all cases, and print the ratios."""
    parser = argparse.ArgumentParser(description="Compare texts that have a form with texts that have none.")
    parser.add_argument("--model", default="shakespeare@1")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--kernel", default="auto", help="auto, native or torch  [auto]")
    parser.add_argument("--rows", type=int, default=256, help="texts side by side  [256]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn  [1]")
    options = parser.parse_args()
    version, artifact = ModelStore(options.model_store).load(options.model)
    model = quantize(artifact.config, artifact.tensors, artifact.training.serving_precision)
    kernel = choose_kernel(options.kernel, options.threads)
    stepper = kernel.make_stepper(model)
    print(", ".join(f"{name} {value}" for name, value in (machine() | {"model": version.ref}).items()))
    print(f"{options.rows} rows, {options.threads} threads, kernel {kernel.name}")
    print(f"{'what':<44}{'states':>8}{'characters/s':>14}   times that without")
    for case in cases(artifact.charset):
        with_it, without = in_turns(turns(case, stepper, options.rows, options.seconds), options.rounds)
        ratios = [one / other for one, other in zip(with_it, without, strict=True)]
        states = case.automaton.num_states if case.automaton is not None else 0
        print(f"{case.what:<44}{states:>8}{sorted(with_it)[len(with_it) // 2]:>14,.0f}   {spread(ratios)}")
    print(f"target: 200 states, at least {TARGET}")


def cases(charset: Charset) -> list[Case]:
    """Return what is compared."""
    sentences, records = (compile_form(form, charset.characters) for form in (SENTENCES, RECORDS))
    stops = with_stops(None, [charset.exact(stop) for stop in ("ROMEO:", "\n\n\n", "zzz", "THE END")], len(charset))
    return [
        Case("a form of 200 states", sentences),
        Case("a form of 200 states, top_k and top_p", sentences, {"sampling": RESTRICTING}),
        Case("a form of 200 states, log-probabilities", sentences, {"num_logprobs": 0}),
        Case("words, numbers and dates", records),
        Case("no form, four stop strings", stops, {"min_chars": 2**52}),
        Case("no form (the same twice)", None),
    ]


def turns(case: Case, stepper: Stepper, num_rows: int, seconds: float) -> list[Callable[[], float]]:
    """Return a turn with the automaton and one without."""
    texts = [Texts(stepper, num_rows, **case.fields, automaton=automaton) for automaton in (case.automaton, None)]
    return [partial(one.chars_per_s, seconds) for one in texts]


if __name__ == "__main__":
    main()

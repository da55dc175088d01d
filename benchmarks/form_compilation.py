"""Measures how long forms of text take to compile, beside other libraries that compile the same patterns and schemas.

    python -m benchmarks.form_compilation [--rounds 5] [--peers interegular outlines-core] [--json FILE]

The forms are the 50 patterns and 20 schemas of the tests, the hostile ones that are refused, `json_object`, and a list
of 10,000 choices; the charset has 116 characters. Times are processor times of the first compilation; later requests
find the form in a cache. Other libraries are installed in an environment of their own at the first run; a library that
can't be installed is skipped. interegular has no JSON schemas. Both get texts that `re.fullmatch` or `jsonschema`
accepts, and it is counted of how many forms a library refuses some of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environment import Skipped, environment
from benchmarks.table import machine, summary
from service.engine.automaton.compiler import FormCache
from service.engine.automaton.form import Form
from service.errors import InvalidValue
from tests.harness.forms import CHARSET, HOSTILE_PATTERNS, HOSTILE_SCHEMAS, PATTERNS, SCHEMAS, sample, schema_text

WORKER = Path(__file__).parent / "peers" / "forms_worker.py"
LENGTHS = (0, 1, 3, 10, 30, 60)  # characters of the texts beyond the fewest
_PEER_S = 1800

Figures = dict[str, Any]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.form_compilation", description="Measure how long forms of text take to compile."
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; the fastest counts  [5]")
    parser.add_argument("--peers", nargs="*", default=["interegular", "outlines-core"], help="other libraries  [both]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    accepted = {f"pattern: {name}": Form("regex", pattern) for name, pattern in PATTERNS.items()}
    accepted |= {f"schema: {name}": Form("json", schema_text(schema)) for name, schema in SCHEMAS.items()}
    refused = {f"pattern: {pattern[:30]}": Form("regex", pattern) for pattern in HOSTILE_PATTERNS}
    refused |= {f"schema: {message[:30]}": Form("json", schema_text(schema)) for schema, message in HOSTILE_SCHEMAS}
    others = {"json_object": Form("json_object", ""), "10,000 choices": Form("choice", json.dumps(names(10_000)))}
    figures: Figures = {"machine": machine()}
    for what, forms in (("70 forms", accepted), ("hostile forms", refused), ("others", others)):
        times = {name: min(compile_ms(form) for _ in range(options.rounds)) for name, form in forms.items()}
        figures[what] = times
        worst = max(times, key=times.__getitem__)
        print(f"{what}: median {statistics.median(times.values()):.1f} ms, worst {times[worst]:.1f} ms ({worst})")
    for peer in options.peers:
        try:
            figures[peer] = against(peer, accepted, figures["70 forms"])
        except Skipped as reason:
            print(f"{peer} is skipped: {reason}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compile_ms(form: Form) -> float:
    """Compile a form and return the milliseconds of processor time."""
    cache = FormCache()
    began = time.process_time()
    with suppress(InvalidValue):
        cache.get(form, CHARSET)
    return 1000 * (time.process_time() - began)


def against(peer: str, forms: dict[str, Form], mine: dict[str, float]) -> Figures:
    """Compile the forms with another library, and print how it compares. Raises Skipped."""
    random = np.random.default_rng(0)
    tasks = []
    for form in forms.values():
        automaton = FormCache().get(form, CHARSET)
        texts = [sample(automaton, CHARSET, random, int(automaton.fewest[0]) + more) for more in LENGTHS]
        tasks.append((form.kind, form.value, texts))
    done = subprocess.run(
        [environment("forms"), WORKER, peer],
        input=json.dumps({"charset": CHARSET, "forms": tasks}),
        capture_output=True,
        text=True,
        timeout=_PEER_S,
        check=False,
    )
    if done.returncode:
        raise Skipped((done.stderr.strip().splitlines() or ["it failed"])[-1])
    answers = dict(zip(forms, map(json.loads, done.stdout.splitlines()), strict=True))
    times = {name: answer["ms"] for name, answer in answers.items() if "ms" in answer}
    refusing = [name for name, answer in answers.items() if answer.get("accepted", len(LENGTHS)) < len(LENGTHS)]
    ratios = [mine[name] / times[name] for name in times]
    worst = max(times, key=times.__getitem__)
    print(
        f"{peer}: compiles {len(times)} of {len(forms)}, median {statistics.median(times.values()):.1f} ms, "
        f"worst {times[worst]:.1f} ms ({worst}); time here / there {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}..{max(ratios):.2f})"
    )
    for name, answer in answers.items():
        if "error" in answer and not (peer == "interegular" and name.startswith("schema")):
            print(f"  not {name}: {answer['error']}")
    print(f"  refuses texts of {len(refusing)} forms: {', '.join(refusing) or 'none'}")
    return {"forms": answers, "ratio": summary(ratios), "refusing": refusing}


def names(number: int) -> list[str]:
    """Return made-up names, each a first and a last one."""
    first = [f"{a}{b}{c}" for a in ("Al", "Be", "Ca", "Do", "El") for b in ("ber", "la", "ni", "ro") for c in "aeiout"]
    last = [f"{a}{b}" for a in ("Ham", "Wald", "Stein", "Frei", "Neu", "Ost", "Berg") for b in ("burg", "heim", "feld")]
    pairs = [f"{one} {two}{three}" for one in first for two in last for three in ("", "er", "s", "-Au")]
    return pairs[:number]


if __name__ == "__main__":
    main()

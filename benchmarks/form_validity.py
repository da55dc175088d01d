"""Checks texts of given forms: each has its form, and none is cut off, however few characters it may have.

    python -m benchmarks.form_validity [--samples 10000] [--model shakespeare] [--json FILE]

The forms are the 50 patterns and 20 schemas of `tests/harness/forms.py`. Two models write them, in batches of 256: a
published one, which skips the forms that its characters can't write, and one with all characters and random
weights, which is sure of nothing and so goes everywhere in a form. For each form, `max_tokens` is the fewest characters
that suffice, and up to 100 more; some texts are drawn with other settings. `re.fullmatch` and jsonschema judge the
texts, and know nothing of automata. With one character less than suffices, a request must be refused with the number.

Exits with 1 if anything is wrong, and prints the first text of each form that is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np

from benchmarks.table import machine
from service.cores import available_cores
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.engine.kernels import choose_kernel
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import InvalidValue
from service.generation.completion import Completion, CompletionRequest
from service.registry.loaded_models import EngineSettings, LoadedModel
from service.store.model_store import ModelStore
from tests.harness.forms import CHARSET, PATTERNS, SCHEMAS, schema_text
from tests.harness.models import publish_tiny

STORE = Path(__file__).parent.parent / "model_store"
ALLOWANCES = (0, 1, 3, 10, 30, 100)  # characters that max_tokens has beyond the fewest that suffice
SETTINGS = (
    PLAIN,
    SamplingSettings(temperature=2.0),
    PLAIN,
    SamplingSettings(top_k=3, frequency_penalty=1.0),
    SamplingSettings(temperature=0.7, top_p=0.8, repetition_penalty=1.3),
)
BATCH = 256

Judge = Callable[[str], object]  # raises, or returns something false, for a text that doesn't have the form


@dataclass
class Verdict:
    """What was found of one form with one model."""

    model: str
    form: str
    num_texts: int = 0
    num_distinct: int = 0
    num_chars: int = 0
    num_cut_off: int = 0  # texts that fill max_tokens and may go on, all of them complete
    wrong: str | None = None  # the first thing that is wrong


def main() -> None:
    """Check all forms, and print what was found."""
    parser = argparse.ArgumentParser(description="Check that texts of given forms have them.")
    parser.add_argument("--samples", type=int, default=10_000, help="texts of each form by each model  [10000]")
    parser.add_argument("--model", default="shakespeare", help="the published model  [shakespeare]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to this file")
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    skipped: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, models(Path(folder), options.model) as loaded:
        for model in loaded:
            for name, form, judge in forms():
                try:
                    compile_form(form, model.charset.characters)
                except InvalidValue:
                    skipped.append(f"{name} by {model.version.ref}")
                    continue
                verdict = checked(model, name, form, judge, options.samples)
                verdicts.append(verdict)
                print(line(verdict), flush=True)
    wrong = [verdict for verdict in verdicts if verdict.wrong is not None]
    print(
        f"{sum(verdict.num_texts for verdict in verdicts):,} texts of {len({verdict.form for verdict in verdicts})} "
        f"forms, {sum(verdict.num_distinct for verdict in verdicts):,} of them different, "
        f"{sum(verdict.num_chars for verdict in verdicts):,} characters, in {time.perf_counter() - began:.0f} s: "
        f"{len(wrong)} forms with a wrong text (target: 0); {len(skipped)} forms can't be written with the characters "
        f"of {options.model}"
    )
    if options.json is not None:
        document = {"machine": machine(), "forms": [vars(verdict) for verdict in verdicts], "skipped": skipped}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


def forms() -> Iterator[tuple[str, Form, Judge]]:
    """Yield each form with its name, and with what judges its texts."""
    for name, pattern in PATTERNS.items():
        yield name, Form("regex", pattern), re.compile(pattern).fullmatch
    for name, schema in SCHEMAS.items():
        yield name, Form("json", schema_text(schema)), _judge_of(schema)


def _judge_of(schema: object) -> Judge:
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
    return lambda text: validator.validate(json.loads(text)) is None


@contextmanager
def models(folder: Path, published: str) -> Iterator[list[LoadedModel]]:
    """Load the published model, and make one with all characters, in a model store in `folder`."""
    store = ModelStore(folder)
    random_ref = publish_tiny(store, "random", charset=CHARSET, num_units=64)
    settings = EngineSettings(choose_kernel("auto", available_cores()), max_running=BATCH, max_waiting=BATCH)
    loaded = [LoadedModel(*ModelStore(STORE).load(published), settings), LoadedModel(*store.load(random_ref), settings)]
    try:
        yield loaded
    finally:
        for model in loaded:
            model.engine.close()


def checked(model: LoadedModel, name: str, form: Form, judge: Judge, num_samples: int) -> Verdict:
    """Generate texts of a form and judge them."""
    verdict = Verdict(model.version.ref, name)
    fewest = int(compile_form(form, model.charset.characters).fewest[0])
    if fewest:
        verdict.wrong = not_refused(model, form, fewest)
    seen: set[str] = set()
    per_length = -(-num_samples // len(ALLOWANCES))
    for place, more in enumerate(ALLOWANCES):
        max_chars = fewest + more
        for first in range(0, per_length, BATCH):
            size = min(BATCH, per_length - first)
            sampling = SETTINGS[(first // BATCH + place) % len(SETTINGS)]
            request = CompletionRequest(
                (np.empty(0, np.int64) if first else model.charset.encode("A"),),
                max_chars,
                seed=place,
                sampling=sampling,
                form=form,
                n=size,
                best_of=size,
                first_choice=first,
            )
            for text, reason in generated(model, request):
                verdict.num_texts += 1
                verdict.num_chars += len(text)
                verdict.num_cut_off += reason == "length"
                if text not in seen:
                    seen.add(text)
                    verdict.wrong = verdict.wrong or fault(judge, text)
                if len(text) > max_chars or (reason == "length" and len(text) < max_chars):
                    verdict.wrong = verdict.wrong or f"{text!r} ends with {reason} at max_tokens {max_chars}"
    verdict.num_distinct = len(seen)
    return verdict


def generated(model: LoadedModel, request: CompletionRequest) -> Iterator[tuple[str, str]]:
    """Yield each text with its finish reason."""
    completion = Completion(model, request)
    texts: dict[int, str] = {}
    for item in completion.wholes(1.0):
        if item is not None:
            texts[item[0].index] = texts.get(item[0].index, "") + item[1].text
    for choice in completion.choices:
        yield texts[choice.index], choice.finish_reason


def fault(judge: Judge, text: str) -> str | None:
    """Return what is wrong with a text; None if it has the form."""
    try:
        return None if judge(text) else f"{text!r} doesn't match"
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"


def not_refused(model: LoadedModel, form: Form, fewest: int) -> str | None:
    """Return what is wrong with the refusal of a request that may have one character less than the form takes."""
    prompt = model.charset.encode("A")
    try:
        Completion(model, CompletionRequest((prompt,), fewest - 1, seed=0, form=form)).cancel()
    except InvalidValue as error:
        found = error.param == "max_tokens" and f" {fewest} " in error.message
        return None if found else f"it is refused without the number {fewest}: {error.message}"
    return f"it is not refused with {fewest - 1} characters"


def line(verdict: Verdict) -> str:
    """Return a line about a form."""
    found = "right" if verdict.wrong is None else f"WRONG: {verdict.wrong}"
    return (
        f"{verdict.model:<14} {verdict.form:<22} {verdict.num_texts:>7,} texts, {verdict.num_distinct:>7,} different, "
        f"{verdict.num_chars / max(1, verdict.num_texts):>6.1f} characters: {found}"
    )


if __name__ == "__main__":
    main()

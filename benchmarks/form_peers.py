"""Compares forms with libraries that constrain the texts of language models: whether texts are valid, and the time.

    python -m benchmarks.form_peers [--texts 16] [--libraries NAME ...] [--json FILE]

The forms are the 50 patterns and 20 schemas of `tests/harness/forms.py`, each with three limits: the fewest characters
that suffice, 10 more and 100 more. A library's texts are drawn by a small transformer of random weights, the service's
by a GRU of random weights with 1,024 units; a token is a character for all of them. So a model knows nothing of a form,
as one that was trained on something else, and only what constrains it makes a text valid. `re.fullmatch` and jsonschema
judge the texts, also those that were cut off at the limit.

The libraries are installed in an environment of their own, `peers/.venv-constrained`, at the first run. One that can't
be installed is named and left out. JSON is written without free white space where a library offers that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.form_validity import Judge, fault, forms, generated
from benchmarks.pairs import in_turns
from benchmarks.peers.environment import Skipped, environment, reason
from benchmarks.table import machine, summary
from service.cores import available_cores
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.engine.kernels import choose_kernel
from service.generation.completion import Completion, CompletionRequest
from service.registry.loaded_models import EngineSettings, LoadedModel
from service.store.model_store import ModelStore
from tests.harness.forms import CHARSET
from tests.harness.models import publish_tiny

LIBRARIES = ("llguidance", "xgrammar", "outlines-core", "lm-format-enforcer")
ALLOWANCES = (0, 10, 100)  # characters that a text may have beyond the fewest that suffice
FORM_S = 60.0  # in which a library must have taken a form and written its texts
_ROOT = Path(__file__).parent.parent


@dataclass
class Found:
    """What was found of a library."""

    name: str
    version: str
    num_forms: int = 0  # that it takes
    refused: dict[str, str] = field(default_factory=dict)  # the others, with its message
    compile_ms: list[float] = field(default_factory=list)
    num_valid: list[int] = field(default_factory=lambda: [0] * len(ALLOWANCES))  # for each limit
    num_texts: list[int] = field(default_factory=lambda: [0] * len(ALLOWANCES))
    num_wrong: int = 0  # texts that the library ended, and that are not valid
    wrong: dict[str, str] = field(default_factory=dict)  # the first of each form
    us_per_char: list[float] = field(default_factory=list)  # what a form costs, by form
    share_of_step: list[float] = field(default_factory=list)  # the same, as a share of the rest of the time


class Worker:
    """The process of a library. Raises Skipped if it ends early, or takes too long."""

    def __init__(self, name: str) -> None:
        packages = sysconfig.get_paths()["purelib"]
        self._command = [str(environment("constrained")), "-m", "benchmarks.peers.constrained_worker", name, packages]
        self._process: subprocess.Popen[str] | None = None
        self.version = str(self._start()["version"])

    def ask(self, form: Form, limits: Sequence[int], num_texts: int) -> dict[str, Any]:
        """Have texts of a form written."""
        if self._process is None:
            self._start()
        question = {"kind": form.kind, "value": form.value, "limits": limits, "num_texts": num_texts}
        try:
            return self._exchange(json.dumps(question) + "\n")
        except Skipped as skipped:
            return {"error": str(skipped)}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> dict[str, Any]:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 it is closed with the object
        self._process = subprocess.Popen(
            self._command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        return self._exchange("")

    def _exchange(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(FORM_S, process.kill)
        began = time.monotonic()
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self.close()
            self._errors.seek(0)
            late = time.monotonic() - began >= FORM_S
            raise Skipped(f"more than {FORM_S:.0f} s" if late else reason(self._errors.read())) from error
        finally:
            timer.cancel()
        return answer


def main() -> None:
    """Compare, and print a line for each library."""
    parser = argparse.ArgumentParser(description="Compare forms with other libraries.")
    parser.add_argument("--texts", type=int, default=16, help="texts of each form with each limit  [16]")
    parser.add_argument("--libraries", nargs="*", default=LIBRARIES, help=f"which to compare  [{' '.join(LIBRARIES)}]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the service's cost is measured  [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(Path(folder))
        ref = publish_tiny(store, "random", charset=CHARSET, embedding_dim=256, num_units=1024)
        settings = EngineSettings(choose_kernel("auto", available_cores()))
        model = LoadedModel(*store.load(ref), settings)
        try:
            found.append(of_service(model, options.texts, options.rounds))
        finally:
            model.engine.close()
    print(line(found[0]), flush=True)
    for name in options.libraries:
        try:
            found.append(of_library(name, options.texts))
            print(line(found[-1]), flush=True)
        except Skipped as skipped:
            print(f"{name} is left out: {skipped}")
    for one in found:
        for what, messages in (("doesn't take", one.refused), ("ends wrongly", one.wrong)):
            for form, message in messages.items():
                print(f"{one.name} {what} {form}: {message}", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "found": [vars(one) for one in found]}, indent=1))


def limits_of(form: Form) -> list[int]:
    """Return how many characters a text may have: as a whole number of them suffices."""
    fewest = int(compile_form(form, CHARSET).fewest[0])
    return [max(1, fewest) + more for more in ALLOWANCES]


def of_library(name: str, num_texts: int) -> Found:
    """Have a library constrain texts of all forms."""
    with closing(Worker(name)) as worker:
        found = Found(name, worker.version)
        for form_name, form, judge in forms():
            answer = worker.ask(form, limits_of(form), num_texts)
            if "error" in answer:
                found.refused[form_name] = answer["error"]
                continue
            found.num_forms += 1
            found.compile_ms.append(answer["compile_ms"])
            for place, (texts, ended) in enumerate(zip(answer["texts"], answer["ended"], strict=True)):
                count(found, form_name, judge, place, texts, ended)
            found.us_per_char.append(1e6 * answer["mask_s"] / answer["num_tokens"])
            found.share_of_step.append(answer["mask_s"] / answer["other_s"])
        return found


def of_service(model: LoadedModel, num_texts: int, num_rounds: int) -> Found:
    """Have the service constrain texts of all forms."""
    found = Found("gru-serve", "")
    for form_name, form, judge in forms():
        began = time.perf_counter()
        compile_form(form, CHARSET[::-1])  # another charset, so that no form of this one is cached
        found.compile_ms.append(1000 * (time.perf_counter() - began))
        found.num_forms += 1
        limits = limits_of(form)
        for place, limit in enumerate(limits):
            texts = list(generated(model, request_of(model, form, limit, num_texts)))
            ended = [reason == "stop" for _, reason in texts]
            count(found, form_name, judge, place, [text for text, _ in texts], ended)
        # As many steps without a form; of the rounds of both the fastest counts.
        run = request_of(model, form, limits[-1], num_texts)
        with_form, without = in_turns(
            [partial(step_us, model, run), partial(step_us, model, request_of(model, None, limits[-1], num_texts))],
            num_rounds,
        )
        found.us_per_char.append(min(with_form) - min(without))
        found.share_of_step.append(min(with_form) / min(without) - 1)
    return found


def request_of(model: LoadedModel, form: Form | None, max_chars: int, num_texts: int) -> CompletionRequest:
    """Return a request of texts of a form."""
    prompt = model.charset.encode("A")
    return CompletionRequest((prompt,), max_chars, seed=0, form=form, n=num_texts, best_of=num_texts)


def step_us(model: LoadedModel, request: CompletionRequest) -> float:
    """Generate texts, and return the microseconds that each character took."""
    began = time.perf_counter()
    completion = Completion(model, request)
    for _ in completion.wholes(1.0):
        pass
    return 1e6 * (time.perf_counter() - began) / completion.num_generated


def count(found: Found, form: str, judge: Judge, place: int, texts: Sequence[str], ended: Sequence[bool]) -> None:
    """Judge the texts of a form with one limit."""
    for text, has_ended in zip(texts, ended, strict=True):
        wrong = fault(judge, text)
        found.num_texts[place] += 1
        found.num_valid[place] += wrong is None
        if wrong is not None and has_ended:
            found.num_wrong += 1
            found.wrong.setdefault(form, wrong)


def line(found: Found) -> str:
    """Return a line about a library."""
    shares = [f"{valid / max(1, texts):.1%}" for valid, texts in zip(found.num_valid, found.num_texts, strict=True)]
    times, costs = summary(found.compile_ms), summary(found.us_per_char)
    return (
        f"{found.name} {found.version}: takes {found.num_forms} of 70 forms; valid with the fewest characters "
        f"{shares[0]}, with 10 more {shares[1]}, with 100 more {shares[2]}; ended by it, but not valid: "
        f"{found.num_wrong}; compiled in {times['median']:.1f} ms, at most {times['max']:.0f}; a character costs "
        f"{costs['median']:.1f} us (at most {costs['max']:.0f}), {statistics.median(found.share_of_step):.1%} of a step"
    )


if __name__ == "__main__":
    main()

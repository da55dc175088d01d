"""The choice between the native kernel and torch, and a server that runs without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine import kernels
from service.engine.kernels import choose_kernel
from service.engine.native.binding import variants
from service.engine.native.stepper import NativeStepper
from service.engine.torch_stepper import TorchStepper
from service.errors import InvalidSettings
from service.store import ModelStore
from tests.engine.models import quantized

needs_native = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")

SERVE = """
import json, sys
from service.config import read_settings
from service.web.app import create_app
app = create_app(read_settings(model_store=sys.argv[1], model="tiny", kernel=sys.argv[2]))
answer = app.test_client().post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 40, "seed": 7})
app.extensions["gru_serve"].close()
print(json.dumps([answer.status_code, answer.json["choices"][0]["text"], "torch" in sys.modules]))
"""


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI has to have a compiler")
def test_in_ci_it_was_compiled() -> None:
    assert variants()


@needs_native
def test_auto_takes_the_best_variant() -> None:
    kernel = choose_kernel("auto", 1)
    assert kernel.name == variants()[0]
    assert isinstance(kernel.make_stepper(quantized()), NativeStepper)


def test_torch_can_be_chosen() -> None:
    kernel = choose_kernel("torch", 1)
    assert kernel.name == "torch"
    assert isinstance(kernel.make_stepper(quantized()), TorchStepper)


def test_without_the_native_kernel_auto_is_torch_and_native_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "variants", list)
    assert choose_kernel("auto", 1).name == "torch"
    with pytest.raises(InvalidSettings, match="compiler"):
        choose_kernel("native", 1)


def test_without_torch_every_choice_that_takes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InvalidSettings, match="torch is not installed: pip"):
        choose_kernel("torch", 1)
    monkeypatch.setattr(kernels, "variants", list)
    with pytest.raises(InvalidSettings, match="torch is not installed, and the native kernel was not compiled: pip"):
        choose_kernel("auto", 1)


@needs_native
def test_a_server_on_the_native_kernel_never_imports_torch_and_answers_the_same(tiny_store: ModelStore) -> None:
    answers = []
    for kernel in ("native", "torch"):
        command = [sys.executable, "-c", SERVE, str(tiny_store.root), kernel]
        root = Path(__file__).parents[2]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
        status, text, has_torch = json.loads(output.splitlines()[-1])
        assert status == 200
        assert has_torch == (kernel == "torch")
        answers.append(text)
    assert answers[0] == answers[1]

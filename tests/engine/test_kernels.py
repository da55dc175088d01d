"""The choice between the native kernel and torch, and a server without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.engine import kernels
from service.engine.kernels import KernelChoice, choose_kernel
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.torch_stepper import TorchStepper
from service.errors import InvalidSettings
from service.store.model_store import ModelStore
from tests.harness.rows import quantized

needs_native = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")

ROOT = Path(__file__).parents[2]
KERNELS: tuple[KernelChoice, ...] = ("native", "torch")
SERVE = """
import json, sys
from service.settings import read_settings
from service.web.app import create_app
app = create_app(read_settings(model_store=sys.argv[1], model="tiny", kernel=sys.argv[2]))
client = app.test_client()
answer = client.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 40, "seed": 7}).json
app.extensions["gru_serve"].close()
seen = [answer["choices"][0]["text"], answer["system_fingerprint"]]
print(json.dumps([seen, client.get("/readyz").json["kernel"], "torch" in sys.modules]))
"""
EVAL = """
import json, sys
from service.__main__ import main
main(["eval", "tiny", *sys.argv[1:]], standalone_mode=False)
print(json.dumps("torch" in sys.modules))
"""


def printed(script: str, *words: str, kernel: str = "auto") -> list[Any]:
    """Run a script in another process; the lines that it prints."""
    command, environ = [sys.executable, "-c", script, *words], os.environ | {"GRU_SERVE_KERNEL": kernel}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environ)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must have a compiler")
def test_kernel__was_compiled_in_ci() -> None:
    assert variants()


@needs_native
def test_choose_kernel__auto_is_the_best_variant() -> None:
    kernel = choose_kernel("auto", 1)
    assert kernel.name == variants()[0]
    assert isinstance(kernel.make_stepper(quantized()), NativeStepper)


def test_choose_kernel__torch_can_be_chosen() -> None:
    kernel = choose_kernel("torch", 1)
    assert kernel.name == "torch"
    assert isinstance(kernel.make_stepper(quantized()), TorchStepper)


def test_choose_kernel__without_a_compiled_kernel_auto_is_torch_and_native_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "variants", list)
    assert choose_kernel("auto", 1).name == "torch"
    with pytest.raises(InvalidSettings, match="compiler"):
        choose_kernel("native", 1)


def test_choose_kernel__without_torch_choices_that_need_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InvalidSettings, match="torch is not installed: set kernel=auto or run make setup"):
        choose_kernel("torch", 1)
    monkeypatch.setattr(kernels, "variants", list)
    with pytest.raises(InvalidSettings, match="the native kernel was not compiled: install a C"):
        choose_kernel("auto", 1)


@needs_native
def test_server__native_kernel_answers_as_torch_and_never_imports_it(tiny_store: ModelStore) -> None:
    """The fingerprint is the same too. /readyz names the kernel."""
    answers = []
    for kernel in KERNELS:
        seen, name, has_torch = printed(SERVE, str(tiny_store.root), kernel)[-1]
        assert name == choose_kernel(kernel, 1).name
        assert has_torch == (kernel == "torch")
        answers.append(seen)
    assert answers[0] == answers[1]


@needs_native
def test_eval__native_kernel_measures_as_torch_and_never_imports_it(tiny_store: ModelStore, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("ROMEO: the lady of the house is not at home\n" * 20)
    words = ["--corpus", str(corpus), "--unknown-chars", "drop", "--json", "--model-store", str(tiny_store.root)]
    losses = []
    for kernel in KERNELS:
        facts, has_torch = printed(EVAL, *words, "--precision", "int8", kernel=kernel)
        assert has_torch == (kernel == "torch")
        losses.append(facts["nats_per_char"])
    assert losses[0] == losses[1]


def test_install__without_a_compiler_serves_with_torch_and_logs_it(tiny_store: ModelStore, tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "service", source / "service", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    no_compiler = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    subprocess.run([*pip, "--target", str(installed), str(source)], env=no_compiler, check=True, capture_output=True)
    assert not list(installed.rglob("*.so"))
    [reason] = installed.rglob("not_compiled.txt")
    assert "no-such-compiler" in reason.read_text()
    environ = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", SERVE, str(tiny_store.root)]
    done = subprocess.run([*command, "auto"], cwd=tmp_path, env=environ, check=True, capture_output=True, text=True)
    seen, kernel, has_torch = json.loads(done.stdout.splitlines()[-1])
    assert (kernel, has_torch) == ("torch", True)
    loaded = [line for line in map(json.loads, done.stderr.splitlines()) if line["event"] == "model loaded"]
    assert [line["kernel"] for line in loaded] == ["torch"]
    [event] = [line["event"] for line in map(json.loads, done.stderr.splitlines()) if "torch computes" in line["event"]]
    assert reason.read_text().strip() in event
    assert seen == printed(SERVE, str(tiny_store.root), "auto")[-1][0]
    refused = subprocess.run([*command, "native"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert refused.returncode
    assert "install the package again on a machine with a C++17 compiler" in refused.stderr
    assert "no-such-compiler" in refused.stderr

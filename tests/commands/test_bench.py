"""`gru-serve bench` and the benchmarks: their output and their error messages, but never their speed."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import __main__ as all_benchmarks
from benchmarks import decode, roofline
from benchmarks.baselines import FortyLines
from benchmarks.candidates import Candidate, Shipped
from benchmarks.pairs import in_turns
from benchmarks.peers import environment
from benchmarks.peers.comparison import PEERS, start_workers
from benchmarks.peers.environment import Skipped
from service.__main__ import main
from service.commands.bench import Texts, weight_bytes, weights_and_cache
from service.engine.native.native_stepper import variants
from service.engine.torch_stepper import TorchStepper
from service.model.gru import GRUCharModel
from service.model.quantize import IntegerPrecision, quantize
from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny, random_tensors, tiny_config

needs_native = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")


def bench(store: ModelStore, *words: str) -> Result:
    place = ["--model", "tiny", "--model-store", str(store.root), "--seconds", "0.01", "--threads", "1"]
    return CliRunner().invoke(main, ["bench", *place, *words])


def test_bench__prints_one_json_document(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--rows", "3,1", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts) == {
        *("model", "precision", "kernel", "threads", "cores", "load_s"),
        *("state_bytes", "weight_bytes", "second_cache_bytes", "rates"),
    }
    assert (facts["model"], facts["precision"], facts["threads"]) == ("tiny@1", "int8", 1)
    assert facts["state_bytes"] == 4 * 16
    assert facts["weight_bytes"] == 3 * 16 * 16
    assert [rate["rows"] for rate in facts["rates"]] == [3, 1]
    for rate in facts["rates"]:
        assert set(rate) == {"rows", "chars_per_s", "min", "max"}
        assert 0 < rate["min"] <= rate["chars_per_s"] <= rate["max"]


def test_bench__prints_a_line_for_each_number_of_rows_and_progress_to_stderr(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--rows", "1,2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny@1 in int8 on ")
    assert "the state of a text takes 64 bytes" in lines[1]
    assert lines[2].startswith("its recurrent weights take 0.0 MiB")
    assert [line.split()[0] for line in lines[3:]] == ["rows", "1", "2"]
    assert "measuring 2 rows" in result.stderr
    assert "measuring" not in result.stdout


@pytest.mark.parametrize(
    ("num_units", "cache_mib", "precision", "expected"),
    [
        (1024, 2, "int8", "take 3.0 MiB, and a core's second cache has 2.0: in int4 they would fit"),
        (1024, 2, "int4", "take 1.5 MiB, and a core's second cache has 2.0"),
        (1024, 1, "int8", "take 3.0 MiB, and a core's second cache has 1.0"),
        (512, 1, "int8", "take 0.8 MiB, and a core's second cache has 1.0"),
        (1024, None, "int8", "take 3.0 MiB"),
    ],
)
def test_bench__says_when_fewer_bits_would_fit_the_cache(
    num_units: int, cache_mib: int | None, precision: IntegerPrecision, expected: str
) -> None:
    weights = weight_bytes(tiny_config(num_units=num_units), precision)
    line = weights_and_cache(precision, weights, cache_mib and cache_mib * 2**20)
    assert line.removeprefix("its recurrent weights ").split(", and one text")[0] == expected


def test_bench__uses_the_precision_of_the_setting(tiny_store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PRECISION", "int4")
    assert json.loads(bench(tiny_store, "--rows", "1", "--json").stdout)["precision"] == "int4"


@pytest.mark.parametrize(
    "words",
    [["--rows", "x"], ["--rows", ""], ["--rows", "1,,2"], ["--rows", "0"], ["--rows", "65537"], ["--seconds", "0"],
     ["--seconds", "nan"], ["--threads", "0"], ["--colour", "red"]],
)  # fmt: skip
def test_bench__refuses_bad_usage(tiny_store: ModelStore, words: list[str]) -> None:
    result = bench(tiny_store, *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_bench__names_a_model_that_does_not_exist(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--model", "nope")
    assert result.exit_code == 1
    assert "no model 'nope'" in result.stderr


def test_texts__advance_all_rows_equally_and_continue() -> None:
    config = tiny_config()
    texts = Texts(TorchStepper(quantize(config, random_tensors(config), "int8")), 3)
    assert texts.chars_per_s(0.01) > 0
    positions = {row.position for row in texts._rows}
    assert len(positions) == 1
    assert [row.num_generated for row in texts._rows] == [row.position for row in texts._rows]
    before = positions.pop()
    texts.chars_per_s(0.01)
    assert texts._rows[0].position > before  # the same texts continue


def test_forty_lines__compute_the_same_network() -> None:
    """The state after 20 generated characters equals the reference network's."""
    config = tiny_config()
    tensors = random_tensors(config)
    chars = torch.zeros(2, dtype=torch.int64)
    generated, hidden = FortyLines(config, tensors).generate(chars, torch.zeros(2, config.num_units), 20)
    assert generated.shape == (2, 20)
    reference = GRUCharModel.from_tensors(config, tensors)
    with torch.inference_mode():
        read = torch.cat([chars[:, None], generated[:, :-1]], dim=1)
        _, expected = reference(read, reference.initial_hidden(2))
    np.testing.assert_allclose(hidden.numpy(), expected[0].numpy(), atol=1e-5)


def test_in_turns__alternates_and_does_not_count_the_first_round() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return len(calls)

    assert in_turns([lambda: measure("a"), lambda: measure("b")], 2) == [[3, 5], [4, 6]]
    assert calls == ["a", "b"] * 3


def test_decode__writes_its_numbers(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "numbers.json"
    words = ["--model", "tiny", "--model-store", str(tiny_store.root), "--rows", "1,64", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["decode", *words, "--seconds", "0.001", "--threads", "1", "--json", str(path)])
    decode.main()
    document = json.loads(path.read_text())
    assert set(document) == {"machine", "measured", "targets"}
    rows = [(result["what"], result["rows"], result["threads"]) for result in document["measured"]]
    names = ["torch stepper, int8", "forty lines of torch"]
    assert rows == [(name, number, 1) for number in (1, 64) for name in names]
    baselines = [result for result in document["measured"] if result["what"] == "forty lines of torch"]
    assert [result["ratio"] for result in baselines] == [{"median": 1, "min": 1, "max": 1}] * 2
    assert [target["at_least"] for target in document["targets"]] == [8, 3, 4]
    printed = capsys.readouterr().out
    assert all(printed.count(f"target {target['target']}: ") == 1 for target in document["targets"])


def measured_roofline(monkeypatch: pytest.MonkeyPatch, store: ModelStore, path: Path, *words: str) -> dict[str, Any]:
    """Run the roofline with a small model for a few milliseconds, and return the document that it writes."""
    place = ["--model", "tiny", "--model-store", str(store.root), "--json", str(path)]
    quick = ["--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    monkeypatch.setattr(sys, "argv", ["roofline", *place, *quick, *words])
    roofline.main()
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@needs_native
def test_roofline__compares_the_kernel_with_other_libraries(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that can't be installed is named, and the others are measured."""
    worker = [sys.executable, "-m", "tests.commands.numpy_peer"]

    def start_numpy(stack: ExitStack, name: str, shipped: Shipped, rows: Any, threads: Any) -> list[Candidate]:
        if name == "tensorflow":
            raise Skipped("no such package")
        return start_workers(stack, name, worker, shipped, rows, threads)

    monkeypatch.setattr(roofline, "peer_candidates", start_numpy)
    document = measured_roofline(monkeypatch, tiny_store, tmp_path / "numbers.json")
    assert document["skipped"] == {"tensorflow": "no such package"}
    names = {result["what"] for result in document["measured"]}
    assert {"kernel, int8", "kernel, int4", "torch stepper, int8", "onnxruntime", "forty lines of torch"} <= names
    assert [target["at_least"] for target in document["targets"] if "onnxruntime" in target["target"]] == [8]
    assert [(result["peer"], result["rows"], result["what"]) for result in document["peers"]] == [
        ("onnxruntime", rows, f"kernel, {precision}") for rows in (1, 256) for precision in ("int8", "int4")
    ]
    assert all(result["ratio"]["min"] > 0 for result in document["peers"])


@needs_native
def test_roofline__runs_without_other_libraries(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = measured_roofline(monkeypatch, tiny_store, tmp_path / "numbers.json", "--peers", "")
    assert (document["skipped"], document["peers"]) == ({}, [])
    assert not [target for target in document["targets"] if "onnxruntime" in target["target"]]


def test_start_workers__skips_a_library_that_computes_another_model_or_fails_to_start(
    tiny_store: ModelStore, tmp_path: Path
) -> None:
    other = ModelStore(tmp_path)
    publish_tiny(other, seed=1)
    shipped = Shipped.load("tiny", tiny_store.root, None)
    shipped = replace(shipped, directory=other.resolve("tiny").path)
    with ExitStack() as stack, pytest.raises(Skipped, match="not the model's"):
        start_workers(stack, "numpy", [sys.executable, "-m", "tests.commands.numpy_peer"], shipped, [1], [1])
    with ExitStack() as stack, pytest.raises(Skipped, match="No module named"):
        start_workers(stack, "numpy", [sys.executable, "-m", "tests.nothing_here"], shipped, [1], [1])


def test_environment__skips_with_the_reason_what_can_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_HERE", tmp_path)
    (tmp_path / "requirements-nothing.txt").write_text(f"{tmp_path}/nothing-1.0-py3-none-any.whl\n")
    for _ in range(2):  # the failed first attempt does not count as installed
        with pytest.raises(Skipped, match="nothing"):
            environment.environment("nothing")


@pytest.mark.parametrize("name", PEERS)
def test_requirements__of_other_libraries_pin_everything(name: str) -> None:
    folder = Path(environment.__file__).parent
    required, pinned = ((folder / f"requirements-{name}.{ending}").read_text().splitlines() for ending in ("in", "txt"))
    assert set(required) <= set(pinned)
    assert all("==" in line for line in pinned)


def test_all_benchmarks__include_every_one_that_the_docs_cite_and_no_other() -> None:
    root = Path(__file__).parents[2]
    texts = [path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    cited = {name for text in texts for name in re.findall(r"python -m benchmarks\.(\w+)", text)}
    runnable = {path.stem for path in (root / "benchmarks").glob("[a-z]*.py") if "\ndef main()" in path.read_text()}
    assert cited == runnable == set(all_benchmarks.BENCHMARKS)


def test_all_benchmarks__skip_one_whose_program_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(all_benchmarks.BENCHMARKS, "deploy", ("sh", "a-program-that-does-not-exist"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "deploy"])
    all_benchmarks.main()
    output = capfd.readouterr().out
    assert "deploy is skipped: a-program-that-does-not-exist is not installed" in output
    assert "make test-deploy" in output


def test_all_benchmarks__run_each_and_name_those_that_failed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("no_such_benchmark", "table"):  # `table` is a shared module: running it does nothing, successfully
        monkeypatch.setitem(all_benchmarks.BENCHMARKS, name, ())
    monkeypatch.setattr(sys, "argv", ["benchmarks", "no_such_benchmark", "table"])
    with pytest.raises(SystemExit, match=r"^failed: no_such_benchmark$"):
        all_benchmarks.main()
    assert "== table" in capfd.readouterr().out

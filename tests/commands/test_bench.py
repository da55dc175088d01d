"""`gru-serve bench` and the benchmarks: what they print and refuse; never how fast it was."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import decode, roofline
from benchmarks.baselines import FortyLines
from benchmarks.contestants import Contestant, Shipped
from benchmarks.pairs import in_turns
from benchmarks.peers import environment
from benchmarks.peers.contestants import PEERS, enter
from benchmarks.peers.environment import Skipped
from service.__main__ import main
from service.commands.bench import Texts
from service.engine.native.binding import variants
from service.engine.torch_stepper import TorchStepper
from service.model.gru import GRUCharModel
from service.model.quantize import quantize
from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny, random_tensors, tiny_config

needs_native = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")


def bench(store: ModelStore, *words: str) -> Result:
    place = ["--model", "tiny", "--model-store", str(store.root), "--seconds", "0.01", "--threads", "1"]
    return CliRunner().invoke(main, ["bench", *place, *words])


def test_bench_prints_one_json_document(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--rows", "3,1", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts) == {"model", "precision", "kernel", "threads", "cores", "load_s", "state_bytes", "rates"}
    assert (facts["model"], facts["precision"], facts["threads"]) == ("tiny@1", "int8", 1)
    assert facts["state_bytes"] == 4 * 16
    assert [rate["rows"] for rate in facts["rates"]] == [3, 1]
    for rate in facts["rates"]:
        assert set(rate) == {"rows", "chars_per_s", "min", "max"}
        assert 0 < rate["min"] <= rate["chars_per_s"] <= rate["max"]


def test_bench_prints_a_line_for_each_number_of_rows_and_progress_beside_it(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--rows", "1,2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny@1 in int8 on ")
    assert "the state of a text takes 64 bytes" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["rows", "1", "2"]
    assert "measuring 2 rows" in result.stderr
    assert "measuring" not in result.stdout


def test_bench_takes_the_precision_of_the_setting(tiny_store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PRECISION", "int4")
    assert json.loads(bench(tiny_store, "--rows", "1", "--json").stdout)["precision"] == "int4"


@pytest.mark.parametrize(
    "words",
    [["--rows", "x"], ["--rows", ""], ["--rows", "1,,2"], ["--rows", "0"], ["--rows", "65537"], ["--seconds", "0"],
     ["--seconds", "nan"], ["--threads", "0"], ["--colour", "red"]],
)  # fmt: skip
def test_bench_refuses_bad_usage(tiny_store: ModelStore, words: list[str]) -> None:
    result = bench(tiny_store, *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_bench_names_a_model_that_is_not_there(tiny_store: ModelStore) -> None:
    result = bench(tiny_store, "--model", "nope")
    assert result.exit_code == 1
    assert "no model 'nope'" in result.stderr


def test_bench_help_has_an_example() -> None:
    assert "Example: gru-serve bench" in CliRunner().invoke(main, ["bench", "--help"]).output


def test_texts_count_every_character_of_every_row() -> None:
    config = tiny_config()
    texts = Texts(TorchStepper(quantize(config, random_tensors(config), "int8")), 3)
    assert texts.chars_per_s(0.01) > 0
    positions = {row.position for row in texts._rows}
    assert len(positions) == 1
    assert [row.num_generated for row in texts._rows] == [row.position for row in texts._rows]
    before = positions.pop()
    texts.chars_per_s(0.01)
    assert texts._rows[0].position > before  # the same texts go on


def test_the_baseline_is_the_same_network() -> None:
    """Its state after 20 of its own characters is the reference's."""
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


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return len(calls)

    assert in_turns([lambda: measure("a"), lambda: measure("b")], 2) == [[3, 5], [4, 6]]
    assert calls == ["a", "b"] * 3


def test_decode_writes_its_numbers(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "numbers.json"
    words = ["--model", "tiny", "--model-store", str(tiny_store.root), "--rows", "1,64", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["decode", *words, "--seconds", "0.001", "--threads", "1", "--json", str(path)])
    decode.main()
    document = json.loads(path.read_text())
    assert set(document) == {"machine", "measured", "targets"}
    rows = [(one["what"], one["rows"], one["threads"]) for one in document["measured"]]
    names = ["torch stepper, int8", "forty lines of torch"]
    assert rows == [(name, number, 1) for number in (1, 64) for name in names]
    baselines = [one for one in document["measured"] if one["what"] == "forty lines of torch"]
    assert all(one["ratio"] == {"median": 1, "min": 1, "max": 1} for one in baselines)
    assert [target["at_least"] for target in document["targets"]] == [8, 3, 4]
    printed = capsys.readouterr().out
    assert all(printed.count(f"target {target['target']}: ") == 1 for target in document["targets"])


def measured_roofline(monkeypatch: pytest.MonkeyPatch, store: ModelStore, path: Path, *words: str) -> dict[str, Any]:
    """What the roofline of a small model writes in a few milliseconds."""
    place = ["--model", "tiny", "--model-store", str(store.root), "--json", str(path)]
    quick = ["--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    monkeypatch.setattr(sys, "argv", ["roofline", *place, *quick, *words])
    roofline.main()
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@needs_native
def test_the_roofline_has_the_kernel_beside_other_libraries(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can't be installed is named, and the others are measured."""
    worker = [sys.executable, "-m", "tests.commands.numpy_peer"]

    def numpy_is_there(stack: ExitStack, name: str, shipped: Shipped, rows: Any, threads: Any) -> list[Contestant]:
        if name == "tensorflow":
            raise Skipped("no such package")
        return enter(stack, name, worker, shipped, rows, threads)

    monkeypatch.setattr(roofline, "peer_contestants", numpy_is_there)
    document = measured_roofline(monkeypatch, tiny_store, tmp_path / "numbers.json")
    assert document["skipped"] == {"tensorflow": "no such package"}
    names = {one["what"] for one in document["measured"]}
    assert {"kernel, int8", "kernel, int4", "torch stepper, int8", "onnxruntime", "forty lines of torch"} <= names
    assert [target["at_least"] for target in document["targets"] if "onnxruntime" in target["target"]] == [8]
    assert [(one["peer"], one["rows"], one["what"]) for one in document["peers"]] == [
        ("onnxruntime", rows, f"kernel, {precision}") for rows in (1, 256) for precision in ("int8", "int4")
    ]
    assert all(one["ratio"]["min"] > 0 for one in document["peers"])


@needs_native
def test_the_roofline_runs_without_other_libraries(
    tiny_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = measured_roofline(monkeypatch, tiny_store, tmp_path / "numbers.json", "--peers", "")
    assert (document["skipped"], document["peers"]) == ({}, [])
    assert not [target for target in document["targets"] if "onnxruntime" in target["target"]]


def test_a_library_that_steps_another_model_is_skipped(tiny_store: ModelStore, tmp_path: Path) -> None:
    """And one that doesn't even start, with the reason."""
    other = ModelStore(tmp_path)
    publish_tiny(other, seed=1)
    shipped = Shipped.load("tiny", tiny_store.root, None)
    shipped = replace(shipped, directory=other.resolve("tiny").path)
    with ExitStack() as stack, pytest.raises(Skipped, match="not the model's"):
        enter(stack, "numpy", [sys.executable, "-m", "tests.commands.numpy_peer"], shipped, [1], [1])
    with ExitStack() as stack, pytest.raises(Skipped, match="No module named"):
        enter(stack, "numpy", [sys.executable, "-m", "tests.nothing_here"], shipped, [1], [1])


def test_what_can_not_be_installed_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_HERE", tmp_path)
    (tmp_path / "requirements-nothing.txt").write_text(f"{tmp_path}/nothing-1.0-py3-none-any.whl\n")
    for _ in range(2):  # the first attempt leaves nothing behind that counts as installed
        with pytest.raises(Skipped, match="nothing"):
            environment.environment("nothing")


@pytest.mark.parametrize("name", PEERS)
def test_other_libraries_come_with_everything_pinned(name: str) -> None:
    folder = Path(environment.__file__).parent
    asked, pinned = ((folder / f"requirements-{name}.{ending}").read_text().splitlines() for ending in ("in", "txt"))
    assert set(asked) <= set(pinned)
    assert all("==" in line for line in pinned)

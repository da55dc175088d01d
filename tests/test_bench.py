"""`gru-serve bench` and the benchmarks: what they print and refuse; never how fast it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import decode
from benchmarks.baselines import FortyLines
from benchmarks.pairs import in_turns
from service.__main__ import main
from service.commands.bench import Texts
from service.engine.torch_stepper import TorchStepper
from service.model.gru import GRUCharModel
from service.model.quantize import quantize
from service.store import ModelStore
from tests.conftest import random_tensors, tiny_config


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

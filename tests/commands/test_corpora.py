"""The texts that `gru-serve train` and `gru-serve eval` read."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny

SMALL = ["--embedding-dim", "8", "--num-units", "16", "--batch-size", "4", "--sequence-length", "16", "--epochs", "1"]
SMALL += ["--threads", "1"]  # the threads of torch wait for each other by spinning, which is slow on a busy machine


def run(*words: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, words)], input=stdin)


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Options with which a training run writes only to the test's folder."""
    return ["--model-store", str(tmp_path / "store"), "--checkpoint", str(tmp_path / "run.safetensors")]


def facts_of(tmp_path: Path, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / "store" / name / "1" / "training.json").read_text())
    return facts


def test_train__on_lines_gives_a_model_that_writes_one_item_from_an_empty_prompt(
    tmp_path: Path, place: list[str]
) -> None:
    chance = random.Random(1)
    names = sorted("".join(chance.choices("abc", k=chance.randint(1, 5))) for _ in range(2_000))
    (tmp_path / "names.txt").write_bytes("\r\n\r\n".join(names).encode())
    corpus = ["--corpus", tmp_path / "names.txt"]
    result = run("train", *corpus, "--name", "names", "--lines", *SMALL, "--learning-rate", "0.02", *place)
    assert result.exit_code == 0, result.output
    assert "names.txt: line ends of CR LF or CR became LF" in result.stderr
    facts = facts_of(tmp_path, "names")
    assert (facts["settings"]["lines"], facts["vocab_size"], facts["sample"]["prompt"]) == (True, 4, "")
    assert "--lines" in str(facts["command"]).split()
    card = (tmp_path / "store" / "names" / "1" / "README.md").read_text()
    assert "of 2,000 lines, spread evenly over the text" in card

    store = ["--model-store", tmp_path / "store"]
    loss = facts["losses"]["validation_nats_per_char"]
    for precision, tolerance in [("float32", 1e-6), ("int8", 0.02)]:
        words = ["names", *corpus, "--held-out", "--precision", precision, "--json", *store]
        measured = json.loads(run("eval", *words).stdout)
        assert measured["nats_per_char"] == pytest.approx(loss, abs=tolerance)
        assert measured["num_scored"] == facts["losses"]["validation_num_scored"] == measured["num_chars"] - 1
    whole = json.loads(run("eval", "names", *corpus, "--lines", "--json", *store).stdout)
    assert whole["num_chars"] == sum(map(len, names)) + len(names)
    assert whole["nats_per_char"] == pytest.approx(loss, abs=0.05)

    items = [
        run("generate", "--model", "names", "--prompt", "", "--stop", "\n", "--seed", seed, *store).stdout
        for seed in map(str, range(20))
    ]
    assert all(item.strip("abc") == "\n" for item in items)
    assert len(set(items)) > 5


def test_train__reads_files_folders_patterns_and_standard_input_as_documents(tmp_path: Path, place: list[str]) -> None:
    (tmp_path / "poems").mkdir()
    texts = [f"Poem number {number} is about the sea.\n" * 20 for number in range(6)]
    for number, text in enumerate(texts[:3]):
        (tmp_path / "poems" / f"{number}.txt").write_text(text)
    (tmp_path / "poems" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "x1.md").write_text(texts[3])
    (tmp_path / "x2.md").write_text(texts[4])
    corpora = ["--corpus", tmp_path / "poems", "--corpus", tmp_path / "*.md", "--corpus", "-"]
    result = run("train", *corpora, "--name", "poems", *SMALL, *place, stdin=texts[5].encode())
    assert result.exit_code == 0, result.output
    assert "6 files: binary, left out: picture.png" in result.stderr
    facts = facts_of(tmp_path, "poems")
    assert (facts["corpus"]["name"], facts["corpus"]["num_chars"]) == ("6 files", sum(map(len, texts)))
    assert "train --corpus poems --corpus '*.md' --corpus - --name poems" in str(facts["command"])
    store = ["--model-store", tmp_path / "store"]
    measured = run("eval", "poems", *corpora, "--last", "0.5", *store, stdin=texts[5].encode())
    assert "poems@1 on 6 files in float32: " in measured.stdout
    assert f", {sum(map(len, texts)) // 2:,} characters" in measured.stdout


def test_train__reads_a_file_whose_name_is_not_utf8(tmp_path: Path, place: list[str]) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9\x1b.txt")
    Path(path).write_text("The fox and the dog.\n" * 80)
    result = run("train", "--corpus", path, "--name", "fox", *SMALL, *place)
    assert result.exit_code == 0, result.output
    assert facts_of(tmp_path, "fox")["corpus"]["name"] == r"caf\xe9\x1b.txt"
    Path(path).write_bytes(b"\xff")
    for command in (["train", "--name", "fox", *place], ["eval", "fox", "--model-store", tmp_path / "store"]):
        result = run(*command, "--corpus", path)
        assert result.exit_code == 1
        assert rf"{tmp_path}/caf\xe9\x1b.txt is not UTF-8: byte 0xff at offset 0" in result.stderr
        assert len(result.stderr.splitlines()) == (2 if command[0] == "train" else 1)  # train first says what it reads


def test_train__folds_rare_characters_and_says_so(tmp_path: Path, place: list[str]) -> None:
    (tmp_path / "a.txt").write_text("The fox and the dog.\n" * 80 + "Café “字”" + "\nThe fox" * 30)
    words = ["--corpus", tmp_path / "a.txt", "--name", "fox", "--min-count", "10", *SMALL, *place]
    result = run("train", *words)
    assert result.exit_code == 0, result.output
    assert "a.txt: characters left out, " in result.stderr
    assert "a.txt: characters folded to known ones, " in result.stderr
    assert "é" not in json.loads((tmp_path / "store" / "fox" / "1" / "config.json").read_text())["charset"]


def test_train__with_a_charset_and_folding_publishes(tmp_path: Path, place: list[str]) -> None:
    """The sample on the card begins with the held-out text as the model reads it."""
    (tmp_path / "a.txt").write_text("Thé föx and the dög.\n" * 80)
    for unknown in ("fold", "drop"):
        words = ["--charset", "\n ,.Tadefghnotx", "--unknown-chars", unknown, "--overwrite"]
        result = run("train", "--corpus", tmp_path / "a.txt", "--name", unknown, *words, *SMALL, *place)
        assert result.exit_code == 0, result.output
        assert f"published {unknown}@1" in result.output


def test_eval__of_held_out_text_refuses_another_text_and_other_options(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path))
    (tmp_path / "a.txt").write_text("ROMEO: " * 10)
    words = ["eval", "tiny", "--corpus", tmp_path / "a.txt", "--held-out", "--model-store", tmp_path]
    assert run(*words, "--last", "0.5").exit_code == 2
    assert run(*words, "--lines").exit_code == 2
    result = run(*words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "tiny@1 doesn't say how it was trained" in result.stderr
    facts = {"settings": {"validation_fraction": 0.1}, "corpus": {"sha256": "0" * 64}}
    publish_tiny(ModelStore(tmp_path), facts=facts)
    assert "a.txt is not the corpus that tiny@2 was trained on" in run(*words).stderr

"""`gru-serve import` and `gru-serve export`: what they publish, write and say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from service.__main__ import main
from service.importing.float_loss import float_loss
from service.model.artifact import read_artifact
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.store.model_store import ModelStore
from service.training.evaluation import text_loss
from tests.harness.foreign_models import CHARSET, keras_weights, subclassed, write_hdf5
from tests.harness.models import publish_tiny, random_tensors, tiny_config

CORPUS = "a cab\nbad hag!\n'fed' dead egg\n" * 40


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def store(tmp_path: Path) -> list[str]:
    return ["--model-store", str(tmp_path / "store")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """Weights as those of the tutorial: a row for [UNK] comes first."""
    weights = keras_weights(2, vocab=len(set(CORPUS)) + 1)
    return write_hdf5(tmp_path / "tutorial.weights.h5", subclassed(weights, ("gru1", "gru2")))


def test_import__measures_marks_the_precision_and_writes_a_card(
    tutorial: Path, corpus: Path, store: list[str], tmp_path: Path
) -> None:
    words = ["import", str(tutorial), "--name", "mine", "--charset-from", str(corpus), "--corpus", str(corpus)]
    result = run(*words, *store)
    assert result.exit_code == 0, result.output
    version = tmp_path / "store" / "mine" / "1"
    facts = json.loads((version / "training.json").read_text())
    losses = facts["losses"]["validation_nats_per_char_by_precision"]
    assert facts["serving_precision"] == ("int4" if losses["int4"] <= losses["float32"] + 0.003 else "int8")
    sha256 = hashlib.sha256(tutorial.read_bytes()).hexdigest()
    card = (version / "README.md").read_text()
    for part in (sha256, "tutorial.weights.h5", "Keras weights", f"{losses['int8']:.4f}", facts["command"], "[UNK]"):
        assert part in card
    assert str(tmp_path) not in card + json.dumps(facts)
    assert facts["command"] == (
        "gru-serve import tutorial.weights.h5 --name mine --charset-from corpus.txt --corpus corpus.txt"
    )
    assert facts["imported"]["sha256"] == sha256
    assert read_artifact(version).config.charset == "".join(sorted(set(CORPUS)))
    measured = json.loads(run("eval", "mine", "--corpus", str(corpus), "--json", *store).stdout)
    assert measured["nats_per_char"] == pytest.approx(losses["float32"], abs=1e-6)
    shown = run("models", "show", "mine", *store)
    assert shown.exit_code == 0, shown.output


def test_import__without_a_text_says_that_nothing_was_measured(tutorial: Path, corpus: Path, store: list[str]) -> None:
    result = run("import", str(tutorial), "--name", "mine", "--charset-from", str(corpus), *store)
    assert result.exit_code == 0, result.output
    assert "nothing was measured" in result.stderr
    assert "next: gru-serve generate --model mine" in result.stderr
    root = Path(store[1])
    assert "Nothing was measured" in (root / "mine" / "1" / "README.md").read_text()
    assert run("models", "verify", *store).exit_code == 0
    assert run("generate", "--model", "mine", "--prompt", "a", "--max-tokens", "5", *store).exit_code == 0


CHARSETS = {
    "text": (CHARSET, None),
    "file": (None, CHARSET),
    "edited file": (None, CHARSET.lstrip("\n") + "\n"),
    "list": (None, json.dumps(list(CHARSET))),
    "char2idx": (None, json.dumps({char: index for index, char in enumerate(CHARSET)})),
    "idx2char": (None, json.dumps(dict(enumerate(CHARSET)))),
}


@pytest.mark.parametrize("kind", CHARSETS)
def test_import__charset_is_given_in_many_forms(tmp_path: Path, store: list[str], kind: str) -> None:
    text, content = CHARSETS[kind]
    path = write_hdf5(tmp_path / "m.weights.h5", subclassed(keras_weights()))
    if content is not None:
        (tmp_path / "chars").write_text(content)
    words = ["import", str(path), "--name", "m", "--charset", text if text is not None else str(tmp_path / "chars")]
    result = run(*words, *store)
    assert result.exit_code == 0, result.output
    charset = read_artifact(Path(store[1]) / "m" / "1").config.charset
    assert charset == (CHARSET if kind != "edited file" else CHARSET.lstrip("\n") + "\n")


MISTAKES = [
    ([], 1, "give the text that it was trained on with --charset-from"),
    (["--charset", "abc"], 1, "--charset has 3 characters and the model 12 rows"),
    (["--charset", "aabcdefghijk"], 1, "'a' (U+0061) twice"),
    (["--charset", CHARSET, "--charset-from", "x"], 2, "give the characters once"),
    (["--charset-from", "absent.txt"], 1, "can't read absent.txt"),
    (["--charset", CHARSET, "--layers-from", "x"], 1, "doesn't name each GRU layer once"),
]


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES)
def test_import__mistakes_say_what_to_do(
    tmp_path: Path, store: list[str], words: list[str], code: int, message: str
) -> None:
    path = write_hdf5(tmp_path / "m.weights.h5", subclassed(keras_weights()))
    result = run("import", str(path), "--name", "m", *words, *store)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not (Path(store[1]) / "m" / "1").exists()


def test_import__needs_neither_torch_nor_tensorflow(tutorial: Path, corpus: Path, store: list[str]) -> None:
    code = """
import sys
for name in ("torch", "tensorflow", "keras", "onnx"):
    sys.modules[name] = None
from service.__main__ import main
main()
"""
    words = ["import", str(tutorial), "--name", "m", "--charset-from", str(corpus), *store]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "published m@1" in done.stderr


@pytest.mark.parametrize("form", ["torch", "onnx", "keras"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_export__import_of_it_gives_the_same_digest(
    tmp_path: Path, store: list[str], form: str, num_layers: int
) -> None:
    models = ModelStore(tmp_path / "store")
    publish_tiny(models, num_layers=num_layers, charset="\n aé'\"\\中😀")
    path = tmp_path / f"m.{form}"
    result = run("export", "tiny", "--format", form, "--output", str(path), *store)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
    assert run("import", str(path), "--name", "back", *store).exit_code == 0
    digests = [models.describe(models.resolve(name)).digest for name in ("tiny", "back")]
    assert digests[0] == digests[1]


def test_export__torch_computes_the_same(tmp_path: Path, store: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModelStore(tmp_path / "store")
    publish_tiny(models, num_layers=2)
    monkeypatch.chdir(tmp_path)
    assert run("export", "tiny", "--format", "torch", *store).stdout == "tiny-1.pt\n"
    checkpoint = torch.load(tmp_path / "tiny-1.pt", weights_only=True)
    artifact = models.load("tiny")[1]
    model = GRUCharModel(artifact.config)
    model.load_state_dict(checkpoint["state_dict"])
    for name, array in artifact.tensors.items():
        assert np.array_equal(model.state_dict()[name].numpy(), array)
    assert checkpoint["charset"] == artifact.config.charset
    again = run("export", "tiny", "--format", "torch", *store)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_float_loss__is_that_of_torch() -> None:
    config = tiny_config(num_layers=2)
    tensors = random_tensors(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 1500)
    for text in (EncodedText(ids, np.array([0])), EncodedText(ids, np.array([0, 1, 700]), scores_starts=False),
                 EncodedText(ids, np.array([0, 600]))):  # fmt: skip
        counted: list[int] = []
        found = float_loss(config, tensors, text, counted.append)
        expected = text_loss(FoldedGRU(GRUCharModel.from_tensors(config, tensors)), text)
        assert found == pytest.approx(expected.nats_per_char, abs=1e-6)
        assert sum(counted) == text.num_scored == expected.num_scored

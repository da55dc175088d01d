"""`gru-serve eval --beginnings`: how well a model continues a short prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.commands.eval import measure
from service.model.encoded_text import EncodedText
from service.store.model_store import ModelStore
from tests.harness.models import TINY_CHARSET, publish_tiny


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_eval__of_beginnings_is_the_mean_over_places_read_one_at_a_time(tmp_path: Path, precision: str) -> None:
    store = ModelStore(tmp_path / "store")
    publish_tiny(store)
    _, artifact = store.load("tiny")
    lengths = [700, 10, 400]  # the second document is too short for a place
    ids = np.array(random.Random(1).choices(range(len(TINY_CHARSET)), k=sum(lengths)))
    text = "".join(TINY_CHARSET[char] for char in ids)
    words: list[object] = ["eval", "tiny", "--precision", precision, "--model-store", tmp_path / "store"]
    for number, start in enumerate((0, 700, 710)):
        path = tmp_path / f"{number}.txt"
        path.write_text(text[start : start + lengths[number]])
        words += ["--corpus", path]
    losses = []
    for number in range(75):  # more than are read side by side
        place = (2 * number + 1) * (690 + 390) // (2 * 75)
        place += 20 if place >= 690 else 0  # the last 10 characters of the first document, and the second one
        piece = EncodedText(ids[place : place + 11], np.zeros(1, np.int64))
        losses.append(measure(artifact.config, artifact.tensors, precision, piece, lambda _: None))
    result = run(*words, "--beginnings", 75, "--beginning-chars", 10, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["nats_per_char"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert (facts["beginnings"], facts["beginning_chars"], facts["num_scored"]) == (75, 10, 750)


def test_eval__says_what_it_measured_at_the_beginnings(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path / "store"))
    corpus = tmp_path / "a.txt"
    corpus.write_text("ROMEO: " * 20)
    words = ["eval", "tiny", "--corpus", corpus, "--model-store", tmp_path / "store"]
    result = run(*words, "--beginnings", 2000)
    assert "the first 100 after the zero state at 40 places" in result.stdout  # there are no more
    refused = run(*words, "--beginnings", 5, "--beginning-chars", 140)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
    assert "the longest text has 140 characters: --beginning-chars must be lower" in refused.stderr
    for more in (["--beginning-chars", 5], ["--beginnings", 5, "--lines"]):
        assert run(*words, *more).exit_code == 2

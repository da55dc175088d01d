"""The model that is shipped: whole, of the tutorial's sizes, and one that has learnt its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.loaded import LoadedModel
from service.model.artifact import read_artifact
from service.store import ModelStore
from service.training.evaluate import text_loss
from tests.conftest import publish_tiny

ROOT = Path(__file__).parent.parent
STORE = ModelStore(ROOT / "model_store")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel(*STORE.load("shakespeare@1"))


def test_it_has_the_tutorials_sizes_and_fits_its_limit() -> None:
    config = read_artifact(STORE.resolve("shakespeare@1").path).config
    assert (config.embedding_dim, config.num_units, config.num_layers, config.vocab_size) == (256, 1024, 1, 65)
    assert config.num_parameters == 4_021_569
    assert sum(path.stat().st_size for path in (ROOT / "model_store").rglob("*") if path.is_file()) <= 17_000_000


def test_its_card_tells_the_loss_and_how_to_make_it_again() -> None:
    version = STORE.resolve("shakespeare@1")
    facts = STORE.describe(version).training
    loss = facts.losses.validation_nats_per_char
    assert loss is not None
    assert loss <= 1.455
    card = (version.path / "README.md").read_text()
    assert f"{loss:.4f}" in card
    assert "gru-serve train --corpus tinyshakespeare.txt --name shakespeare" in card


def test_it_has_learnt_and_an_untrained_model_has_not(model: LoadedModel, tmp_path: Path) -> None:
    sample = read_artifact(model.version.path).training.model_dump()["sample"]
    text = sample["prompt"] + sample["text"]
    assert text_loss(model.network, model.charset.encode(text)).nats_per_char < 1.5
    store = ModelStore(tmp_path)
    publish_tiny(store, charset=model.charset.characters)
    untrained = LoadedModel(*store.load("tiny"))
    assert text_loss(untrained.network, untrained.charset.encode(text)).nats_per_char > 3.5


def test_shuffled_text_surprises_it(model: LoadedModel) -> None:
    # Words and their order, not only the frequency of letters.
    text = "What say you, my good lord? I will not speak with him again to-night."
    forwards, backwards = (text_loss(model.network, model.charset.encode(t)).nats_per_char for t in (text, text[::-1]))
    assert forwards < 1.8
    assert backwards > 3

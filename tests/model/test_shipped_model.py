"""The shipped model: it is whole, it has the sizes of the tutorial's model, and it has learnt its text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.engine.kernels import choose_kernel
from service.engine.stepper import mean_loss
from service.model.artifact import Artifact, read_artifact
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.model.quantize import IntegerPrecision
from service.store.model_store import ModelStore
from service.training.evaluation import text_loss
from tests.harness.models import publish_tiny

ROOT = Path(__file__).parents[2]
STORE = ModelStore(ROOT / "model_store")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return read_artifact(STORE.resolve("shakespeare").path)


@pytest.fixture(scope="module")
def sample(artifact: Artifact) -> str:
    """A text by the model itself."""
    sample = artifact.training.model_dump()["sample"]
    text: str = sample["prompt"] + sample["text"]
    return text


@pytest.fixture(scope="module")
def sample_loss(artifact: Artifact, sample: str) -> float:
    return loss(artifact, sample)


def loss(artifact: Artifact, text: str) -> float:
    """Return the loss in nats a character, in float32."""
    network = FoldedGRU(GRUCharModel.from_tensors(artifact.config, artifact.tensors))
    return text_loss(network, encoded(artifact, text)).nats_per_char


def encoded(artifact: Artifact, text: str) -> EncodedText:
    return EncodedText(artifact.charset.encode(text), np.zeros(1, np.int64))


def test_shipped_model__has_the_tutorials_sizes_and_fits_its_limit() -> None:
    for version in STORE.versions("shakespeare"):
        config = read_artifact(version.path).config
        assert (config.embedding_dim, config.num_units, config.num_layers, config.vocab_size) == (256, 1024, 1, 65)
        assert config.num_parameters == 4_021_569
        assert sum(path.stat().st_size for path in version.path.rglob("*") if path.is_file()) <= 17_000_000


def test_card__states_the_loss_and_the_command_that_trained_it() -> None:
    version = STORE.resolve("shakespeare")
    facts = STORE.describe(version).training
    validation_loss = facts.losses.validation_nats_per_char
    assert validation_loss is not None
    assert validation_loss <= 1.43
    card = (version.path / "README.md").read_text()
    assert f"{validation_loss:.4f}" in card
    assert "gru-serve train --corpus tinyshakespeare.txt --name shakespeare" in card


def test_loss__is_low_and_that_of_an_untrained_model_is_high(
    artifact: Artifact, sample: str, sample_loss: float, tmp_path: Path
) -> None:
    assert sample_loss < 1.5
    store = ModelStore(tmp_path)
    publish_tiny(store, charset=artifact.charset.characters)
    assert loss(store.load("tiny")[1], sample) > 3.5


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_loss__in_integers_is_that_of_float32(
    artifact: Artifact, sample: str, sample_loss: float, precision: IntegerPrecision
) -> None:
    stepper, _ = choose_kernel("auto", 1).load(artifact.config, artifact.tensors, precision)
    assert abs(mean_loss(stepper, encoded(artifact, sample)) - sample_loss) < 0.05


def test_loss__of_reversed_text_is_high(artifact: Artifact) -> None:
    # It has learnt words and their order, not only the frequency of letters.
    text = "What say you, my good lord? I will not speak with him again to-night."
    assert loss(artifact, text) < 1.8
    assert loss(artifact, text[::-1]) > 3

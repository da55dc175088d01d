"""The loss of a text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from service.errors import InvalidCorpus
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training import evaluate
from service.training.network import initialise
from tests.harness.models import tiny_config


@pytest.fixture
def model() -> GRUCharModel:
    model = GRUCharModel(tiny_config())
    initialise(model, 2)
    return model


def test_it_is_the_mean_over_all_characters_but_the_first(model: GRUCharModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 500)
    logits, _ = model(torch.from_numpy(ids[None, :-1]), model.initial_hidden(1))
    expected = F.cross_entropy(logits[0], torch.from_numpy(ids[1:])).item()
    for chunk in (7, 499, 500, 2048):
        monkeypatch.setattr(evaluate, "_CHUNK", chunk)
        counted: list[int] = []
        loss = evaluate.text_loss(FoldedGRU(model), ids, counted.append)
        assert loss.nats_per_char == pytest.approx(expected, abs=1e-5)
        assert loss.bits_per_char == pytest.approx(expected / math.log(2), abs=1e-5)
        assert (loss.num_chars, loss.num_scored, sum(counted)) == (500, 499, 499)


def test_a_text_without_a_second_character_has_no_loss(model: GRUCharModel) -> None:
    for length in (0, 1):
        with pytest.raises(InvalidCorpus, match="nothing to predict"):
            evaluate.text_loss(FoldedGRU(model), np.zeros(length, np.int64))

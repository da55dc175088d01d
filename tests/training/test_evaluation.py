"""The loss of a text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from service.errors import InvalidCorpus
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training import evaluation
from service.training.network import WindowLoss, initialise
from tests.harness.models import tiny_config


@pytest.fixture
def model() -> GRUCharModel:
    model = GRUCharModel(tiny_config())
    initialise(model, 2)
    return model


def random_text(model: GRUCharModel, num_chars: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, num_chars)


def one_text(ids: np.ndarray) -> EncodedText:
    return EncodedText(ids, np.zeros(1, np.int64))


def test_text_loss__is_the_mean_over_all_characters_but_the_first(
    model: GRUCharModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_text(model, 500)
    logits, _ = model(torch.from_numpy(ids[None, :-1]), model.initial_hidden(1))
    expected = F.cross_entropy(logits[0], torch.from_numpy(ids[1:])).item()
    for chunk in (7, 499, 500, 2048):
        monkeypatch.setattr(evaluation, "_CHUNK", chunk)
        reported: list[int] = []
        loss = evaluation.text_loss(FoldedGRU(model), one_text(ids), reported.append)
        assert loss.nats_per_char == pytest.approx(expected, abs=1e-5)
        assert loss.bits_per_char == pytest.approx(expected / math.log(2), abs=1e-5)
        assert (loss.num_chars, loss.num_scored, sum(reported)) == (500, 499, 499)


def test_text_loss__refuses_a_text_without_a_second_character(model: GRUCharModel) -> None:
    for length in (0, 1):
        with pytest.raises(InvalidCorpus, match="at least two are needed"):
            evaluation.text_loss(FoldedGRU(model), one_text(np.zeros(length, np.int64)))


@pytest.mark.parametrize("num_chars", [9, 512])
def test_streamed_loss__of_a_single_stream_is_the_exact_loss(model: GRUCharModel, num_chars: int) -> None:
    """Fewer than 512 predicted characters are read as one stream, whose state starts at zero as in the exact loss."""
    ids = random_text(model, num_chars)
    exact = evaluation.text_loss(FoldedGRU(model), one_text(ids)).nats_per_char
    with torch.no_grad():
        loss = evaluation.streamed_loss(WindowLoss(model, torch.float32), one_text(ids))
    assert loss == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("scores_starts", [True, False])
def test_losses__read_each_text_from_the_zero_state(
    model: GRUCharModel, scores_starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value is that of reading the texts one by one; the first character of all is never scored."""
    lengths = [40, 1, 700, 3, 300]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = random_text(model, sum(lengths))
    encoded = EncodedText(ids, starts, scores_starts)
    losses = []
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        text = torch.from_numpy(ids[start : start + length])
        logits, _ = model(text[None], model.initial_hidden(1))
        predictions = torch.cat((model.dense(torch.zeros(1, 16)), logits[0]))[:length]
        text_losses = F.cross_entropy(predictions, text, reduction="none")
        losses.append(text_losses if scores_starts and number > 0 else text_losses[1:])
    expected = torch.cat(losses).mean().item()
    reported: list[int] = []
    with torch.no_grad():
        loss = evaluation.streamed_loss(WindowLoss(model, torch.float32), encoded, reported.append)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert sum(reported) == encoded.num_scored == len(torch.cat(losses))
    for chunk in (1, 300, 2048):
        monkeypatch.setattr(evaluation, "_CHUNK", chunk)
        reported.clear()
        exact = evaluation.text_loss(FoldedGRU(model), encoded, reported.append)
        assert exact.nats_per_char == pytest.approx(expected, abs=1e-5)
        assert exact.num_scored == encoded.num_scored == sum(reported)


@pytest.mark.parametrize("scores_starts", [True, False])
def test_side_by_side_loss__is_that_of_texts_read_one_at_a_time(model: GRUCharModel, scores_starts: bool) -> None:
    lengths = np.random.default_rng(2).integers(1, 400, 90)  # some are longer than a stream's usual warm-up
    text = EncodedText.of_lengths(random_text(model, int(lengths.sum())), lengths, scores_starts)
    reported: list[int] = []
    loss = evaluation.side_by_side_loss(model, text, reported.append)
    assert loss == pytest.approx(evaluation.text_loss(FoldedGRU(model), text).nats_per_char, abs=1e-6)
    assert sum(reported) == text.num_scored
    assert evaluation.side_by_side_loss(model, one_text(random_text(model, 500))) is None
    long = EncodedText.of_lengths(random_text(model, 3000), np.array([2900] + [1] * 100))
    assert evaluation.side_by_side_loss(model, long) is None


def test_streamed_loss__can_be_interrupted_between_windows(model: GRUCharModel) -> None:
    text = one_text(random_text(model, 100_000))
    window_loss, reported = WindowLoss(model, torch.float32), [0]

    def stop(num_chars: int) -> None:
        reported.append(num_chars)
        raise InterruptedError

    with torch.no_grad():
        loss = evaluation.streamed_loss(window_loss, text)
        with pytest.raises(InterruptedError):
            evaluation.streamed_loss(window_loss, text, stop)
        assert len(reported) == 2
        assert evaluation.streamed_loss(window_loss, text) == loss

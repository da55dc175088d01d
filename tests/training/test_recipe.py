"""The settings that are chosen by the size of a text: they suit it, and never replace what the user gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.encoded_text import EncodedText
from service.training.checkpoint import Evaluation
from service.training.corpus import read_corpus
from service.training.hyperparameters import CHOSEN, Hyperparameters
from service.training.optimisation import learning_rate
from service.training.recipe import MIN_CHARS, MIN_UPDATES, choose, limit_time
from service.training.streams import Streams
from service.training.trainer import Trainer

GIVEN = {
    "num_units": st.integers(1, 2048), "batch_size": st.integers(1, 4096), "sequence_length": st.integers(1, 4096),
    "restart_interval": st.just(0) | st.integers(2, 9999), "epochs": st.integers(1, 10_000),
    "warmup_steps": st.integers(0, 9999), "weight_decay": st.floats(0, 10), "input_dropout": st.floats(0, 0.9),
    "recurrent_dropout": st.floats(0, 0.9),
    "output_dropout": st.floats(0, 0.9), "eval_interval": st.integers(0, 9999), "patience": st.integers(0, 9999),
    "lines": st.booleans(), "learning_rate": st.floats(1e-6, 1),
}  # fmt: skip
SIZES = st.integers(2, 3_000_000_000)


def updates(chosen: Hyperparameters, num_chars: int) -> int:
    return chosen.epochs * math.ceil(num_chars / (chosen.batch_size * chosen.sequence_length))


@given(own=st.fixed_dictionaries({}, optional=GIVEN), num_chars=SIZES, num_texts=st.integers(1, 10**6))
def test_choose__keeps_what_is_given_and_chooses_valid_values(
    own: dict[str, Any], num_chars: int, num_texts: int
) -> None:
    chosen = choose(Hyperparameters(**own), num_chars, num_texts).settings
    assert {name: getattr(chosen, name) for name in own} == own
    assert Hyperparameters.model_validate(chosen.model_dump()) == chosen
    assert chosen.model_fields_set >= set(CHOSEN)
    others = set(Hyperparameters.model_fields) - set(CHOSEN) - set(own)
    assert all(getattr(chosen, name) == Hyperparameters.model_fields[name].default for name in others)
    assert choose(chosen, num_chars, num_texts).settings == chosen  # the card's command repeats the run


@given(own=st.fixed_dictionaries({}, optional={"epochs": GIVEN["epochs"], "batch_size": GIVEN["batch_size"]}), n=SIZES)
def test_choose__warm_up_and_evaluations_fit_the_number_of_updates(own: dict[str, Any], n: int) -> None:
    chosen = choose(Hyperparameters(**own), n).settings
    total = chosen.num_updates(n)
    assert total == updates(chosen, n)
    assert chosen.warmup_steps <= total / 10
    evaluations = math.ceil(total / chosen.eval_interval)
    assert 1 <= evaluations <= 200
    assert evaluations >= min(20, total // 10)
    assert 1 <= chosen.patience <= evaluations


@given(n=SIZES, held=st.integers(2, 200_000), max_chars=st.integers(1, 10**9))
def test_choose__a_short_run_on_a_long_text_fits_its_limit(n: int, held: int, max_chars: int) -> None:
    chosen = choose(Hyperparameters(max_chars=max_chars), n, num_held_out=held).settings
    total, in_an_update = chosen.num_updates(n), chosen.batch_size * chosen.sequence_length
    assert total == min(updates(chosen, n), math.ceil(max_chars / in_an_update))
    assert chosen.warmup_steps <= total / 10
    assert 1 <= chosen.eval_interval <= total
    # Evaluations, which read about three times as fast, take at most a fifth of the time, except the last one.
    assert (total // chosen.eval_interval - 1) * held / 3 <= 0.2 * total * in_an_update
    if max_chars >= 100_000:  # small batches give even a short run enough updates
        assert total >= min(MIN_UPDATES, updates(chosen, n))
    if max_chars <= n:  # nothing is read twice
        assert chosen.input_dropout == chosen.recurrent_dropout == chosen.output_dropout == 0


@given(
    seconds=st.integers(60, 10**6),
    pace=st.floats(100, 10**6),
    n=st.integers(10_000, 10**9),
    held=st.integers(2, 200_000),
)
def test_limit_time__has_time_for_evaluations(seconds: int, pace: float, n: int, held: int) -> None:
    limited = limit_time(Hyperparameters(), seconds, pace, n, 1, held)
    assert 0.8 * seconds * pace - held / 3 - 1 <= limited.max_chars <= seconds * pace
    chosen = choose(limited, n, 1, held).settings
    num_evaluations = chosen.num_updates(n) // chosen.eval_interval
    num_read = chosen.num_updates(n) * chosen.batch_size * chosen.sequence_length
    in_an_update = chosen.batch_size * chosen.sequence_length
    assert num_read + num_evaluations * held / 3 <= 1.2 * seconds * pace + 2 * held + in_an_update


@given(small=SIZES, large=SIZES)
def test_choose__more_text_means_larger_batches_and_less_against_overfitting(small: int, large: int) -> None:
    small, large = sorted((small, large))
    less, more = choose(Hyperparameters(), small).settings, choose(Hyperparameters(), large).settings
    for name in ("num_units", "batch_size", "sequence_length"):
        assert getattr(less, name) <= getattr(more, name)
    for name in ("epochs", "weight_decay", "input_dropout", "recurrent_dropout", "output_dropout"):
        assert getattr(less, name) >= getattr(more, name)


@given(num_chars=st.integers(MIN_CHARS, 3_000_000_000))
def test_choose__every_text_that_is_long_enough_gets_enough_updates_without_a_warning(num_chars: int) -> None:
    recipe = choose(Hyperparameters(), num_chars)
    assert updates(recipe.settings, num_chars) >= MIN_UPDATES
    assert not [line for line in recipe.lines if line.startswith("warning")]


def test_choose__a_million_characters_get_the_defaults_of_the_shipped_model() -> None:
    chosen, defaults = choose(Hyperparameters(), 1_003_854).settings, Hyperparameters()
    for name in set(CHOSEN) - {"eval_interval", "patience", "epochs", "weight_decay"}:
        assert getattr(chosen, name) == pytest.approx(getattr(defaults, name), abs=0.02), name
    assert chosen.epochs in (29, 30)
    assert chosen.weight_decay == pytest.approx(1.0, abs=0.05)


def test_choose__time_grows_more_slowly_than_a_long_text() -> None:
    hours = []
    for num_chars in (10**7, 10**8, 10**9):
        chosen = choose(Hyperparameters(), num_chars).settings
        hours.append(chosen.epochs * num_chars / 10_000 / 3600)
    assert hours[0] < 4
    assert hours[1] < 12
    assert hours[2] < 36


def test_choose__says_what_it_chose_and_nothing_if_everything_is_given() -> None:
    recipe = choose(Hyperparameters(epochs=50), 9_000)
    assert recipe.lines[0].startswith(
        "chosen for 9,000 characters to train on, 900 updates: --num-units 512 --batch-size 8"
    )
    assert "--epochs" not in recipe.lines[0]
    assert choose(recipe.settings, 9_000).lines == ()
    assert not [line for line in choose(Hyperparameters(), 1_000_000).lines if "idle cores" in line]
    assert "hours; --minutes or --epochs shortens it" in choose(Hyperparameters(), 100_000_000).lines[-1]


@pytest.mark.parametrize(
    ("own", "num_chars", "advice"),
    [
        ({}, MIN_CHARS - 1, "add text"),
        ({"batch_size": 64, "sequence_length": 100, "epochs": 30}, 9_000, "lower --batch-size"),
        ({"epochs": 1}, 20_000, "raise --epochs"),
        ({"warmup_steps": 100, "epochs": 10}, 9_000, "lower --warmup-steps"),
        ({"max_chars": 50_000}, 10**8, "raise --max-chars"),
    ],
)
def test_choose__warns_of_too_little_with_advice(own: dict[str, Any], num_chars: int, advice: str) -> None:
    warnings = [line for line in choose(Hyperparameters(**own), num_chars).lines if line.startswith("warning")]
    assert any(advice in line for line in warnings), warnings


def test_choose__lines_and_short_texts_begin_by_themselves() -> None:
    assert choose(Hyperparameters(), 10**6, 1).settings.restart_interval == 500
    assert choose(Hyperparameters(), 10**6, 10**5).settings.restart_interval == 0
    assert choose(Hyperparameters(lines=True), 10**6, 10).settings.restart_interval == 0
    assert choose(Hyperparameters(lines=True, restart_interval=7), 10**6, 10).settings.restart_interval == 7


@settings(max_examples=30)
@given(batch=st.integers(1, 70), steps=st.integers(1, 120), num_chars=st.integers(2, 20_000))
def test_choose__counts_updates_as_the_streams_do(batch: int, steps: int, num_chars: int) -> None:
    text = EncodedText(np.zeros(num_chars, np.uint8), np.zeros(1, np.int64))
    recipe = choose(Hyperparameters(batch_size=batch, sequence_length=steps, epochs=1), num_chars)
    assert f", {Streams(text, batch, steps, 1).windows_per_epoch:,} updates" in recipe.lines[0]


@given(num_chars=st.integers(2, 10**7), epochs=st.integers(1, 50))
def test_choose__learning_rate_reaches_its_peak_early_in_every_run(num_chars: int, epochs: int) -> None:
    chosen = choose(Hyperparameters(epochs=epochs), num_chars).settings
    total = updates(chosen, num_chars)
    assert learning_rate(chosen, total // 10, total) == pytest.approx(chosen.learning_rate, rel=0.05)


class Losses:
    """Records the validation losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def updated(self, step: int, loss: float) -> None:
        pass

    def evaluating(self, num_chars: int) -> None:
        pass

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        self.losses.append(point.validation_loss)


def test_trainer__learns_a_tiny_text_with_the_chosen_settings(tmp_path: Path) -> None:
    words = "the old king of the north said to his son that no man may cross the river at night and live to see the sun"
    draws = np.random.default_rng(1)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(draws.choice(words.split(), 1400)))
    own = Hyperparameters(num_units=64, embedding_dim=16, threads=1)
    corpus = read_corpus([text], own)
    chosen = choose(own, corpus.num_training_chars).settings
    uniform = math.log(len(corpus.charset.characters))
    seen = []
    for values in (chosen, own):
        trainer, losses = Trainer(corpus, values, tmp_path / "run"), Losses()
        trainer.run(losses)
        seen.append(min(losses.losses))
    assert seen[0] < 0.5 * uniform
    assert seen[1] > seen[0] + 0.3  # the fixed defaults, whose warm-up is longer than the run

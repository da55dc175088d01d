"""Training runs: they learn, they stop, and they go on exactly where they stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from service.errors import InvalidCheckpoint, InvalidCorpus, TrainingDiverged, UnknownCharacters
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training.checkpoint import Evaluation, read_state
from service.training.corpus import Corpus
from service.training.evaluate import text_loss
from service.training.hyperparameters import Hyperparameters
from service.training.schedule import learning_rate
from service.training.trainer import Trainer, streamed_loss

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
CORPUS = Corpus("fox.txt", TEXT, "0" * 64)
SETTINGS = Hyperparameters(
    embedding_dim=8, num_units=24, num_layers=2, batch_size=4, sequence_length=16, epochs=3, learning_rate=0.01,
    warmup_steps=5, eval_interval=20, average_decay=0.9, weight_decay=0.01,
)  # fmt: skip


class Watch:
    """Records what a run tells, and asks it to stop after a number of updates."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.losses: list[float] = []
        self.points: list[Evaluation] = []
        self.stop_after = stop_after

    def updated(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        self.points.append(point)

    def stopped(self) -> bool:
        return len(self.losses) >= self.stop_after


def run(path: Path, settings: Hyperparameters = SETTINGS, stop_after: int = 10**9) -> tuple[Trainer, Watch]:
    trainer, watch = Trainer(CORPUS, settings, path), Watch(stop_after)
    if path.exists():
        trainer.restore(read_state(path))
    trainer.run(watch, watch.stopped)
    return trainer, watch


def test_it_learns(tmp_path: Path) -> None:
    trainer, watch = run(tmp_path / "run")
    assert watch.losses[0] > 3
    assert watch.points[-1].validation_loss < 1.5
    assert trainer.state.finished
    assert trainer.state.step == trainer.total_steps == len(watch.losses)


@pytest.mark.parametrize("stops", [[1], [20], [33], [5, 41, 20, 1]])
def test_a_resumed_run_gives_bit_for_bit_what_an_uninterrupted_one_gives(tmp_path: Path, stops: list[int]) -> None:
    whole, watch = run(tmp_path / "whole")
    losses: list[float] = []
    for stop in [*stops, 10**9]:
        parts, part_watch = run(tmp_path / "parts", stop_after=stop)
        losses += part_watch.losses
    assert losses == watch.losses
    assert [point.model_dump() for point in parts.state.curve] == [point.model_dump() for point in whole.state.curve]
    assert parts.state.best_step == whole.state.best_step
    for name, weight in whole.best_weights().items():
        assert torch.equal(weight, parts.best_weights()[name])
    for one, other in zip(whole.weights.values(), parts.weights.values(), strict=True):
        assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    _, one = run(tmp_path / "a", stop_after=10)
    _, same = run(tmp_path / "b", stop_after=10)
    _, other = run(tmp_path / "c", SETTINGS.model_copy(update={"seed": 2}), stop_after=10)
    assert one.losses == same.losses
    assert one.losses != other.losses


def test_the_best_evaluation_is_kept_and_not_the_last(tmp_path: Path) -> None:
    # A learning rate that ruins the model after it was good.
    settings = SETTINGS.model_copy(update={"learning_rate": 0.1, "final_rate": 1.0, "epochs": 4, "average_decay": 0.0})
    trainer, _ = run(tmp_path / "run", settings)
    curve = trainer.state.curve
    best = min(curve, key=lambda point: point.validation_loss)
    assert best.step != curve[-1].step, "the run did not get worse; choose another learning rate"
    assert trainer.state.best_step == best.step
    model = GRUCharModel(trainer.model.config)
    model.load_state_dict(trainer.best_weights())
    loss = text_loss(FoldedGRU(model), trainer.validation_ids.numpy()).nats_per_char
    assert loss == pytest.approx(best.validation_loss, abs=0.02)


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 0.5, "epochs": 50, "eval_interval": 5, "patience": 3})
    trainer, watch = run(tmp_path / "run", settings)
    assert trainer.state.finished
    assert trainer.state.step < trainer.total_steps
    assert len(watch.points) >= 4


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    run(tmp_path / "run")
    trainer, watch = run(tmp_path / "run")
    assert watch.losses == []
    assert trainer.state.finished


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", stop_after=1)
    state = read_state(tmp_path / "run")
    with pytest.raises(InvalidCheckpoint, match="another corpus"):
        Trainer(Corpus("b", TEXT, "1" * 64), SETTINGS, tmp_path / "run").restore(state)
    with pytest.raises(InvalidCheckpoint, match="other settings"):
        Trainer(CORPUS, SETTINGS.model_copy(update={"epochs": 9}), tmp_path / "run").restore(state)


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path: Path) -> None:
    # Large enough for torch to share a product between threads, which rounds its sums otherwise.
    settings = SETTINGS.model_copy(update={"num_units": 256, "num_layers": 1, "threads": 2})
    torch.set_num_threads(1)
    whole, watch = run(tmp_path / "whole", settings, stop_after=12)
    torch.set_num_threads(1)
    _, first = run(tmp_path / "parts", settings, stop_after=6)
    torch.set_num_threads(1)
    trainer = Trainer(CORPUS, read_state(tmp_path / "parts").settings, tmp_path / "parts")
    trainer.restore(read_state(tmp_path / "parts"))
    second = Watch(stop_after=6)
    trainer.run(second, second.stopped)
    assert torch.get_num_threads() == 2
    assert first.losses + second.losses == watch.losses
    assert whole.settings.precision in ("bfloat16", "float32")  # what auto meant where the run began


def test_a_checkpoint_that_can_not_be_written_is_found_out_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer, watch = Trainer(CORPUS, SETTINGS, tmp_path / "file" / "run"), Watch()
    with pytest.raises(InvalidCheckpoint, match="can't write"):
        trainer.run(watch)
    assert watch.losses == []


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: math.nan)
    with pytest.raises(TrainingDiverged, match="validation loss is nan"):
        run(tmp_path / "run")
    assert read_state(tmp_path / "run").curve == []


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_any_seed_trains(tmp_path: Path, seed: int) -> None:
    _, watch = run(tmp_path / "run", SETTINGS.model_copy(update={"seed": seed}), stop_after=2)
    assert len(watch.losses) == 2


def test_a_given_charset_is_the_models(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzAB ,."
    trainer, _ = run(tmp_path / "run", SETTINGS.model_copy(update={"charset": letters}), stop_after=1)
    assert trainer.model.config.charset == letters
    with pytest.raises(UnknownCharacters, match=r"' ' \(U\+0020\)"):
        Trainer(CORPUS, SETTINGS.model_copy(update={"charset": letters.replace(" ", "")}), tmp_path / "other")
    dropped = SETTINGS.model_copy(update={"charset": letters.replace(" ", ""), "unknown_chars": "drop"})
    assert len(Trainer(CORPUS, dropped, tmp_path / "other").validation_ids) < len(trainer.validation_ids)


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(InvalidCheckpoint):
        read_state(tmp_path / "run")
    with pytest.raises(InvalidCheckpoint, match="no checkpoint"):
        read_state(tmp_path / "absent")


def test_short_corpora_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidCorpus, match="at least 80 are needed"):
        Trainer(Corpus("short", "ab" * 40, "0" * 64), SETTINGS, tmp_path / "run")
    with pytest.raises(InvalidCorpus, match="hold out"):
        Trainer(Corpus("short", "abcdefgh", "0" * 64), SETTINGS, tmp_path / "run")


def test_losses_of_streams_are_those_of_one_long_scan(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path / "run", SETTINGS.model_copy(update={"precision": "float32"}))
    ids = trainer.validation_ids.repeat(4)
    exact = text_loss(FoldedGRU(trainer.model), ids.numpy()).nats_per_char
    with torch.no_grad():
        assert streamed_loss(trainer._window_loss, ids) == pytest.approx(exact, abs=2e-3)
        short = trainer.validation_ids[:9]  # one stream, which begins where the text begins: exact
        alone = text_loss(FoldedGRU(trainer.model), short.numpy()).nats_per_char
        assert streamed_loss(trainer._window_loss, short) == pytest.approx(alone, abs=1e-5)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Hyperparameters(learning_rate=1.0, final_rate=0.1, warmup_steps=10)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(settings, 2, 3) == 1.0  # a run shorter than the warm-up

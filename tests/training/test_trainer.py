"""Training runs: they learn, can be stopped, and give the same result when resumed."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from service.errors import InvalidCharset, InvalidCheckpoint, InvalidValue, TrainingDiverged
from service.model.artifact import Artifact, TrainingFacts
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training.checkpoint import MAX_POINTS, Evaluation, RunState, lock_checkpoint, read_state
from service.training.evaluation import streamed_loss, text_loss
from service.training.hyperparameters import Hyperparameters
from service.training.initial import InitialVersion
from service.training.optimisation import learning_rate
from service.training.trainer import Trainer
from tests.harness.corpora import corpus_of

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
# One thread: the threads of torch wait for each other by spinning, which takes minutes on a busy machine.
SETTINGS = Hyperparameters(
    embedding_dim=8, num_units=24, num_layers=2, batch_size=4, sequence_length=16, epochs=3, learning_rate=0.01,
    warmup_steps=5, eval_interval=20, average_decay=0.9, weight_decay=0.01, threads=1,
)  # fmt: skip
CORPUS = corpus_of(TEXT, SETTINGS)


class Recorder:
    """Records the progress of a run, and stops it after a number of updates."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.losses: list[float] = []
        self.points: list[Evaluation] = []
        self.num_evaluated = 0  # characters
        self.stop_after = stop_after

    def updated(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def evaluating(self, num_chars: int) -> None:
        self.num_evaluated += num_chars

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        self.points.append(point)

    def stopped(self) -> bool:
        return len(self.losses) >= self.stop_after


def run(path: Path, settings: Hyperparameters = SETTINGS, stop_after: int = 10**9) -> tuple[Trainer, Recorder]:
    trainer, recorder = Trainer(CORPUS, settings, path), Recorder(stop_after)
    if path.exists():
        trainer.restore(read_state(path))
    trainer.run(recorder, recorder.stopped)
    return trainer, recorder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Recorder]:
    """A whole run with SETTINGS, for tests that only look at it."""
    return run(tmp_path_factory.mktemp("uninterrupted") / "run")


def test_trainer__learns(uninterrupted: tuple[Trainer, Recorder]) -> None:
    trainer, recorder = uninterrupted
    assert recorder.losses[0] > 2.5
    assert recorder.points[-1].validation_loss < 1.5
    assert trainer.state.finished
    assert trainer.state.step == trainer.total_steps == len(recorder.losses)


@pytest.mark.parametrize("stops", [[1], [20], [33], [5, 41, 20, 1]])
def test_trainer__resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, stops: list[int], uninterrupted: tuple[Trainer, Recorder]
) -> None:
    whole, recorder = uninterrupted
    losses: list[float] = []
    for stop in [*stops, 10**9]:
        parts, part_recorder = run(tmp_path / "parts", stop_after=stop)
        losses += part_recorder.losses
    assert losses == recorder.losses
    assert [point.model_dump() for point in parts.state.curve] == [point.model_dump() for point in whole.state.curve]
    assert parts.state.best_step == whole.state.best_step
    for name, weight in whole.best_weights().items():
        assert torch.equal(weight, parts.best_weights()[name])
    for name, weight in whole.weights.items():
        assert torch.equal(weight, parts.weights[name])


def test_trainer__same_seed_gives_the_same_run(tmp_path: Path) -> None:
    _, first = run(tmp_path / "a", stop_after=10)
    _, same_seed = run(tmp_path / "b", stop_after=10)
    _, other_seed = run(tmp_path / "c", SETTINGS.model_copy(update={"seed": 2}), stop_after=10)
    assert first.losses == same_seed.losses
    assert first.losses != other_seed.losses


def test_best_weights__are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    # This learning rate makes the loss rise again after its minimum.
    settings = SETTINGS.model_copy(update={"learning_rate": 0.1, "final_rate": 1.0, "epochs": 4, "average_decay": 0.0})
    trainer, _ = run(tmp_path / "run", settings)
    curve = trainer.state.curve
    best = min(curve, key=lambda point: point.validation_loss)
    assert best.step != curve[-1].step, "the loss did not rise again: choose another learning rate for this test"
    assert trainer.state.best_step == best.step
    model = GRUCharModel(trainer.model.config)
    model.load_state_dict(trainer.best_weights())
    loss = text_loss(FoldedGRU(model), trainer.validation_text).nats_per_char
    assert loss == pytest.approx(best.validation_loss, abs=0.02)


def test_trainer__stops_early_when_the_loss_no_longer_improves(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 0.5, "epochs": 50, "eval_interval": 5, "patience": 3})
    trainer, recorder = run(tmp_path / "run", settings)
    assert trainer.state.finished
    assert trainer.state.step < trainer.total_steps
    assert len(recorder.points) >= 4


def test_trainer__an_evaluation_can_be_stopped_and_is_repeated(tmp_path: Path) -> None:
    whole, recorder = run(tmp_path / "whole", stop_after=40)
    trainer, part = Trainer(CORPUS, SETTINGS, tmp_path / "part"), Recorder()
    assert not trainer.run(part, lambda: part.num_evaluated > 0)  # in the middle of the first evaluation
    assert (trainer.state.step, trainer.state.curve) == (20, [])
    trainer, rest = run(tmp_path / "part", stop_after=20)
    assert [*part.losses, *rest.losses] == recorder.losses
    assert trainer.state.curve == whole.state.curve
    for name, weight in whole.weights.items():
        assert torch.equal(weight, trainer.weights[name])


def test_trainer__writes_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed in a long epoch continues after the last of them."""
    monkeypatch.setattr("service.training.trainer.SAVE_INTERVAL_S", 0.0)
    monkeypatch.setattr("service.training.trainer._SAVE_SHARE", 0)
    settings = SETTINGS.model_copy(update={"eval_interval": 1000})

    class Killed(Recorder):
        def updated(self, step: int, loss: float) -> None:
            super().updated(step, loss)
            if step == 7:
                raise KeyboardInterrupt  # a second Ctrl-C: nothing more is written

    with pytest.raises(KeyboardInterrupt):
        Trainer(CORPUS, settings, tmp_path / "run").run(Killed())
    assert read_state(tmp_path / "run").step == 6
    _, whole = run(tmp_path / "whole", settings, stop_after=10)
    _, rest = run(tmp_path / "run", settings, stop_after=4)
    assert whole.losses[6:] == rest.losses


def test_trainer__a_sample_changes_nothing_in_the_run(tmp_path: Path) -> None:
    class Sampling(Recorder):
        def evaluated(self, point: Evaluation, is_best: bool) -> None:
            super().evaluated(point, is_best)
            samples.append(trainer.sample())

    samples: list[str] = []
    _, plain = run(tmp_path / "plain", stop_after=50)
    trainer, recorder = Trainer(CORPUS, SETTINGS, tmp_path / "sampled"), Sampling(50)
    trainer.run(recorder, recorder.stopped)
    assert recorder.losses == plain.losses
    assert len(samples) == 2
    assert all(sample.startswith(TEXT[-len(CORPUS.validation.ids) :][:40]) for sample in samples)
    assert samples[0] != samples[1]


def test_trainer__epochs_may_be_raised(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "run")
    longer = SETTINGS.model_copy(update={"epochs": 4})
    trainer, recorder = run(tmp_path / "run", longer)
    assert trainer.state.finished
    assert len(recorder.losses) == first.total_steps // 3
    assert recorder.points[0].learning_rate == learning_rate(longer, recorder.points[0].step - 1, trainer.total_steps)
    assert [change.model_dump() for change in trainer.state.changes] == [
        {"step": first.total_steps, "setting": "epochs", "value": 4}
    ]
    with pytest.raises(InvalidCheckpoint, match="can only be raised"):
        run(tmp_path / "run")


def test_trainer__a_limit_of_characters_ends_the_whole_schedule_and_may_change(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_chars": 30 * 4 * 16 - 1})  # of 181 updates
    trainer, recorder = run(tmp_path / "run", settings)
    assert (trainer.total_steps, len(recorder.losses), trainer.state.finished) == (30, 30, True)
    assert [point.step for point in recorder.points] == [20, 30]
    assert recorder.points[-1].learning_rate == pytest.approx(settings.learning_rate * settings.final_rate, rel=0.2)
    assert settings.learning_rate == max(learning_rate(settings, step, 30) for step in range(30))
    with pytest.raises(InvalidCheckpoint, match="has read 1,920 characters, so --max-chars 1000 is too low"):
        run(tmp_path / "run", settings.model_copy(update={"max_chars": 1000}))
    more = settings.model_copy(update={"max_chars": 40 * 4 * 16})
    trainer, recorder = run(tmp_path / "run", more, stop_after=5)
    assert (trainer.total_steps, trainer.state.step, trainer.state.finished) == (40, 35, False)
    # To what was read: the weights after the last update are evaluated before the run is finished.
    trainer, recorder = run(tmp_path / "run", settings.model_copy(update={"max_chars": 35 * 4 * 16}))
    assert (recorder.losses, [point.step for point in recorder.points], trainer.state.finished) == ([], [35], True)
    trainer, _ = run(tmp_path / "run", SETTINGS, stop_after=1)
    assert trainer.total_steps == 3 * trainer.streams.windows_per_epoch
    assert [change.value for change in trainer.state.changes] == [2560, 2240, 0]


def test_pace__is_that_of_updates_and_a_resumed_run_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(CORPUS, SETTINGS, tmp_path / "run")
    now = [0.0]

    def update(_: object) -> float:
        now[0] += 9.0 if now[0] == 0 else 0.5  # the first one takes longer
        return 1.0

    monkeypatch.setattr(trainer, "_update", update)
    monkeypatch.setattr("service.training.trainer.time.perf_counter", lambda: now[0])
    assert trainer.pace() == 4 * 16 / 0.5


def test_trainer__begins_with_a_version(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "first")
    config = first.model.config
    tensors = {name: weight.numpy() for name, weight in first.best_weights().items()}
    initial = InitialVersion("fox@1", Artifact(config, tensors, TrainingFacts(), "d" * 64))
    trainer, recorder = Trainer(CORPUS, SETTINGS, tmp_path / "second", initial), Recorder(1)
    trainer.run(recorder, recorder.stopped)
    assert recorder.points[0].validation_loss == first.state.best_loss
    assert (recorder.points[0].step, recorder.points[0].training_loss) == (0, None)
    grown = initial.weights(config.charset + "\u00e9", seed=1)
    for name, weight in grown.items():
        if name in ("embedding.weight", "dense.weight", "dense.bias"):
            assert len(weight) == config.vocab_size + 1
        assert torch.equal(weight[: len(tensors[name])], torch.from_numpy(tensors[name]))
    with pytest.raises(InvalidCharset, match="must begin with that of fox@1"):
        initial.weights("abc", seed=1)


def test_run_state__a_long_curve_is_thinned_evenly_and_the_best_is_exact() -> None:
    state = RunState(settings=SETTINGS, charset="ab", corpus_name="a", corpus_sha256="0" * 64)
    losses = [3.0 - 0.1 * (number == 4321) for number in range(20_000)]
    for number, loss in enumerate(losses):
        point = Evaluation(
            number=number, step=7 * number, epoch=number / 3, learning_rate=1e-3 / 3, training_loss=1 / 3,
            validation_loss=loss,
        )  # fmt: skip
        assert state.record(point) == (number in (0, 4321))
    assert (state.best_step, state.best_loss, state.since_best) == (7 * 4321, 2.9, 19_999 - 4321)
    numbers = [point.number for point in state.curve]
    assert (numbers[0], numbers[-1]) == (0, 19_999)
    assert 4321 in numbers
    assert 500 < len(numbers) < MAX_POINTS + 3
    spaces = np.diff([number for number in numbers if number not in (4321, 19_999)])
    assert len(set(spaces.tolist())) == 1


@pytest.mark.parametrize("missing", ["format", "settings"])
def test_read_state__says_that_another_version_wrote_the_checkpoint(tmp_path: Path, missing: str) -> None:
    trainer, _ = run(tmp_path / "run", stop_after=1)
    state = json.loads(trainer.state.model_dump_json())
    if missing == "format":
        del state["format"]
    else:
        del state["settings"]["restart_interval"]
    save_file({"hidden": trainer.hidden}, tmp_path / "run", metadata={"run": json.dumps(state)})
    with pytest.raises(InvalidCheckpoint, match=r"another version of gru-serve.*begin anew with --overwrite"):
        read_state(tmp_path / "run")


def test_lock_checkpoint__works_without_locks_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    warnings: list[str] = []
    monkeypatch.setattr("service.training.checkpoint.fcntl.flock", unsupported)
    with lock_checkpoint(tmp_path / "run", "fox", warnings.append):
        pass
    assert "without locks" in warnings[0]


def test_save_checkpoint__says_when_there_is_no_space_for_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.training.checkpoint.shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InvalidCheckpoint, match="free space, or name another place"):
        run(tmp_path / "run")


@pytest.mark.parametrize("is_killed", [True, False])
def test_save_checkpoint__cut_off_in_the_middle_leaves_the_old_one_and_nothing_that_stays(
    tmp_path: Path, is_killed: bool
) -> None:
    trainer, _ = run(tmp_path / "run", stop_after=1)
    files, before = sorted(tmp_path.iterdir()), (tmp_path / "run").read_bytes()
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            with suppress(InvalidCheckpoint):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
                trainer.save()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-signal.SIGXFSZ if is_killed else 1)
        assert (tmp_path / "run").read_bytes() == before
    trainer.save()
    assert sorted(tmp_path.iterdir()) == files


def test_trainer__refuses_a_model_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="at most"):
        Trainer(CORPUS, SETTINGS.model_copy(update={"num_units": 8192, "num_layers": 8}), tmp_path / "run")


def test_trainer__does_nothing_when_a_finished_run_is_resumed(tmp_path: Path) -> None:
    run(tmp_path / "run")
    trainer, recorder = run(tmp_path / "run")
    assert recorder.losses == []
    assert trainer.state.finished


def test_restore__refuses_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    run(tmp_path / "run", stop_after=1)
    state = read_state(tmp_path / "run")
    with pytest.raises(InvalidCheckpoint, match="has changed"):
        Trainer(replace(CORPUS, sha256="1" * 64), SETTINGS, tmp_path / "run").restore(state)
    with pytest.raises(InvalidCheckpoint, match="other settings"):
        Trainer(CORPUS, SETTINGS.model_copy(update={"seed": 9}), tmp_path / "run").restore(state)


def test_trainer__resumed_run_uses_the_threads_of_its_start(tmp_path: Path) -> None:
    # Large enough for torch to split a product between threads, which changes the rounding of its sums.
    settings = SETTINGS.model_copy(update={"num_units": 256, "num_layers": 1, "threads": 2})
    torch.set_num_threads(1)
    whole, recorder = run(tmp_path / "whole", settings, stop_after=12)
    torch.set_num_threads(1)
    _, first = run(tmp_path / "parts", settings, stop_after=6)
    torch.set_num_threads(1)
    trainer = Trainer(CORPUS, read_state(tmp_path / "parts").settings, tmp_path / "parts")
    trainer.restore(read_state(tmp_path / "parts"))
    second = Recorder(stop_after=6)
    trainer.run(second, second.stopped)
    assert torch.get_num_threads() == 2
    assert first.losses + second.losses == recorder.losses
    assert whole.settings.precision in ("bfloat16", "float32")  # `auto` was resolved when the run started


def test_trainer__fails_before_the_first_update_if_it_can_not_write_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer, recorder = Trainer(CORPUS, SETTINGS, tmp_path / "file" / "run"), Recorder()
    with pytest.raises(InvalidCheckpoint, match="can't write"):
        trainer.run(recorder)
    assert recorder.losses == []


def test_trainer__raises_when_the_validation_loss_is_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validation_loss", lambda *_: math.nan)
    with pytest.raises(TrainingDiverged, match="validation loss is nan"):
        run(tmp_path / "run")
    assert read_state(tmp_path / "run").curve == []


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_trainer__accepts_the_smallest_and_the_largest_seed(tmp_path: Path, seed: int) -> None:
    _, recorder = run(tmp_path / "run", SETTINGS.model_copy(update={"seed": seed}), stop_after=2)
    assert len(recorder.losses) == 2


def test_trainer__uses_the_given_charset(tmp_path: Path) -> None:
    letters = "zyxabcdefghijklmnopqrstuvwAB ,."
    settings = SETTINGS.model_copy(update={"charset": letters})
    trainer = Trainer(corpus_of(TEXT, settings), settings, tmp_path / "run")
    assert trainer.model.config.charset == letters


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_read_state__refuses_a_damaged_checkpoint(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(InvalidCheckpoint):
        read_state(tmp_path / "run")
    with pytest.raises(InvalidCheckpoint, match="no checkpoint"):
        read_state(tmp_path / "absent")


def test_streamed_loss__is_close_to_the_exact_loss(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path / "run", SETTINGS.model_copy(update={"precision": "float32"}))
    text = EncodedText(np.tile(trainer.validation_text.ids, 4), np.zeros(1, np.int64))
    exact = text_loss(FoldedGRU(trainer.model), text).nats_per_char
    with torch.no_grad():
        assert streamed_loss(trainer._window_loss, text) == pytest.approx(exact, abs=2e-3)


def test_learning_rate__rises_and_falls() -> None:
    settings = Hyperparameters(learning_rate=1.0, final_rate=0.1, warmup_steps=10)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(settings, 2, 3) == 1.0  # a run shorter than the warm-up


def test_trainer__expects_the_first_characters_of_lines_before_it_has_learnt_anything(tmp_path: Path) -> None:
    text = corpus_of("anna\nbob\nab\n" * 100, SETTINGS.model_copy(update={"lines": True}))
    trainer = Trainer(text, SETTINGS.model_copy(update={"lines": True}), tmp_path / "run")
    first = dict(zip(text.charset.characters, trainer.model.dense.bias.softmax(0).tolist(), strict=True))
    assert first["a"] == pytest.approx(2 / 3, abs=0.02)
    assert first["b"] == pytest.approx(1 / 3, abs=0.02)
    assert 0 < first["\n"] < 0.001
    assert 0 < first["n"] < 0.001

"""Training on another device than the CPU: a GPU if there is one, and a stand-in that refuses what CUDA refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.model.encoded_text import EncodedText
from service.training.checkpoint import Evaluation, read_state
from service.training.devices import find_device
from service.training.hyperparameters import Hyperparameters
from service.training.trainer import Trainer
from tests.harness.corpora import corpus_of

CPU = torch.device("cpu")


class Losses(list[float]):
    """Records the losses of updates."""

    def updated(self, step: int, loss: float) -> None:
        self.append(loss)

    def evaluating(self, num_chars: int) -> None:
        pass

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        self.append(point.validation_loss)


def train(path: Path, device: torch.device, settings: Hyperparameters, num_losses: int = 100) -> tuple[Trainer, Losses]:
    """Continue the run in a checkpoint, or begin it, and stop after this number of losses."""
    corpus = corpus_of("the quick brown fox jumps over the lazy dog. " * 20, settings)
    held = EncodedText(corpus.validation.ids[:60], corpus.validation.starts[:1], scores_starts=False)
    trainer, losses = Trainer(replace(corpus, validation=held), settings, path, device=device), Losses()
    if path.exists():
        trainer.restore(read_state(path))
    trainer.run(losses, lambda: len(losses) >= num_losses)
    return trainer, losses


def compare(device: torch.device, folder: Path, tolerance: float) -> None:
    """Assert that runs on the device, and those that change between it and the CPU, are those of the CPU."""
    for precision, input_dropout in (("float32", 0.0), ("bfloat16", 0.2)):
        settings = Hyperparameters.model_validate({
            "embedding_dim": 6, "num_units": 8, "num_layers": 2, "batch_size": 4, "sequence_length": 4, "threads": 1,
            "max_chars": 4 * 16, "eval_interval": 2, "warmup_steps": 2, "restart_interval": 20, "precision": precision,
            "input_dropout": input_dropout, "recurrent_dropout": 0.3, "output_dropout": 0.1,
        })  # fmt: skip
        place = folder / precision
        trainer, expected = train(place / "cpu", CPU, settings)
        assert len(expected) == 6
        if precision == "bfloat16":
            tolerance *= 100
        other, losses = train(place / "other", device, settings)
        assert losses == pytest.approx(expected, abs=tolerance)
        assert other.state.device == read_state(place / "other").device == device.type
        for order in ((device, CPU), (CPU, device)):
            path = place / order[0].type
            path.unlink(missing_ok=True)
            _, first = train(path, order[0], settings, 3)
            resumed, rest = train(path, order[1], settings)
            assert first + rest == pytest.approx(expected, abs=tolerance)
            for name, weight in trainer.best_weights().items():
                assert torch.allclose(weight, resumed.best_weights()[name], rtol=0, atol=tolerance)
            if tolerance == 0:
                assert resumed.sample() == trainer.sample()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_trainer__on_a_gpu_is_nearly_as_on_the_cpu(tmp_path: Path) -> None:
    compare(find_device("cuda"), tmp_path, tolerance=1e-4)
    _, first = train(tmp_path / "a", find_device("cuda"), Hyperparameters(num_units=64, max_chars=64_000, threads=1))
    _, again = train(tmp_path / "b", find_device("cuda"), Hyperparameters(num_units=64, max_chars=64_000, threads=1))
    assert first == again


def test_trainer__on_another_device_mixes_no_tensors_of_two_devices(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.harness.foreign_device import install; "
        "from tests.training.test_devices import compare; compare(install(), Path(sys.argv[1]), tolerance=0.0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_find_device__lets_products_of_a_gpu_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    try:
        products.allow_bf16_reduced_precision_reduction = True
        assert find_device("auto") == torch.device("cuda", 0)
        assert not products.allow_bf16_reduced_precision_reduction
    finally:
        products.allow_bf16_reduced_precision_reduction = before

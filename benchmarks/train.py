"""Compares an update of `gru-serve train` with one of `nn.GRU`, autograd and AdamW, in characters/s.

    python -m benchmarks.train [--rounds 7] [--threads 2]

Both train a model of the tutorial's sizes on batches of 64 x 128 characters. The baseline is plain: float32, without
dropout and averaged weights. The update of `gru-serve train` has its defaults: dropout, gradient clipping and averaged
weights.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.pairs import time_in_turns
from service.model.config import ModelConfig
from service.model.gru import GRUCharModel
from service.training.hyperparameters import Hyperparameters
from service.training.network import WindowLoss, initialise
from service.training.trainer import Trainer
from tests.harness.corpora import corpus_of

BATCH, STEPS = 64, 128
CHARS = BATCH * STEPS
ALPHABET = (string.ascii_letters + " .,;:'!?-&$3\n")[:65]


def main() -> None:
    """Print the error of the gradient, and the speeds and their ratios."""
    parser = argparse.ArgumentParser(description="Compare training with nn.GRU and autograd, in characters/s.")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds  [7]")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch  [2]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"largest difference between a gradient and autograd's, in float64: {gradient_error():.1e}")
    chance = random.Random(1)
    corpus = corpus_of("".join(chance.choices(ALPHABET, k=4 * CHARS)))
    print(f"batch {BATCH} x {STEPS} steps, {len(corpus.charset)} characters, {options.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("bfloat16", "float32"):
            settings = Hyperparameters.model_validate(
                {"batch_size": BATCH, "sequence_length": STEPS, "precision": precision}
            )
            trainer = Trainer(corpus, settings, Path(folder) / "run")
            window = trainer.streams.window(0, 0)
            update = Baseline(trainer.model.config, window.ids)
            pair = time_in_turns(update, lambda t=trainer, w=window: t._update(w), options.rounds, 1, 3)  # type: ignore[misc]
            print(
                f"{precision}: {CHARS / pair.candidate_s:,.0f} characters/s, "
                f"nn.GRU + autograd {CHARS / pair.baseline_s:,.0f}: {pair}"
            )


class Baseline:
    """A plain training loop, as a tutorial would write it. Each call makes one update."""

    def __init__(self, config: ModelConfig, window: torch.Tensor) -> None:
        self.model = GRUCharModel(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.inputs, self.targets = window[:-1].t().contiguous(), window[1:].t().contiguous()
        self.hidden = self.model.initial_hidden(BATCH)

    def __call__(self) -> None:
        """Read the window, carry the state, update the weights."""
        logits, hidden = self.model(self.inputs, self.hidden)
        self.hidden = hidden.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def gradient_error() -> float:
    """Return the largest absolute difference between any gradient of `WindowLoss` and autograd's.

    Both are computed in float64, with a small model.
    """
    config = ModelConfig(charset=ALPHABET, embedding_dim=32, num_units=96, num_layers=2)
    model = GRUCharModel(config).double()
    initialise(model, 1)
    window = torch.randint(0, config.vocab_size, (33, 8), generator=torch.Generator().manual_seed(1))
    losses, _ = WindowLoss(model, torch.float64)(window, model.initial_hidden(8))
    losses.mean().backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    logits, _ = model(window[:-1].t(), model.initial_hidden(8))
    F.cross_entropy(logits.transpose(1, 2), window[1:].t()).backward()
    expected = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(gradients, expected, strict=True))


if __name__ == "__main__":
    main()

"""Compares an update of `gru-serve train` with one of `nn.GRU`, autograd and AdamW, in characters/s.

    python -m benchmarks.train [--rounds 5] [--threads 2] [--precision auto]

Both train a model of the tutorial's sizes on batches of 64 x 128 characters: alone on the machine, and beside a process
that keeps one core busy, in turns. The baseline is plain: float32, without dropout and averaged weights. The update of
`gru-serve train` has its defaults: dropout, gradient clipping and averaged weights. Waiting threads do what they do in
`gru-serve train`; `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` changes it, for both.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.pairs import Pair, in_turns
from service.commands.options import limit_spinning
from service.model.config import ModelConfig
from service.model.gru import GRUCharModel
from service.training.devices import bfloat16_speedup
from service.training.hyperparameters import Hyperparameters
from service.training.network import WindowLoss, initialise
from service.training.trainer import Trainer
from tests.harness.corpora import corpus_of

BATCH, STEPS = 64, 128
CHARS = BATCH * STEPS
ALPHABET = (string.ascii_letters + " .,;:'!?-&$3\n")[:65]
CALLS = 3  # updates of `gru-serve train` in a round, which take about as long as one of the baseline


def main() -> None:
    """Print the error of the gradient, and the speeds and their ratios."""
    before = dict(os.environ)
    limit_spinning()
    if os.environ != before:  # OpenMP read it when torch was imported
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.train", *sys.argv[1:]])
    parser = argparse.ArgumentParser(description="Compare training with nn.GRU and autograd, in characters/s.")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds  [5]")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch  [2]")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="[auto]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"largest difference between a gradient and autograd's, in float64: {gradient_error():.1e}")
    chance = random.Random(1)
    corpus = corpus_of("".join(chance.choices(ALPHABET, k=4 * CHARS)))
    waits = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    settings = Hyperparameters.model_validate(
        {"batch_size": BATCH, "sequence_length": STEPS, "precision": options.precision, "threads": options.threads}
    )
    with tempfile.TemporaryDirectory() as folder, busy_process() as busy:
        trainer = Trainer(corpus, settings, Path(folder) / "run")
        print(
            f"batch {BATCH} x {STEPS}, {len(corpus.charset)} characters, {options.threads} threads of {os.cpu_count()} "
            f"cores, {waits}, {trainer.settings.precision} (bfloat16 is {bfloat16_speedup():.1f} times as fast here)"
        )
        window = trainer.streams.window(0, 0)
        baseline, ours = Baseline(trainer.model.config, window.ids), lambda: trainer._update(window)
        alone = [lambda: seconds(baseline, 1), lambda: seconds(ours, CALLS)]
        beside = [lambda call=call: busy(call) for call in alone]
        report(*in_turns([*alone, *beside], options.rounds))


def report(*times: list[float]) -> None:
    """Print the pairs of speeds: baseline and ours alone, then beside the busy process, in seconds an update."""
    base, ours, busy_base, busy_ours = times
    for where, slow, fast in (("alone", base, ours), ("beside a busy process", busy_base, busy_ours)):
        print(f"{where}: {speed(fast)} characters/s, nn.GRU + autograd {speed(slow)}: {pair(slow, fast)}")
    print(f"beside a busy process against alone: {pair(ours, busy_ours)}, nn.GRU + autograd {pair(base, busy_base)}")
    print(f"beside a busy process against nn.GRU + autograd alone: {pair(base, busy_ours)}")


def speed(times: list[float]) -> str:
    """Return the median speed in characters/s."""
    return f"{CHARS / statistics.median(times):,.0f}"


def pair(baseline: list[float], candidate: list[float]) -> Pair:
    """Return two measurements of the same rounds as a pair."""
    ratios = [slow / fast for slow, fast in zip(baseline, candidate, strict=True)]
    return Pair(statistics.median(baseline), statistics.median(candidate), ratios)


def seconds(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


@contextmanager
def busy_process() -> Iterator[Callable[[Callable[[], float]], float]]:
    """Yield a function that calls another one while a process keeps one core busy, which sleeps otherwise."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def beside(call: Callable[[], float]) -> float:
        process.send_signal(signal.SIGCONT)
        try:
            return call()
        finally:
            process.send_signal(signal.SIGSTOP)

    try:
        process.send_signal(signal.SIGSTOP)
        yield beside
    finally:
        process.kill()
        process.wait()


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

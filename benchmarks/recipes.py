"""Compares the settings that training chooses by the size of a text with fixed ones, in loss and time.

    python -m benchmarks.recipes [--corpus TEXT] [--sizes 10000 30000] [--only chosen] [--seconds 120] [--threads 1]

The fixed ones are the defaults for a million characters, with an evaluation each epoch, which every text got before.
Both train on the same beginning of the text. Loss is that of the held-out tenth, in nats a character, at the best
evaluation. "Elsewhere" is that of the same weights on the last 30,000 characters of the text, which is less noisy than
the tenth of a short text. Time is that of the processor, of all threads, so that a busy machine matters less. A run
that reaches `--seconds` is stopped, and its line says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from service.model.encoded_text import EncodedText
from service.model.gru import GRUCharModel
from service.training.checkpoint import Evaluation
from service.training.corpus import Corpus, read_corpus
from service.training.evaluation import streamed_loss
from service.training.hyperparameters import Hyperparameters
from service.training.network import WindowLoss
from service.training.recipe import choose
from service.training.trainer import Trainer

DOCS = Path(__file__).parent.parent / "docs"
ELSEWHERE = 30_000  # characters


class Run:
    """A training run, stopped after a number of seconds of processor time."""

    def __init__(self, corpus: Corpus, settings: Hyperparameters, folder: Path, seconds: float) -> None:
        self.best: Evaluation | None = None
        self._until = time.process_time() + seconds
        began = time.process_time()
        self.trainer = Trainer(corpus, settings, folder / "run")
        self.is_finished = self.trainer.run(self, lambda: time.process_time() > self._until)
        self.seconds = time.process_time() - began
        self.elsewhere: float | None = None

    def measure(self, text: str) -> None:
        """Measure the best weights on another text, without the characters that the model doesn't know."""
        known = self.trainer.charset
        ids = known.exact("".join(char for char in text if char in known))
        model = GRUCharModel(self.trainer.model.config)
        model.load_state_dict(self.trainer.best_weights())
        loss = WindowLoss(model, torch.float32)
        with torch.no_grad():
            self.elsewhere = streamed_loss(loss, EncodedText(ids, np.zeros(1, np.int64)))

    def updated(self, step: int, loss: float) -> None:
        """See `trainer.Progress`."""

    def evaluating(self, num_chars: int) -> None:
        """See `trainer.Progress`."""

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        """Remember the best evaluation."""
        if is_best:
            self.best = point

    def __str__(self) -> str:
        end = "" if self.is_finished else f", stopped at epoch {self.trainer.state.step / self._per_epoch:.1f}"
        if self.best is None:
            return f"no evaluation in {self.seconds:.0f} s"
        elsewhere = f", elsewhere {self.elsewhere:.3f}" if self.elsewhere is not None else ""
        return f"{self.best.validation_loss:.3f} (update {self.best.step:,}){elsewhere} in {self.seconds:.0f} s{end}"

    @property
    def _per_epoch(self) -> int:
        return self.trainer.streams.windows_per_epoch


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description="Compare chosen with fixed settings of training, in loss and time.")
    parser.add_argument("--corpus", type=Path, help="file with the text  [this project's documentation]")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000], help="characters  [10000 30000]")
    parser.add_argument("--only", choices=("chosen", "fixed"), help="only these settings  [both]")
    parser.add_argument("--seconds", type=float, default=120, help="processor time of a run at most  [120]")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch  [1]")
    options = parser.parse_args()
    files = [options.corpus] if options.corpus else sorted(DOCS.glob("*.md"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    fixed = Hyperparameters(threads=options.threads)
    for size in options.sizes:
        if not 100 <= size <= len(text) - ELSEWHERE:
            parser.error(f"a size of {size} is not between 100 and {len(text) - ELSEWHERE:,}: the text is too short")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            path.write_text(text[:size], encoding="utf-8")
            corpus = read_corpus([path], fixed)
            chosen = choose(fixed, corpus.num_training_chars, len(corpus.training.starts)).settings
            for name, settings in (("chosen", chosen), ("fixed", fixed)):
                if options.only in (None, name):
                    run = Run(corpus, settings, Path(folder), options.seconds)
                    run.measure(text[-ELSEWHERE:])
                    print(f"{size:>10,} characters, {name}: {run}", flush=True)


if __name__ == "__main__":
    main()

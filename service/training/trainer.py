"""The training loop: window after window, evaluating, keeping the best, able to stop and go on anywhere.

Everything random in update number s comes from a generator seeded with (seed, s), and where an epoch begins from (seed,
epoch): a run that goes on from a checkpoint draws what it would have drawn without the interruption.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from service.errors import InvalidCheckpoint, InvalidCorpus, TrainingDiverged
from service.model.charset import Charset
from service.model.config import ModelConfig
from service.model.gru import GRUCharModel
from service.training.averaging import WeightAverage
from service.training.checkpoint import Evaluation, RunState, read_tensors, save_checkpoint
from service.training.corpus import Corpus
from service.training.hyperparameters import Hyperparameters
from service.training.network import DropoutRates, WindowLoss, initialise, product_dtype
from service.training.schedule import learning_rate
from service.training.seeding import generator
from service.training.streams import Streams

_EVAL_STREAMS = 64
_EVAL_WARMUP = 256  # characters read before a stream's losses count, so that its state is as if carried from afar
_EVAL_STEPS = 128


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def updated(self, step: int, loss: float) -> None:
        """After update `step`, with its loss in nats a character."""

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        """After an evaluation."""


class Trainer:
    """One training run over one corpus, from the beginning or from a checkpoint."""

    def __init__(self, corpus: Corpus, settings: Hyperparameters, checkpoint: Path) -> None:
        settings = _resolve(settings)
        self.settings, self.checkpoint = settings, checkpoint
        charset = Charset(settings.charset) if settings.charset else Charset.from_corpus(corpus.text)
        training, validation = corpus.split(settings.validation_fraction)
        if len(validation) < 2:
            raise InvalidCorpus(f"{corpus.name} is too short to hold out a part for validation", param="corpus")
        ids = torch.from_numpy(charset.encode(training, settings.unknown_chars))
        self.validation_ids = torch.from_numpy(charset.encode(validation, settings.unknown_chars))
        self.streams = Streams(ids, settings.batch_size, settings.sequence_length, settings.seed)
        config = ModelConfig(
            charset=charset.characters,
            embedding_dim=settings.embedding_dim,
            num_units=settings.num_units,
            num_layers=settings.num_layers,
        )
        self.model = GRUCharModel(config)
        initialise(self.model, settings.seed)
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        self.average = WeightAverage(list(self.weights.values()), settings.average_decay)
        self.best = [weight.clone() for weight in self.average.weights]
        self.hidden = self.model.initial_hidden(settings.batch_size)
        decayed = [weight for weight in self.weights.values() if weight.dim() > 1]
        biases = [weight for weight in self.weights.values() if weight.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self._window_loss = WindowLoss(self.model, product_dtype(settings.precision))
        self.state = RunState(
            settings=settings,
            charset=charset.characters,
            corpus_name=corpus.name,
            corpus_sha256=corpus.sha256,
        )
        self._attach_moments()

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.settings.epochs * self.streams.windows_per_epoch

    @property
    def eval_interval(self) -> int:
        """Updates between two evaluations."""
        return self.settings.eval_interval or self.streams.windows_per_epoch

    def restore(self, state: RunState) -> None:
        """Go on where the checkpoint stands. Raises InvalidCheckpoint if it is of another run."""
        mine = self.state
        if state.corpus_sha256 != mine.corpus_sha256:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to another corpus, {state.corpus_name}")
        if state.settings != mine.settings or state.charset != mine.charset:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to a run with other settings")
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in read_tensors(self.checkpoint, tensors).items():
                tensors[name].copy_(value)
        self.state = state
        self._attach_moments()

    def run(self, progress: Progress, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, to early stopping or until `stopped()`; True if the run is finished.

        Writes the checkpoint at the start, at every evaluation and when stopped. Raises TrainingDiverged, and
        InvalidCheckpoint if it can't be written; the best weights are there in either case.
        """
        state, per_epoch = self.state, self.streams.windows_per_epoch
        torch.set_num_threads(self.settings.threads)
        if state.step == 0:
            self.save()  # a place that can't be written to is found out now, and not after the first epoch
        while not state.finished:
            began = time.perf_counter()
            epoch, place = divmod(state.step, per_epoch)
            if place == 0:
                self.hidden.zero_()
            loss = self._update(self.streams.window(epoch, place))
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss is {loss} in update {state.step + 1}: lower the learning rate or the gradient's norm"
                )
            state.loss_sum += loss
            state.loss_count += 1
            state.step += 1
            progress.updated(state.step, loss)
            last = state.step >= self.total_steps
            due = last or state.step % self.eval_interval == 0
            if due:
                self._evaluate(progress, last)
            stop = stopped()
            state.seconds += time.perf_counter() - began
            if due or stop:
                self.save()
            if stop:
                break
        return state.finished

    def best_weights(self) -> dict[str, Tensor]:
        """Name -> weight of the best evaluation so far, float32."""
        return {name: weight.clone() for name, weight in zip(self.weights, self.best, strict=True)}

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.checkpoint, self.state, self._tensors())

    def validation_loss(self) -> float:
        """Nats a character of the averaged weights on the held-out text, read as streams side by side."""
        trained = [weight.detach().clone() for weight in self.weights.values()]
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), self.average.weights)
            loss = streamed_loss(self._window_loss, self.validation_ids)
            torch._foreach_copy_(list(self.weights.values()), trained)
        return loss

    def _update(self, window: Tensor) -> float:
        settings, step = self.settings, self.state.step
        rate = learning_rate(settings, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rates = DropoutRates(settings.input_dropout, settings.recurrent_dropout, settings.output_dropout)
        losses, hidden = self._window_loss(window, self.hidden, rates, generator(settings.seed, "update", step))
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), settings.clip_norm)
        self.optimizer.step()
        self.hidden.copy_(hidden)
        self.average.update(list(self.weights.values()), step + 1)
        return loss.item()

    def _evaluate(self, progress: Progress, last: bool) -> None:
        state, settings = self.state, self.settings
        loss = self.validation_loss()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the validation loss is {loss} after update {state.step}: lower the learning rate")
        is_best = loss < state.best_loss
        point = Evaluation(
            step=state.step,
            epoch=state.step / self.streams.windows_per_epoch,
            learning_rate=learning_rate(settings, state.step - 1, self.total_steps),
            training_loss=state.loss_sum / state.loss_count,
            validation_loss=loss,
        )
        state.curve.append(point)
        state.loss_sum, state.loss_count = 0.0, 0
        if is_best:
            state.best_step = state.step
            torch._foreach_copy_(self.best, self.average.weights)
        since_best = len(state.curve) - 1 - min(range(len(state.curve)), key=lambda i: state.curve[i].validation_loss)
        state.finished = last or (settings.patience > 0 and since_best >= settings.patience)
        progress.evaluated(point, is_best)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run by name; the live ones, so that copying into them restores it."""
        tensors: dict[str, Tensor] = {"hidden": self.hidden}
        for index, (name, weight) in enumerate(self.weights.items()):
            mean, square = self.moments[name]
            tensors[f"weight.{name}"] = weight.detach()
            tensors[f"average.{name}"] = self.average.weights[index]
            tensors[f"best.{name}"] = self.best[index]
            tensors[f"mean.{name}"] = mean
            tensors[f"square.{name}"] = square
        return tensors

    def _attach_moments(self) -> None:
        """Give the optimiser its moments, which live here so that a checkpoint finds them by name."""
        for name, weight in self.weights.items():
            mean, square = self.moments[name]
            step = torch.tensor(float(self.state.step))
            self.optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _resolve(settings: Hyperparameters) -> Hyperparameters:
    """The settings with what depends on the machine written out: the run can go on, or be done again, elsewhere."""
    return settings.model_copy(
        update={
            "threads": settings.threads or torch.get_num_threads(),
            "precision": "bfloat16" if product_dtype(settings.precision) == torch.bfloat16 else "float32",
        }
    )


def streamed_loss(window_loss: WindowLoss, ids: Tensor) -> float:
    """Mean nats a character of a text (n,) int64, from its second character on.

    The text is read as up to 64 streams side by side, each one after `_EVAL_WARMUP` characters that precede it and
    don't count: quick, and within 0.0002 of carrying the state through the whole text (`evaluate.py` does that).
    """
    num_targets = len(ids) - 1
    batch = max(1, min(_EVAL_STREAMS, num_targets // _EVAL_WARMUP))
    length = -(-num_targets // batch)
    ends = torch.arange(1, batch + 1) * length  # (B,) index of each stream's last target
    window = torch.arange(-_EVAL_WARMUP - length, 1)[:, None] + ends  # (warm-up + length + 1, B)
    counted = torch.zeros_like(window, dtype=torch.bool)
    counted[_EVAL_WARMUP + 1 :] = True
    counted &= (window >= 1) & (window <= num_targets)
    padded = ids[window.clamp(0, num_targets)]
    hidden = window_loss.model.initial_hidden(batch)
    total = 0.0
    for start in range(0, len(padded) - 1, _EVAL_STEPS):
        part = padded[start : start + _EVAL_STEPS + 1]
        # A stream that begins before the text begins: its state stays zero until the text does.
        losses, hidden = window_loss(part, hidden)
        keep = counted[start + 1 : start + 1 + len(part) - 1].reshape(-1)
        total += float(losses[keep].double().sum())
        before = window[start + len(part) - 1] <= 0
        hidden[:, before] = 0
    return total / num_targets

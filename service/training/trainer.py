"""The training loop: updates, evaluations, the best weights, and checkpoints from which a run can be resumed.

A resumed run gives the same result, bit for bit, as one that was never interrupted. For this, everything random in
update s comes from a generator seeded with (seed, s), and the offset of an epoch from one seeded with (seed, epoch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from service.errors import InvalidCheckpoint, TrainingDiverged
from service.model.artifact import Tensors
from service.model.config import ModelConfig
from service.model.gru import GRUCharModel
from service.training.checkpoint import Evaluation, RunState, read_tensors, save_checkpoint
from service.training.corpus import Corpus
from service.training.evaluation import streamed_loss
from service.training.hyperparameters import Hyperparameters
from service.training.network import DropoutRates, WindowLoss, initialise, product_dtype
from service.training.optimisation import WeightAverage, learning_rate
from service.training.randomness import seeded_generator
from service.training.streams import Streams, Window


class Progress(Protocol):
    """Receives the progress of a run, on the thread that trains."""

    def updated(self, step: int, loss: float) -> None:
        """Called after update `step` (counted from 1) with its loss in nats a character."""

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        """Called after every evaluation. `is_best` says whether it has the lowest validation loss so far."""


class Trainer:
    """A training run over one corpus, new or resumed from a checkpoint.

    `corpus` was read with these settings.
    """

    def __init__(
        self, corpus: Corpus, settings: Hyperparameters, checkpoint: Path, initial: Tensors | None = None
    ) -> None:
        settings = _resolve(settings)
        self.settings, self.checkpoint = settings, checkpoint
        self.validation_text = corpus.validation
        self.streams = Streams(
            corpus.training,
            settings.batch_size,
            settings.sequence_length,
            settings.seed,
            settings.restart_interval,
        )
        config = ModelConfig(
            charset=corpus.charset.characters,
            embedding_dim=settings.embedding_dim,
            num_units=settings.num_units,
            num_layers=settings.num_layers,
        )
        self.model = GRUCharModel(config)
        initialise(self.model, settings.seed)
        if initial is not None:
            self.model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in initial.items()})
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())  # as trained, not averaged
        self.average = WeightAverage(list(self.weights.values()), settings.average_decay)
        self.best = [weight.clone() for weight in self.average.weights]  # the average at the best evaluation
        self.hidden = self.model.initial_hidden(settings.batch_size)  # (L, B, H), carried from window to window
        decayed = [weight for weight in self.weights.values() if weight.dim() > 1]
        biases = [weight for weight in self.weights.values() if weight.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        # AdamW's means of the gradient and of its square.
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self._window_loss = WindowLoss(self.model, product_dtype(settings.precision))
        self.state = RunState(
            settings=settings,
            charset=corpus.charset.characters,
            corpus_name=corpus.name,
            corpus_sha256=corpus.sha256,
        )
        self._attach_moments()

    @property
    def total_steps(self) -> int:
        """The number of updates of the whole run, unless it stops early."""
        return self.settings.epochs * self.streams.windows_per_epoch

    @property
    def eval_interval(self) -> int:
        """The number of updates between two evaluations."""
        return self.settings.eval_interval or self.streams.windows_per_epoch

    def restore(self, state: RunState) -> None:
        """Continue the run of the checkpoint, whose state `read_state` returned.

        Raises InvalidCheckpoint if the checkpoint belongs to another corpus or has other settings, or is damaged.
        """
        if state.corpus_sha256 != self.state.corpus_sha256:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to another corpus, {state.corpus_name}")
        if state.settings != self.state.settings or state.charset != self.state.charset:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to a run with other settings")
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in read_tensors(self.checkpoint, tensors).items():
                tensors[name].copy_(value)
        self.state = state
        self._attach_moments()

    def run(self, progress: Progress, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train until the run is finished or `stopped()` returns True. Return whether the run is finished.

        A run is finished after its last update, or when early stopping ends it. The checkpoint is written at the
        start, after every evaluation and when the run is stopped.

        Raises TrainingDiverged if a loss is not finite, and InvalidCheckpoint if the checkpoint can't be written.
        `best_weights` stays available after either.
        """
        state, per_epoch = self.state, self.streams.windows_per_epoch
        torch.set_num_threads(self.settings.threads)
        if state.step == 0:
            self.save()  # so that an unwritable path fails now and not after the first epoch
        while not state.finished:
            began = time.perf_counter()
            epoch, index = divmod(state.step, per_epoch)
            if index == 0:
                self.hidden.zero_()
            loss = self._update(self.streams.window(epoch, index))
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss is {loss} in update {state.step + 1}: lower the learning rate or clip_norm"
                )
            state.loss_sum += loss
            state.loss_count += 1
            state.step += 1
            progress.updated(state.step, loss)
            is_last = state.step >= self.total_steps
            is_evaluated = is_last or state.step % self.eval_interval == 0
            if is_evaluated:
                self._evaluate(progress, is_last)
            is_stopped = stopped()
            state.seconds += time.perf_counter() - began
            if is_evaluated or is_stopped:
                self.save()
            if is_stopped:
                break
        return state.finished

    def best_weights(self) -> dict[str, Tensor]:
        """Return copies of the averaged weights, float32 by name, that had the lowest validation loss so far."""
        return {name: weight.clone() for name, weight in zip(self.weights, self.best, strict=True)}

    def save(self) -> None:
        """Write the checkpoint. Raises InvalidCheckpoint if that fails."""
        save_checkpoint(self.checkpoint, self.state, self._tensors())

    def validation_loss(self) -> float:
        """Return the loss of the averaged weights on the held-out text, in nats a character."""
        trained = [weight.detach().clone() for weight in self.weights.values()]
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), self.average.weights)
            loss = streamed_loss(self._window_loss, self.validation_text)
            torch._foreach_copy_(list(self.weights.values()), trained)
        return loss

    def _update(self, window: Window) -> float:
        settings, step = self.settings, self.state.step
        rate = learning_rate(settings, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rates = DropoutRates(settings.input_dropout, settings.recurrent_dropout, settings.output_dropout)
        draws = seeded_generator(settings.seed, "update", step)
        losses, hidden = self._window_loss(window.ids, self.hidden, rates, draws, window.resets)
        loss = losses[window.is_counted.view(-1)].mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), settings.clip_norm)
        self.optimizer.step()
        self.hidden.copy_(hidden)
        self.average.update(list(self.weights.values()), step + 1)
        return loss.item()

    def _evaluate(self, progress: Progress, is_last: bool) -> None:
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
        state.finished = is_last or (settings.patience > 0 and since_best >= settings.patience)
        progress.evaluated(point, is_best)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the run by name. They are not copies: to restore a run, overwrite their values."""
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
        """Let the optimiser use `self.moments`, which are stored by name so that a checkpoint can hold them."""
        for name, weight in self.weights.items():
            mean, square = self.moments[name]
            step = torch.tensor(float(self.state.step))
            self.optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _resolve(settings: Hyperparameters) -> Hyperparameters:
    """Replace `threads` 0 and `precision` auto by what they mean on this machine.

    The run can then be resumed, or repeated, on another machine with the same result.
    """
    return settings.model_copy(
        update={
            "threads": settings.threads or torch.get_num_threads(),
            "precision": "bfloat16" if product_dtype(settings.precision) == torch.bfloat16 else "float32",
        }
    )

"""The training loop: updates, evaluations, the best weights, and checkpoints from which a run can be resumed.

A resumed run gives the same result, bit for bit, as one that was never interrupted. For this, everything random in
update s comes from a generator seeded with (seed, s), and the offset of an epoch from one seeded with (seed, epoch).
It holds for one device: a run that continues on another one, or with another number of threads, rounds differently.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from service.errors import InvalidCheckpoint, InvalidValue, TrainingDiverged, plural
from service.model.artifact import Tensors
from service.model.config import ModelConfig
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.training.checkpoint import Evaluation, RunState, check_space, read_tensors, save_checkpoint
from service.training.corpus import Corpus
from service.training.devices import CPU, product_dtype
from service.training.evaluation import streamed_loss
from service.training.hyperparameters import Hyperparameters
from service.training.initial import InitialVersion
from service.training.network import DropoutRates, WindowLoss, initialise
from service.training.optimisation import WeightAverage, learning_rate
from service.training.randomness import seeded_generator
from service.training.streams import Streams, Window

# What may be changed when a run is resumed. Epochs only upwards, and the characters that were read remain.
CHANGEABLE = ("epochs", "max_chars", "patience", "threads")
SAVE_INTERVAL_S = 180.0  # between two checkpoints, if no evaluation is in between
_SAVE_SHARE = 20  # writing checkpoints takes at most about this fraction of the time
_SAMPLE_CHARS, _SAMPLE_PROMPT, _SAMPLE_TEMPERATURE = 80, 40, 0.8
_COUNTED = 2**20  # characters that are counted at a time, which bounds the memory
_UNSEEN = 0.1  # occurrences that a character counts more, so that one that never occurs has a probability
_SAMPLE_S = 2.0  # seconds that a sample takes at most
_PACE_UPDATES, _PACE_S = 20, 5.0  # that measure the pace, at most


class Progress(Protocol):
    """Receives the progress of a run, on the thread that trains."""

    def updated(self, step: int, loss: float) -> None:
        """Called after update `step` (counted from 1) with its loss in nats a character."""

    def evaluating(self, num_chars: int) -> None:
        """Called during an evaluation with the number of characters read since the last call."""

    def evaluated(self, point: Evaluation, is_best: bool) -> None:
        """Called after every evaluation. `is_best` says whether it has the lowest validation loss so far."""


class _StopRequested(Exception):
    """Ends an evaluation early. It is repeated when the run is resumed."""


class Trainer:
    """A training run over one corpus, new or resumed from a checkpoint.

    `corpus` was read with these settings. Raises InvalidValue if the sizes are too large, and InvalidCharset if the
    charset doesn't begin with that of the initial version.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: Hyperparameters,
        checkpoint: Path,
        initial: InitialVersion | None = None,  # has the sizes of `settings`; None for random weights
        device: torch.device = CPU,
    ) -> None:
        settings = _resolve(settings, device)
        self.settings, self.checkpoint, self.device = settings, checkpoint, device
        self.charset, self.validation_text = corpus.charset, corpus.validation
        self.streams = Streams(
            corpus.training,
            settings.batch_size,
            settings.sequence_length,
            settings.seed,
            settings.restart_interval,
        )
        self.model = GRUCharModel(_config(corpus.charset.characters, settings))
        if initial is None:
            # On the CPU, so that every device begins with the same weights.
            initialise(self.model, settings.seed, _first_frequencies(corpus.training, len(corpus.charset), settings))
        else:
            self.model.load_state_dict(initial.weights(corpus.charset.characters, settings.seed))
        self.model.to(device)
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())  # as trained, not averaged
        self.average = WeightAverage(list(self.weights.values()), settings.average_decay)
        # The average at the best evaluation, on the CPU: a GPU that has failed can't be read.
        self.best = [weight.to("cpu", copy=True) for weight in self.average.weights]
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
        self._window_loss = WindowLoss(self.model, product_dtype(settings.precision, device))
        self.state = RunState(
            settings=settings,
            charset=corpus.charset.characters,
            corpus_name=corpus.name,
            corpus_sha256=corpus.sha256,
            device=device.type,
            initial=initial.record if initial else None,
        )
        self._saved_at, self._save_s = time.monotonic(), 0.0  # end and duration of the last write of the checkpoint
        self._attach_moments()

    @property
    def total_steps(self) -> int:
        """The number of updates of the whole run, unless it stops early."""
        return self.settings.num_updates(len(self.streams.ids))

    @property
    def eval_interval(self) -> int:
        """The number of updates between two evaluations."""
        return self.settings.eval_interval or self.streams.windows_per_epoch

    def restore(self, state: RunState) -> None:
        """Continue the run of the checkpoint, whose state `read_state` returned.

        The settings of this trainer may have more epochs, another limit of characters, another patience or other
        threads than the checkpoint. The learning rate then follows the schedule of the new number of updates, so after
        some were added to a finished run it rises once and falls again. Patience counts anew.

        Raises InvalidCheckpoint if the checkpoint belongs to another corpus or has other settings, or is damaged.
        """
        if state.corpus_sha256 != self.state.corpus_sha256:
            if state.corpus_name == self.state.corpus_name:
                raise InvalidCheckpoint(
                    f"the corpus, {state.corpus_name}, has changed since the run in {self.checkpoint} began: restore "
                    "it, or begin anew on what it is now with --overwrite, from the published model with --init-from"
                )
            raise InvalidCheckpoint(
                f"{self.checkpoint} belongs to another corpus, {state.corpus_name}: give that corpus, or name another "
                "file with --checkpoint"
            )
        differing = [n for n in Hyperparameters.model_fields if getattr(state.settings, n) != getattr(self.settings, n)]
        if fixed := [name for name in differing if name not in CHANGEABLE]:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to a run with other settings: {', '.join(fixed)}")
        if state.charset != self.state.charset:
            raise InvalidCheckpoint(f"{self.checkpoint} belongs to a run with another charset")
        if self.settings.epochs < state.settings.epochs:
            raise InvalidCheckpoint(f"the run has {plural(state.settings.epochs, 'epoch')}, which can only be raised")
        if state.step > self.total_steps:
            num_read = state.step * self.settings.batch_size * self.settings.sequence_length
            raise InvalidCheckpoint(
                f"the run has read {num_read:,} characters, so --max-chars {self.settings.max_chars} is too low: "
                "give a higher number"
            )
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in read_tensors(self.checkpoint, tensors).items():
                tensors[name].copy_(value)
        self.state = state.model_copy(deep=True)
        if differing:
            self.state.change(self.settings)
        if {"epochs", "max_chars", "patience"} & set(differing):
            self.state.since_best = 0
            is_evaluated = bool(state.curve) and state.curve[-1].step == state.step
            self.state.finished = is_evaluated and state.step >= self.total_steps
        self.state.device = self.device.type
        self._attach_moments()

    def run(self, progress: Progress, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train until the run is finished or `stopped()` returns True. Return whether the run is finished.

        A run is finished after its last update, or when early stopping ends it. `stopped` is called between updates
        and during evaluations. The checkpoint is written at the start, after evaluations, every `SAVE_INTERVAL_S`
        seconds, and at the end.

        Raises TrainingDiverged if a loss is not finite, and InvalidCheckpoint if the checkpoint can't be written.
        `best_weights` stays available after either.
        """
        state = self.state
        torch.set_num_threads(self.settings.threads)
        self.save()  # so that an unwritable path fails now and not after the first epoch
        check_space(self.checkpoint)
        while not state.finished and not stopped():
            with self._timed():
                is_evaluation = self._is_evaluation_due
                if is_evaluation:
                    self._evaluate(progress, stopped)
                else:
                    self._train_on_next_window(progress)
            # Writing a checkpoint after each of many quick evaluations could take longer than the training.
            least = _SAVE_SHARE * self._save_s
            if time.monotonic() - self._saved_at >= (least if is_evaluation else max(least, SAVE_INTERVAL_S)):
                self.save()
        self.save()
        return state.finished

    def best_weights(self) -> dict[str, Tensor]:
        """Return copies, on the CPU, of the averaged weights that had the lowest validation loss so far, by name."""
        return {name: weight.clone() for name, weight in zip(self.weights, self.best, strict=True)}

    def save(self) -> None:
        """Write the checkpoint. Raises InvalidCheckpoint if that fails."""
        began = time.monotonic()
        save_checkpoint(self.checkpoint, self.state, self._tensors())
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - began

    def validation_loss(self, progress: Callable[[int], object] = lambda _: None) -> float:
        """Return the loss of the averaged weights on the held-out text, in nats a character.

        Calls `progress` with the number of characters read since its last call. It may raise.
        """
        with self._averaged_weights():
            return streamed_loss(self._window_loss, self.validation_text, progress)

    def sample(self) -> str:
        """Return a short text of the averaged weights, after the beginning of the held-out text.

        It depends only on the weights, the seed and the number of updates, and changes nothing in the run. On a slow
        machine it is shorter, because it takes at most about `_SAMPLE_S` seconds.
        """
        with self._averaged_weights():
            model = FoldedGRU(GRUCharModel.from_tensors(self.model.config, _on_cpu(self.weights)))
        draws = seeded_generator(self.settings.seed, "sample", self.state.step)
        # A line begins at the zero state, so a model of lines needs no prompt.
        prompt = [] if self.settings.lines else self.validation_text.ids[:_SAMPLE_PROMPT].tolist()
        ids = list(prompt)
        _, hidden = model.scan(torch.tensor(ids, dtype=torch.int64), model.initial_hidden())
        deadline = time.monotonic() + _SAMPLE_S
        while len(ids) < len(prompt) + _SAMPLE_CHARS and time.monotonic() < deadline:
            chances = torch.softmax(model.logits(hidden[-1:])[0] / _SAMPLE_TEMPERATURE, 0)
            ids.append(int(torch.multinomial(chances, 1, generator=draws)))
            _, hidden = model.scan(torch.tensor(ids[-1:]), hidden)
        return self.charset.decode(np.array(ids))

    def pace(self) -> float:
        """Return the characters a second that updates read on this machine now. Measuring it takes some seconds.

        It trains, so this trainer is then of no use for a run.
        """
        torch.set_num_threads(self.settings.threads)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < _PACE_UPDATES and sum(seconds) < _PACE_S):
            began = time.perf_counter()
            self._update(self.streams.window(0, len(seconds) % self.streams.windows_per_epoch))
            seconds.append(time.perf_counter() - began)
        # The first update also allocates memory.
        return self.settings.batch_size * self.settings.sequence_length / statistics.median(seconds[1:])

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Let the model have the averaged weights during the block, without gradients."""
        trained = [weight.detach().clone() for weight in self.weights.values()]
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), self.average.weights)
            try:
                yield
            finally:
                torch._foreach_copy_(list(self.weights.values()), trained)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.state.seconds += time.perf_counter() - began

    @property
    def _is_evaluation_due(self) -> bool:
        """Whether an evaluation follows now. It depends on the run's state only, so a resumed run evaluates as well."""
        step = self.state.step
        if step == 0 and self.state.initial is None:
            return False  # random weights
        is_last = self.state.curve[-1].step == step if self.state.curve else False
        return not is_last and (step % self.eval_interval == 0 or step >= self.total_steps)

    def _train_on_next_window(self, progress: Progress) -> None:
        state = self.state
        epoch, index = divmod(state.step, self.streams.windows_per_epoch)
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

    def _evaluate(self, progress: Progress, stopped: Callable[[], bool]) -> None:
        state, settings = self.state, self.settings

        def count(num_chars: int) -> None:
            progress.evaluating(num_chars)
            if stopped():
                raise _StopRequested

        try:
            loss = self.validation_loss(count)
        except _StopRequested:
            return
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the validation loss is {loss} after update {state.step}: lower the learning rate")
        point = Evaluation(
            number=state.num_evaluations,
            step=state.step,
            epoch=state.step / self.streams.windows_per_epoch,
            learning_rate=learning_rate(settings, state.step - 1, self.total_steps) if state.step else 0.0,
            training_loss=state.loss_sum / state.loss_count if state.loss_count else None,
            validation_loss=loss,
        )
        is_best = state.record(point)
        state.loss_sum, state.loss_count = 0.0, 0
        if is_best:
            for best, weight in zip(self.best, self.average.weights, strict=True):
                best.copy_(weight)
        is_last = state.step >= self.total_steps
        state.finished = is_last or (settings.patience > 0 and state.since_best >= settings.patience)
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
            step = torch.tensor(float(self.state.step), device=self.device)  # where the fused optimiser expects it
            self.optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _config(charset: str, settings: Hyperparameters) -> ModelConfig:
    """Return the model's config. Raises InvalidValue if the model would have too many parameters."""
    try:
        return ModelConfig(
            charset=charset,
            embedding_dim=settings.embedding_dim,
            num_units=settings.num_units,
            num_layers=settings.num_layers,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise InvalidValue(f"a model of these sizes is not possible: {problem}", param="num_units") from error


def _first_frequencies(text: EncodedText, num_chars: int, settings: Hyperparameters) -> Tensor:
    """Return how often each character begins a text, (V,) float32, or follows at all if there are few texts.

    A character that never begins one, such as the end of a line with --lines, is very unlikely but possible.
    """
    ids = text.ids[text.starts] if settings.lines else text.ids
    counts = np.zeros(num_chars, np.int64)
    for start in range(0, len(ids), _COUNTED):
        counts += np.bincount(ids[start : start + _COUNTED], minlength=num_chars)
    smoothed = counts + _UNSEEN
    return torch.from_numpy((smoothed / smoothed.sum()).astype(np.float32))


def _resolve(settings: Hyperparameters, device: torch.device) -> Hyperparameters:
    """Replace `threads` 0 and `precision` auto by what they mean on this machine.

    The run can then be resumed, or repeated, on another machine with the same result.
    """
    is_bfloat16 = product_dtype(settings.precision, device) == torch.bfloat16
    return settings.model_copy(
        update={
            "threads": settings.threads or torch.get_num_threads(),
            "precision": "bfloat16" if is_bfloat16 else "float32",
        }
    )


def _on_cpu(weights: dict[str, Tensor]) -> Tensors:
    return {name: weight.detach().to("cpu", copy=True).numpy() for name, weight in weights.items()}

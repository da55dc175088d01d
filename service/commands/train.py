"""`gru-serve train`."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from service.commands.eval import char_bar, corpus_bar, measure, require_torch
from service.commands.options import corpus_option, field_options, model_store_option, open_store
from service.errors import GruServeError
from service.training.hyperparameters import CHOSEN, Hyperparameters

if TYPE_CHECKING:
    from service.training.corpus import Corpus
    from service.training.sources import Sources
    from service.training.trainer import Progress, Trainer

_SAMPLE_CHARS, _SAMPLE_SEED, _SAMPLE_TEMPERATURE = 600, 1, 0.8


@click.command("train")
@corpus_option
@click.option("--name", required=True, help="Name of the model; a new version is published.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="File from which the run can be resumed.  [checkpoints/NAME.safetensors]",
)
@click.option(
    "--resume", is_flag=True, help="Continue the run in the checkpoint, with the settings that it began with."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint of an unfinished run.")
@model_store_option
@field_options(Hyperparameters)
def train_command(
    corpus: tuple[Path, ...],
    name: str,
    checkpoint: Path | None,
    resume: bool,
    overwrite: bool,
    model_store: Path | None,
    **options: Any,
) -> None:
    """Train a model on a text and publish it.

    Every evaluation writes a checkpoint. Ctrl-C stops after the current update, writes a checkpoint and publishes the
    best model so far. `--resume` continues the run with the same result as if it had not been stopped.

    Example: gru-serve train --corpus tinyshakespeare.txt --name shakespeare --epochs 10
    """
    require_torch()

    import torch

    from service.training.checkpoint import read_state
    from service.training.publishing import publish_run
    from service.training.sources import find_sources
    from service.training.trainer import Trainer

    store = open_store(model_store, create=True)
    checkpoint = checkpoint if checkpoint is not None else Path("checkpoints") / f"{name}.safetensors"
    sources = find_sources(corpus)
    given = {key: value for key, value in options.items() if value is not None}
    if resume:
        state = read_state(checkpoint)
        settings = state.settings
        _refuse_changes(settings, given)
        text = _read(sources, settings)
        trainer = Trainer(text, settings, checkpoint)
        trainer.restore(state)
    else:
        settings = _settings(given)
        if checkpoint.exists() and not overwrite and not read_state(checkpoint).finished:
            raise click.UsageError(f"{checkpoint} holds an unfinished run: give --resume or --overwrite")
        text = _read(sources, settings)
        settings = _choose(settings, text)
        trainer = Trainer(text, settings, checkpoint)
    store.check_writable(name)  # so that an invalid name or a full disk fails now and not after hours of training
    click.echo(
        f"{name}: {trainer.model.config.num_parameters:,} parameters, {text.num_chars:,} characters, "
        f"{trainer.model.config.vocab_size} of them distinct, {trainer.total_steps:,} updates, "
        f"{trainer.settings.threads} threads",
        err=True,
    )
    with _StopOnInterrupt() as interrupt, _Bar(trainer) as bar:
        failure = _run(trainer, bar, interrupt.is_set)
    if trainer.state.best_step is None:
        raise failure or _Interrupted(
            f"stopped before the first evaluation, so nothing is published; --resume continues from {checkpoint}"
        )

    torch.set_num_threads(1)  # a single text is measured faster on one core than on two
    command, ended = _command(sources, name, trainer.settings), _ended(trainer, failure)
    try:
        with char_bar(3 * trainer.validation_text.num_scored, description="measuring the best weights") as measuring:
            version = publish_run(store, name, text, trainer, command, ended, _Serving(), measuring.update)
    except KeyboardInterrupt:
        raise _Interrupted(f"stopped before the model was published; --resume continues from {checkpoint}") from None
    click.echo(f"published {version.ref} at {version.path}; its model card is {version.path / 'README.md'}")
    if failure:
        raise failure
    if not trainer.state.finished:
        raise _Interrupted(
            f"stopped before the end; the best model so far is published; --resume continues from {checkpoint}"
        )


class _Interrupted(click.ClickException):
    """The user stopped the run. Its checkpoint can be resumed."""

    exit_code = 130  # what shells report for a command that Ctrl-C ended

    def show(self, file: Any = None) -> None:  # noqa: ARG002
        click.echo(self.message, err=True)


def _run(trainer: Trainer, bar: Progress, stopped: Callable[[], bool]) -> GruServeError | None:
    """Train. Return the error if training failed, because the best weights so far can still be published."""
    try:
        trainer.run(bar, stopped)
    except GruServeError as error:
        return error
    return None


def _ended(trainer: Trainer, failure: GruServeError | None) -> str:
    """Say how the run ended, for the model card."""
    if failure:
        return f"failed: {failure.message}"
    if not trainer.state.finished:
        return "stopped by hand"
    return (
        "finished"
        if trainer.state.step >= trainer.total_steps
        else "stopped early: the validation loss no longer improved"
    )


class _StopOnInterrupt:
    """Context in which the first Ctrl-C sets an event and a second one raises KeyboardInterrupt as usual."""

    def __enter__(self) -> threading.Event:
        self._event = threading.Event()
        self._before = signal.getsignal(signal.SIGINT)

        def request_stop(_number: int, _frame: FrameType | None) -> None:
            self._event.set()  # prints nothing, because the signal may have interrupted a print
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, request_stop)
        return self._event

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class _Bar:
    """Shows a progress bar with the losses on standard error, and a line for every evaluation."""

    def __init__(self, trainer: Trainer) -> None:
        settings = trainer.settings
        self._chars = settings.batch_size * settings.sequence_length  # of an update
        self._bar = char_bar(trainer.total_steps * self._chars, trainer.state.step * self._chars)
        self._loss: float | None = None
        self._validation = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def updated(self, _step: int, loss: float) -> None:
        """Show the progress after an update, with the loss smoothed over about 20 updates."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._bar.set_postfix_str(f"loss {self._loss:.3f}{self._validation}", refresh=False)
        self._bar.update(self._chars)

    def evaluated(self, point: Any, is_best: bool) -> None:
        """Print a line about an evaluation."""
        self._validation = f", validation {point.validation_loss:.4f}"
        self._bar.write(
            f"epoch {point.epoch:6.2f}  update {point.step:6}  training {point.training_loss:.4f}  "
            f"validation {point.validation_loss:.4f}{'  best' if is_best else ''}",
            file=sys.stderr,
        )


def _settings(given: dict[str, Any]) -> Hyperparameters:
    """Return the hyperparameters of the given options. Raises click.BadParameter."""
    from pydantic import ValidationError

    try:
        return Hyperparameters(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise click.BadParameter(f"{first.get('input')}: {first['msg']}", param_hint=option) from error


def _refuse_changes(settings: Hyperparameters, given: dict[str, Any]) -> None:
    """Raise click.UsageError if a given option differs from the settings of the run that is resumed."""
    for key, value in given.items():
        if getattr(settings, key) != value:
            option = "--" + key.replace("_", "-")
            raise click.UsageError(
                f"{option} {value} can't be changed: the run that is resumed has {getattr(settings, key)}"
            )


def _command(sources: Sources, name: str, settings: Hyperparameters) -> str:
    """Return a command that repeats the run.

    It names what was given as the corpus without its folder. It gives every setting that differs from its default or is
    chosen by the size of the text, so that a version with other choices repeats the run too.
    """
    words = ["gru-serve", "train"]
    for word in sources.words:
        words += ["--corpus", word]
    words += ["--name", name]
    for key, field in Hyperparameters.model_fields.items():
        value = getattr(settings, key)
        if value != field.default or key in CHOSEN:
            words += ["--" + key.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(words)


def _read(sources: Sources, settings: Hyperparameters) -> Corpus:
    """Read the corpus, showing a bar, and print its notes."""
    from service.training.corpus import read_corpus

    with corpus_bar(sources) as bar:
        corpus = read_corpus(sources, settings, bar.update)
    for note in corpus.notes:
        click.echo(f"{corpus.name}: {note}", err=True)
    return corpus


def _choose(settings: Hyperparameters, corpus: Corpus) -> Hyperparameters:
    """Choose the settings that were not given, and say what was chosen."""
    from service.training.recipe import choose

    recipe = choose(settings, corpus.num_training_chars, len(corpus.training.starts))
    for line in recipe.lines:
        click.echo(line, err=True)
    return recipe.settings


class _Serving:
    """Measures and samples with the arithmetic of the engine. Implements `publishing.Serving`."""

    def loss(self, config: Any, tensors: Any, precision: str, text: Any, progress: Callable[[int], object]) -> float:
        return measure(config, tensors, precision, text, progress)

    def sample(self, config: Any, tensors: Any, precision: Any, prompt: str) -> Any:
        from service.engine.sampling_settings import SamplingSettings
        from service.engine.stepper import Row
        from service.engine.torch_stepper import TorchStepper
        from service.model.charset import Charset
        from service.model.quantize import quantize
        from service.training.publishing import Sample

        charset = Charset(config.charset)
        stepper = TorchStepper(quantize(config, tensors, precision))
        row = Row(stepper.initial_hidden(), 0, charset.exact(prompt), _SAMPLE_CHARS, _SAMPLE_SEED)
        row.sampling = SamplingSettings(_SAMPLE_TEMPERATURE)
        chars = stepper.advance([row], len(prompt) + _SAMPLE_CHARS)[0].chars
        return Sample(prompt, _SAMPLE_SEED, _SAMPLE_TEMPERATURE, charset.decode(chars))

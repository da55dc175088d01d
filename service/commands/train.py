"""`gru-serve train`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.commands.eval import measure, require_torch
from service.commands.options import (
    ChatTemplateType,
    PathOption,
    announcing_new_store,
    corpus_option,
    field_options,
    limit_spinning,
    model_store_option,
    open_store,
)
from service.commands.progress import Progress, say, tell
from service.commands.stopping import Stopped, StopSignals
from service.errors import GruServeError, InvalidCheckpoint, plural
from service.training.hyperparameters import CHOSEN, Hyperparameters

if TYPE_CHECKING:
    from service.model.chat_template import ChatTemplate
    from service.training.checkpoint import PublishedRecord, RunState
    from service.training.corpus import Corpus
    from service.training.devices import Device
    from service.training.initial import InitialVersion
    from service.training.publishing import Publication
    from service.training.sources import Sources
    from service.training.trainer import Trainer

_SAMPLE_SEED, _SAMPLE_TEMPERATURE = 1, 0.8  # of the sample on the card
_PROMPT = "It was "  # of the command that is proposed at the end
_SAMPLE_INTERVAL_S = 60.0  # between two samples while training, at least
_FEW_HELD_OUT = 200  # characters whose loss says little
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class _Request:
    """What the command line says."""

    sources: Sources
    name: str
    checkpoint: Path
    resume: bool
    overwrite: bool
    init_from: str | None
    device: Any
    store: Any
    store_option: Path | None
    given: dict[str, Any]  # hyperparameters that were given
    minutes: int | None
    chat: ChatTemplate | None


@click.command("train")
@corpus_option
@click.option("--name", required=True, help="Name of the model; a new version is published.")
@click.option(
    "--init-from",
    metavar="MODEL",
    help="Begin with the weights of a published version, as name, name@version or name@alias. Its sizes are taken too, "
    "and its charset grows by the characters of the text.",
)
@click.option(
    "--chat",
    type=ChatTemplateType(),
    help="How the version writes the messages of a chat: a file with a chat template, or play, dialogue or lines. "
    "[that of --init-from, or none]",
)
@click.option(
    "--checkpoint",
    type=PathOption(),
    help="File from which the run can be resumed.  [checkpoints/NAME.safetensors]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in the checkpoint, with the settings that it began with, or publish it if that failed. "
    "--epochs may be raised; --max-chars, --minutes, --patience and --threads may differ.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint of an unfinished run.")
@click.option(
    "--device",
    type=click.Choice(_DEVICES),
    default="auto",
    help="Where to train; auto takes a GPU if torch can use one.  [auto]",
)
@click.option(
    "--minutes",
    type=click.IntRange(1, 10**6),
    help="Train for about this time at most: the characters that this machine reads in it, measured at the start, "
    "become --max-chars. With --resume they are added to those that were read.",
)
@model_store_option
@field_options(Hyperparameters)
def train_command(
    corpus: tuple[Path, ...],
    name: str,
    init_from: str | None,
    chat: ChatTemplate | None,
    checkpoint: Path | None,
    resume: bool,
    overwrite: bool,
    device: Device,
    minutes: int | None,
    model_store: Path | None,
    **options: Any,
) -> None:
    """Train a model on a text and publish it.

    A checkpoint is written after evaluations and every few minutes. Ctrl-C and SIGTERM stop after the current update,
    write a checkpoint and publish the best model so far; a second Ctrl-C ends at once. `--resume` continues the run
    with the same result as if it had not been stopped.

    Example: gru-serve train --corpus tinyshakespeare.txt --name shakespeare --epochs 10
    """
    limit_spinning()
    if minutes is not None and options["max_chars"] is not None:
        raise click.UsageError("--minutes chooses --max-chars: give one of them")
    store = open_store(model_store, create=True)
    store.versions(name)  # refuses an impossible name before anything is written
    checkpoint = checkpoint if checkpoint is not None else Path("checkpoints") / f"{name}.safetensors"
    with StopSignals() as signals:
        with signals.says("stopped before the training began: nothing has changed"):
            from service.training.sources import find_sources

            sources = find_sources(corpus)
            say(f"reading {sources.name}")  # before torch is imported, which takes seconds
            require_torch()
            from service.training.checkpoint import lock_checkpoint
            from service.training.devices import find_device

            given = {key: value for key, value in options.items() if value is not None}
            place = find_device(device)
            request = _Request(
                sources, name, checkpoint, resume, overwrite, init_from, place, store, model_store, given, minutes, chat
            )
        with lock_checkpoint(checkpoint, name, say):
            _train_and_publish(request, signals)


def _train_and_publish(request: _Request, signals: StopSignals) -> None:
    """Carry out the command. Raises Stopped and GruServeError."""
    from service.training.devices import failures
    from service.training.publishing import Publication
    from service.training.recipe import limiting_option

    with signals.says("stopped before the training began: nothing has changed"), failures():
        corpus, trainer = _prepare(request)
        command = _command(request, trainer)
        publication = Publication(request.store, request.name, corpus, trainer, command, _Serving())
        existing = publication.existing()
        if trainer.state.finished and existing:
            chat = "; `gru-serve models chat` gives it a chat template" if request.chat else ""
            more = limiting_option(trainer.settings, corpus.num_training_chars)
            tell(f"the run is finished and published as {existing.ref}; --resume with more {more} continues it{chat}")
            return
        with announcing_new_store(request.store, request.store_option):
            publication.rehearse()
        _describe(request, corpus, trainer)
    again = f"--resume continues from {request.checkpoint}"
    with signals.says(f"stopped at once; {again}, as it was last written"):
        failure = _train(trainer, signals)
    if isinstance(failure, InvalidCheckpoint) and trainer.state.best is not None:
        failure = InvalidCheckpoint(f"{failure.message}; {again}, as it was last written")
    if trainer.state.best is None:
        if failure:
            raise failure
        raise Stopped(f"stopped before the first evaluation, so nothing is published; {again}", signals)
    _warn_of_no_order(corpus, trainer.state.best_loss)
    if published := publication.existing():
        say(f"the best weights so far are those of {published.ref}, which is published already")
    else:
        _publish(request, publication, trainer, failure, signals)
    if failure:
        raise failure
    if not trainer.state.finished:
        raise Stopped(f"stopped before the end; the best model so far is published; {again}", signals)


def _prepare(request: _Request) -> tuple[Corpus, Trainer]:
    """Read the corpus and make the trainer, which is restored from the checkpoint if the run is resumed."""
    from service.training.checkpoint import read_state, require_replaceable
    from service.training.trainer import Trainer

    if request.resume:
        state = read_state(request.checkpoint)
        _check_initial(request, state)
        settings = _changed(state.settings, request.given)
        corpus = _read(request.sources, settings, known=state.charset)
        if request.minutes is not None:
            settings = _within(request.minutes, request, settings, corpus, num_updates=state.step)
        trainer = Trainer(corpus, settings, request.checkpoint, device=request.device)
        trainer.restore(state)
        if state.device != request.device.type:
            say(f"the run was on {state.device} and continues on {request.device.type}, which rounds differently")
        _choose_chat(trainer, request.chat or state.chat)
        return corpus, trainer
    if os.path.lexists(request.checkpoint):
        require_replaceable(request.checkpoint)
        if not request.overwrite:
            _refuse_to_overwrite(request.checkpoint)
    initial = _load_initial(request)
    settings = _settings(request.given, initial)
    corpus = _read(request.sources, settings, known=initial.artifact.config.charset if initial else "")
    settings = _choose(request, settings, corpus, initial)
    trainer = Trainer(corpus, settings, request.checkpoint, initial, request.device)
    _choose_chat(trainer, request.chat or (initial.artifact.chat if initial else None))
    return corpus, trainer


def _choose_chat(trainer: Trainer, chat: ChatTemplate | None) -> None:
    """Let the run publish a chat template. Raises click.BadParameter if the model will not know its characters."""
    if chat is not None and (unknown := chat.unknown_to(trainer.charset)):
        raise click.BadParameter(
            f"the text has no {unknown}, which the template writes: give another template", param_hint="--chat"
        )
    trainer.state.chat = chat


def _choose(
    request: _Request, settings: Hyperparameters, corpus: Corpus, initial: InitialVersion | None
) -> Hyperparameters:
    """Choose the settings that were not given, and say what was chosen."""
    from service.training.recipe import choose

    sizes = corpus.num_training_chars, len(corpus.training.starts), corpus.num_validation_chars
    if request.minutes is not None:
        settings = _within(request.minutes, request, settings, corpus, initial)
    recipe = choose(settings, *sizes)
    for line in recipe.lines:
        say(line)
    if corpus.num_validation_chars < _FEW_HELD_OUT:
        say(
            f"warning: {corpus.num_validation_chars:,} held-out characters are too few to choose the best weights "
            "with: add text, or raise --validation-fraction or --validation-chars"
        )
    return recipe.settings


def _within(
    minutes: int,
    request: _Request,
    given: Hyperparameters,
    corpus: Corpus,
    initial: InitialVersion | None = None,
    num_updates: int = 0,  # done before
) -> Hyperparameters:
    """Measure how fast this machine trains, say it, and return the given settings with the limit of --minutes."""
    from service.training.recipe import choose, limit_time
    from service.training.trainer import Trainer

    sizes = corpus.num_training_chars, len(corpus.training.starts), corpus.num_validation_chars
    settings, pace = choose(given.model_copy(update={"max_chars": 0}), *sizes).settings, 0.0
    for _ in range(2):  # what is chosen for the limit may be slower, because its batches are smaller
        pace = Trainer(corpus, settings, request.checkpoint, initial, request.device).pace()
        limited = limit_time(given, 60.0 * minutes, pace, *sizes)
        settings, before = choose(limited, *sizes).settings, settings
        if (settings.batch_size, settings.sequence_length) == (before.batch_size, before.sequence_length):
            break
    num_read = num_updates * settings.batch_size * settings.sequence_length
    num_read += limited.max_chars
    say(f"{plural(minutes, 'minute', ',')} at {pace:,.0f} characters a second, and evaluations: --max-chars {num_read}")
    return given.model_copy(update={"max_chars": num_read})


def _refuse_to_overwrite(checkpoint: Path) -> None:
    """Raise click.UsageError if the checkpoint holds something that isn't published."""
    from service.training.checkpoint import read_state

    state = read_state(checkpoint)
    if not state.finished:
        raise click.UsageError(f"{checkpoint} holds an unfinished run: give --resume or --overwrite")
    if not state.is_published:
        raise click.UsageError(
            f"{checkpoint} holds a run that is not published: give --resume, which publishes it, or --overwrite"
        )


def _load_initial(request: _Request) -> InitialVersion | None:
    """Load the version of --init-from. Raises click.UsageError if a size was given that it doesn't have."""
    if request.init_from is None:
        return None
    from service.training.initial import InitialVersion

    version, artifact = request.store.load(request.init_from)
    initial = InitialVersion(version.ref, artifact)
    for key, value in initial.settings.items():
        if request.given.get(key, value) != value:
            raise click.UsageError(
                f"{_option(key)} {request.given[key]} contradicts --init-from {version.ref}, which has {value}"
            )
    return initial


def _check_initial(request: _Request, state: RunState) -> None:
    """Raise click.UsageError if --init-from is given and is not what the resumed run began with."""
    if request.init_from is None:
        return
    described = request.store.describe(request.store.resolve(request.init_from))
    if state.initial is None or state.initial.digest != described.digest:
        began = f"the weights of {state.initial.ref}" if state.initial else "random weights"
        raise click.UsageError(f"the run that is resumed began with {began}: leave --init-from out")


def _settings(given: dict[str, Any], initial: InitialVersion | None) -> Hyperparameters:
    """Return the hyperparameters of the given options. Raises click.BadParameter."""
    if initial is not None:
        from service.training.initial import LEARNING_RATE

        given = {"learning_rate": LEARNING_RATE} | given | initial.settings
    return _checked(given)


def _checked(values: dict[str, Any]) -> Hyperparameters:
    """Return the hyperparameters with these values. Raises click.BadParameter."""
    from pydantic import ValidationError

    try:
        return Hyperparameters(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        hint = _option(str(first["loc"][0])) if first["loc"] else None
        raise click.BadParameter(
            f"{first.get('input')}: {first['msg'].removeprefix('Value error, ')}", param_hint=hint
        ) from error


def _changed(settings: Hyperparameters, given: dict[str, Any]) -> Hyperparameters:
    """Return the settings of a resumed run. Raises click.UsageError if a given option can't be changed."""
    from service.training.trainer import CHANGEABLE

    # A run continues in the precision that it began with, so `auto` means that one.
    given = {key: value for key, value in given.items() if (key, value) != ("precision", "auto")}
    for key, value in given.items():
        before = getattr(settings, key)
        if value != before and key not in CHANGEABLE:
            given_value, has = (f" {value}", before) if value is not True else ("", "no such option")
            raise click.UsageError(f"{_option(key)}{given_value} can't be changed: the run that is resumed has {has}")
        if key == "epochs" and value < before:
            raise click.UsageError(f"--epochs can only be raised: the run that is resumed has {before}")
    return _checked(settings.model_dump() | given)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(sources: Sources, settings: Hyperparameters, known: str) -> Corpus:
    """Read the corpus, showing its progress, and print its notes."""
    from service.training.corpus import read_corpus

    with Progress(f"reading {sources.name}", sources.num_bytes, "byte") as progress:
        corpus = read_corpus(sources, settings, progress.update, known)
    for note in corpus.notes:
        say(f"{corpus.name}: {note}")
    return corpus


def _describe(request: _Request, corpus: Corpus, trainer: Trainer) -> None:
    config, state, settings = trainer.model.config, trainer.state, trainer.settings
    device = trainer.device.type
    began = f", begins with the weights of {state.initial.ref}" if state.initial else ""
    say(
        f"{request.name}: {plural(config.num_parameters, 'parameter', ',')}, "
        f"{plural(corpus.num_chars, 'character', ',')}, "
        f"{config.vocab_size:,} of them distinct, {plural(trainer.total_steps, 'update', ',')}, "
        f"{plural(settings.threads, 'thread', ',') if device == 'cpu' else device}, "
        f"products in {settings.precision}{_why_precision(request)}{began}"
    )


def _why_precision(request: _Request) -> str:
    """Say why `--precision auto` chose what it chose, if it was measured for this run."""
    from service.training.devices import bfloat16_speedup

    if request.resume or request.given.get("precision", "auto") != "auto" or request.device.type != "cpu":
        return ""
    return f" (bfloat16 is {bfloat16_speedup():.1f} times as fast here)"


def _train(trainer: Trainer, signals: StopSignals) -> GruServeError | None:
    """Train. Return the error if training failed, because the best weights so far can still be published."""
    from service.training.devices import failures

    settings = trainer.settings
    chars = settings.batch_size * settings.sequence_length  # of an update
    try:
        total, done = trainer.total_steps * chars, trainer.state.step * chars
        with Progress("training", total, initial=done) as progress, signals.deferred(), failures():
            trainer.run(_Display(trainer, progress, chars), signals.is_requested)
    except GruServeError as error:
        return error
    return None


def _warn_of_no_order(corpus: Corpus, best_loss: float) -> None:
    """Warn if the best weights are no better than a table of frequencies: texts of such a model are noise."""
    if best_loss >= (loss := corpus.frequency_loss()):
        say(
            f"warning: the model predicts no better than the frequencies of the characters alone (loss "
            f"{best_loss:.4f}, theirs {loss:.4f}), so its texts are noise: raise --epochs, change --learning-rate, or "
            "add text"
        )


class _Display:
    """Shows the progress of training: the losses, a line for every evaluation, and samples."""

    def __init__(self, trainer: Trainer, progress: Progress, chars: int) -> None:
        self._trainer, self._progress, self._chars = trainer, progress, chars
        self._evaluation: Progress | None = None
        self._loss: float | None = None
        self._validation = ""
        self._sampled_at = float("-inf")

    def updated(self, _step: int, loss: float) -> None:
        """Show the progress after an update, with the loss smoothed over about 20 updates."""
        self._close_evaluation()  # one that was stopped
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._progress.note(f"loss {self._loss:.3f}{self._validation}")
        self._progress.update(self._chars)

    def evaluating(self, num_chars: int) -> None:
        """Show the progress of an evaluation."""
        if self._evaluation is None:
            self._evaluation = Progress("evaluating", self._trainer.validation_text.num_scored)
        self._evaluation.update(num_chars)

    def evaluated(self, point: Any, is_best: bool) -> None:
        """Print a line about an evaluation, and now and then a sample."""
        import time

        self._close_evaluation()
        self._validation = f", validation {point.validation_loss:.4f}"
        training = "" if point.training_loss is None else f"training {point.training_loss:.4f}  "
        self._progress.say(
            f"epoch {point.epoch:6.2f}  update {point.step:6}  {training}"
            f"validation {point.validation_loss:.4f}{'  best' if is_best else ''}"
        )
        if time.monotonic() - self._sampled_at >= _SAMPLE_INTERVAL_S:
            self._progress.say(f"sample {self._trainer.sample()!r}")  # as a literal: a text may have control characters
            self._sampled_at = time.monotonic()

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.__exit__()
            self._evaluation = None


def _ended(trainer: Trainer, failure: GruServeError | None, signals: StopSignals) -> str:
    """Say how the run ended, for the model card."""
    if failure:
        return f"failed: {failure.message}"
    if not trainer.state.finished:
        return "stopped by hand" if signals.exit_status == 130 else "stopped by a signal"
    return (
        "finished"
        if trainer.state.step >= trainer.total_steps
        else "stopped early: the validation loss no longer improved"
    )


def _publish(
    request: _Request,
    publication: Publication,
    trainer: Trainer,
    failure: GruServeError | None,  # of the training
    signals: StopSignals,
) -> None:
    """Publish the best weights, and print what to do with them."""
    import torch

    from service.training.checkpoint import mark_published

    ended = _ended(trainer, failure, signals)
    torch.set_num_threads(1)  # a single text is measured faster on one core than on two
    with signals.says(f"stopped before the model was published; --resume with {request.checkpoint} publishes it"):
        measuring = Progress("measuring the best weights", publication.num_measured)
        with _says_how_to_publish(request.checkpoint, failure), measuring:
            version, record = publication.publish(ended, measuring.update)
        try:
            mark_published(request.checkpoint, record)
        except GruServeError as error:
            say(f"{error.message}, so --resume would publish this model again")
        tell(f"published {version.ref} at {version.path}; its model card is {version.path / 'README.md'}")
    _say_next(request, trainer, record)


@contextmanager
def _says_how_to_publish(checkpoint: Path, failure: GruServeError | None) -> Iterator[None]:
    """Let every failure say that nothing is lost, or how much is if the checkpoint could not be written either."""
    try:
        yield
    except (GruServeError, OSError, MemoryError, RuntimeError) as error:
        what = error.message if isinstance(error, GruServeError) else str(error) or type(error).__name__
        advice = f"Its weights are in {checkpoint}: --resume publishes them"
        if isinstance(failure, InvalidCheckpoint):
            advice = failure.message
        raise click.ClickException(f"the model could not be published: {what}. {advice}") from error


def _say_next(request: _Request, trainer: Trainer, record: PublishedRecord) -> None:
    """Print commands that use the version, with a prompt that the model knows."""
    store = f" --model-store {shlex.quote(str(request.store_option))}" if request.store_option else ""
    is_known = set(_PROMPT) <= set(trainer.charset.characters)
    prompt = f"'{_PROMPT}'" if is_known and not trainer.settings.lines else "''"
    if trainer.settings.lines:
        prompt += r" --stop '\n'"
    say(f"next: gru-serve generate --model {request.name} --prompt {prompt}{store}")
    say(f"      gru-serve serve --model {request.name}{store}        # {record.ref} over HTTP")


def _command(request: _Request, trainer: Trainer) -> str:
    """Return a command that repeats the run.

    It names what was given as the corpus without its folder. It gives every setting that differs from its default or is
    chosen by the size of the text, so that a version with other choices repeats the run too.
    """
    from service.model.artifact import CHAT
    from service.model.chat_template import PRESETS

    words = ["gru-serve", "train"]
    for word in request.sources.words:
        words += ["--corpus", word]
    words += ["--name", request.name]
    initial, settings = trainer.state.initial, trainer.settings
    if initial is not None:
        words += ["--init-from", initial.ref]
    for key, field in Hyperparameters.model_fields.items():
        value = getattr(settings, key)
        is_needed = value != field.default or key in CHOSEN
        if is_needed and not (initial is not None and key in _sizes()):
            words += [_option(key), *([] if value is True else [str(value)])]
    if trainer.state.chat is not None:
        presets = (name for name, preset in PRESETS.items() if preset == trainer.state.chat)
        words += ["--chat", next(presets, CHAT)]  # a file's content is published under this name
    return shlex.join(words)


def _sizes() -> tuple[str, ...]:
    from service.training.initial import SIZES

    return SIZES


class _Serving:
    """Measures and samples with the arithmetic of the engine. Implements `publishing.Serving`."""

    def loss(self, config: Any, tensors: Any, precision: str, text: Any, progress: Callable[[int], object]) -> float:
        return measure(config, tensors, precision, text, progress)

    def sample(self, config: Any, tensors: Any, precision: Any, prompt: str, num_chars: int) -> Any:
        from service.engine.request import Request
        from service.engine.sampling_settings import SamplingSettings
        from service.engine.stepper import Row
        from service.engine.torch_stepper import TorchStepper
        from service.model.charset import Charset
        from service.model.quantize import quantize
        from service.training.publishing import Sample

        charset = Charset(config.charset)
        stepper = TorchStepper(quantize(config, tensors, precision))
        request = Request(charset.exact(prompt), num_chars, _SAMPLE_SEED, SamplingSettings(_SAMPLE_TEMPERATURE))
        row = Row(request, stepper.initial_hidden())
        chars = stepper.advance([row], len(prompt) + num_chars)[0].chars
        return Sample(prompt, _SAMPLE_SEED, _SAMPLE_TEMPERATURE, charset.decode(chars))

"""Publishes the best weights of a run: measures them, chooses the serving precision, and writes the model card."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from service import __version__
from service.errors import StoreError
from service.model.artifact import CARD, Tensors, write_artifact
from service.model.config import ModelConfig
from service.model.encoded_text import EncodedText
from service.model.quantize import IntegerPrecision, Precision, choose_precision
from service.store.model_store import ModelStore, ModelVersion
from service.training.card import CURVE, loss_curve, model_card
from service.training.corpus import Corpus
from service.training.trainer import Trainer

_PROMPT_CHARS = 40  # of the sample on the card


@dataclass(frozen=True)
class Sample:
    """A text that the model generated, for its card."""

    prompt: str
    seed: int
    temperature: float
    text: str


class Serving(Protocol):
    """Computes as the server will. The command line passes it in, because this package may not import the engine."""

    def loss(
        self,
        config: ModelConfig,
        tensors: Tensors,
        precision: Precision,
        text: EncodedText,
        progress: Callable[[int], object],
    ) -> float:
        """Return the loss of a text in nats a character. Calls `progress` with numbers of characters."""
        ...  # pragma: no cover

    def sample(self, config: ModelConfig, tensors: Tensors, precision: IntegerPrecision, prompt: str) -> Sample:
        """Generate a text from a prompt, which may be empty."""
        ...  # pragma: no cover


def publish_run(
    store: ModelStore,
    name: str,
    corpus: Corpus,
    trainer: Trainer,
    command: str,
    ended: str,
    serving: Serving,
    progress: Callable[[int], object] = lambda _: None,
) -> ModelVersion:
    """Publish the weights with the lowest validation loss so far as a new version of `name`.

    The held-out text is measured in every precision. The version's serving precision is the one with the fewest bits
    whose loss is almost that of float32.

    Args:
        store: the store that gets the new version.
        name: the name of the model.
        corpus: the text that the model was trained on.
        trainer: the trainer of the run, which may be unfinished.
        command: a command that repeats the run, for the card.
        ended: how the run ended, for the card.
        serving: measures the weights and generates the sample.
        progress: a function that is called with the number of characters measured since its last call.

    Raises:
        StoreError: the run has had no evaluation yet, or the store can't write the version.
    """
    if trainer.state.best_step is None:
        raise StoreError("there is nothing to publish: the run ended before its first evaluation")
    config = trainer.model.config
    tensors = {key: tensor.detach().numpy() for key, tensor in trainer.best_weights().items()}
    # A line begins at the zero state, so a model of lines needs no prompt.
    prompt = "" if trainer.settings.lines else corpus.charset.decode(corpus.validation.ids[:_PROMPT_CHARS])
    precisions: tuple[Precision, ...] = ("float32", "int8", "int4")
    losses = {
        precision: serving.loss(config, tensors, precision, corpus.validation, progress) for precision in precisions
    }
    serving_precision = choose_precision(losses)
    facts = _facts(trainer, corpus, command, ended, serving.sample(config, tensors, serving_precision, prompt))
    facts["serving_precision"] = serving_precision
    facts["losses"] |= {
        "validation_nats_per_char": losses["float32"],
        "validation_bits_per_char": losses["float32"] / math.log(2),
        "validation_num_scored": corpus.validation.num_scored,
        "validation_nats_per_char_by_precision": losses,
    }
    picture = loss_curve(trainer.state.curve)
    files = {CARD: model_card(name, facts, picture is not None).encode()}
    if picture is not None:
        files[CURVE] = picture

    def write(directory: Path) -> None:
        write_artifact(directory, config, tensors, facts, files)

    return store.publish(name, write)


def _facts(trainer: Trainer, corpus: Corpus, command: str, ended: str, sample: Sample) -> dict[str, Any]:
    """Collect what `training.json` holds, except the losses that `publish_run` measures."""
    state, settings = trainer.state, trainer.settings
    best = next(point for point in state.curve if point.step == state.best_step)
    num_chars = state.step * settings.batch_size * settings.sequence_length
    return {
        "format": 1,
        "published_at": int(time.time()),
        "command": command,
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "num_chars": corpus.num_chars,
            "num_training_chars": corpus.num_training_chars,
            "num_validation_chars": corpus.num_validation_chars,
            "notes": "\n".join(corpus.notes),
        },
        "vocab_size": trainer.model.config.vocab_size,
        "num_parameters": trainer.model.config.num_parameters,
        "settings": settings.model_dump(),
        "losses": {"training_nats_per_char": best.training_loss},
        "run": {
            "num_updates": state.step,
            "num_epochs": state.step / trainer.streams.windows_per_epoch,
            "best_update": state.best_step,
            "ended": ended,
            "seconds": round(state.seconds, 1),
            "chars_per_s": round(num_chars / state.seconds) if state.seconds else 0,
        },
        "curve": [point.model_dump() for point in state.curve],
        "sample": {
            "prompt": sample.prompt,
            "seed": sample.seed,
            "temperature": sample.temperature,
            "text": sample.text,
        },
        "versions": {"gru-serve": __version__, "torch": torch.__version__},
    }

"""From a run's best weights to a published version: measured in float32, described, sampled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service import __version__
from service.errors import StoreError
from service.model.artifact import CARD, write_artifact
from service.model.charset import Charset
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.store import ModelStore, ModelVersion
from service.training.card import CURVE, loss_curve, model_card
from service.training.corpus import Corpus
from service.training.evaluate import text_loss
from service.training.trainer import Trainer


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote, for its card."""

    prompt: str
    seed: int
    temperature: float
    text: str


def publish_run(
    store: ModelStore,
    name: str,
    corpus: Corpus,
    trainer: Trainer,
    command: str,
    ended: str,
    write_sample: Callable[[FoldedGRU, Charset, str], Sample],
    progress: Callable[[int], object] = lambda _: None,
) -> ModelVersion:
    """Publish the best weights of a run so far as a new version of `name`.

    command, ended: how the run was started and how it ended, for the card. write_sample: gets the network, its
    charset and the held-out text. progress: gets numbers of characters while that is read. Raises StoreError.
    """
    if trainer.state.best_step is None:
        raise StoreError("there is nothing to publish: the run ended before its first evaluation")
    model = GRUCharModel(trainer.model.config)
    model.load_state_dict(trainer.best_weights())
    network, charset = FoldedGRU(model), Charset(model.config.charset)
    held_out = corpus.split(trainer.settings.validation_fraction)[1]
    loss = text_loss(network, trainer.validation_ids.numpy(), progress)
    sample = write_sample(network, charset, held_out)
    facts = _facts(trainer, corpus, command, ended, sample)
    facts["losses"] |= {
        "validation_nats_per_char": loss.nats_per_char,
        "validation_bits_per_char": loss.bits_per_char,
        "validation_num_scored": loss.num_scored,
    }
    picture = loss_curve(trainer.state.curve)
    files = {CARD: model_card(name, facts, picture is not None).encode()}
    if picture is not None:
        files[CURVE] = picture
    tensors = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}

    def write(directory: Path) -> None:
        write_artifact(directory, model.config, tensors, facts, files)

    return store.publish(name, write)


def _facts(trainer: Trainer, corpus: Corpus, command: str, ended: str, sample: Sample) -> dict[str, Any]:
    state, settings = trainer.state, trainer.settings
    training, held_out = corpus.split(settings.validation_fraction)
    best = next(point for point in state.curve if point.step == state.best_step)
    num_chars = state.step * settings.batch_size * settings.sequence_length
    return {
        "format": 1,
        "published_at": int(time.time()),
        "command": command,
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "num_chars": len(corpus.text),
            "num_training_chars": len(training),
            "num_validation_chars": len(held_out),
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

"""Publishes the best weights of a run: measures them, chooses the serving precision, and writes the model card."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from service import __version__
from service.errors import GruServeError, StoreError
from service.model.artifact import CARD, CHAT, Tensors, write_artifact
from service.model.config import ModelConfig
from service.model.encoded_text import EncodedText
from service.model.quantize import IntegerPrecision, Precision, choose_precision
from service.store.model_store import ModelStore, ModelVersion
from service.training.card import CURVE, loss_curve, model_card
from service.training.checkpoint import MAX_POINTS, Evaluation, PublishedRecord
from service.training.corpus import Corpus
from service.training.trainer import Trainer

_PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "int4")
_PROMPT_CHARS = 40  # of the sample on the card
_SAMPLE_CHARS = 600
_MAX_WORDS = 2000  # characters of a setting, a note or the command; longer ones are shortened


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

    def sample(
        self, config: ModelConfig, tensors: Tensors, precision: IntegerPrecision, prompt: str, num_chars: int
    ) -> Sample:
        """Generate a text from a prompt of known characters, which may be empty."""
        ...  # pragma: no cover


class Publication:
    """The way of one run to a version of the model `name`.

    `command` repeats the run, for the card. `serving` measures the weights and generates the sample.
    """

    def __init__(
        self, store: ModelStore, name: str, corpus: Corpus, trainer: Trainer, command: str, serving: Serving
    ) -> None:
        self._store, self._name, self._corpus, self._trainer = store, name, corpus, trainer
        self._command, self._serving = command, serving

    @property
    def num_measured(self) -> int:
        """The number of characters that `publish` measures."""
        return len(_PRECISIONS) * self._corpus.validation.num_scored

    def rehearse(self) -> None:
        """Do everything that publishing will do, with the present weights, and remove the version that it wrote.

        Only the measured text and the sample are shorter. So what publishing would refuse is refused before the first
        update: an impossible name, a store without write access or space, a setting of the server that is wrong, files
        that would be too large.

        Raises StoreError, InvalidArtifact, InvalidValue, InvalidSettings.
        """
        point = Evaluation(
            number=10**9, step=10**9, epoch=-1 / 3, learning_rate=1e-9 / 3, training_loss=1 / 3, validation_loss=1 / 3
        )
        ids = self._corpus.validation.ids[:2]
        text = EncodedText(ids, np.zeros(1, np.int64))
        tensors = {key: weight.detach().cpu().numpy() for key, weight in self._trainer.weights.items()}
        facts = self._facts(tensors, text, 8, point, [point] * (MAX_POINTS + 2), "w" * _MAX_WORDS, lambda _: None)
        self._store.check_writable(self._name, self._writer(tensors, facts, None))

    def existing(self) -> PublishedRecord | None:
        """Return the version that already has the best weights of the run; None if they are not published."""
        published = self._trainer.state.published
        if published is None or not self._trainer.state.is_published or published.ref.split("@")[0] != self._name:
            return None
        try:
            description = self._store.describe(self._store.resolve(published.ref))
        except GruServeError:
            return None  # deleted, or in another store
        return published if description.digest == published.digest else None

    def publish(
        self, ended: str, progress: Callable[[int], object] = lambda _: None
    ) -> tuple[ModelVersion, PublishedRecord]:
        """Publish the weights with the lowest validation loss so far as a new version. Return it.

        The held-out text is measured in every precision. The version's serving precision is the one with the fewest
        bits whose loss is almost that of float32.

        Args:
            ended: how the run ended, for the card.
            progress: a function that is called with the number of characters measured since its last call.

        Raises:
            StoreError: the run has had no evaluation yet, or the store can't write the version.
        """
        state = self._trainer.state
        if state.best is None:
            raise StoreError("there is nothing to publish: the run ended before its first evaluation")
        tensors = {key: tensor.numpy() for key, tensor in self._trainer.best_weights().items()}
        text = self._corpus.validation
        facts = self._facts(tensors, text, _SAMPLE_CHARS, state.best, state.curve, ended, progress)
        version = self._store.publish(self._name, self._writer(tensors, facts, loss_curve(state.curve)))
        digest = self._store.describe(version).digest
        return version, PublishedRecord(ref=version.ref, digest=digest, step=state.best.step)

    def _facts(
        self,
        tensors: Tensors,
        text: EncodedText,
        num_sampled: int,
        best: Evaluation,
        curve: Sequence[Evaluation],
        ended: str,
        progress: Callable[[int], object],
    ) -> dict[str, Any]:
        """Measure the weights and return what `training.json` holds."""
        trainer, config = self._trainer, self._trainer.model.config
        losses = {p: self._serving.loss(config, tensors, p, text, progress) for p in _PRECISIONS}
        precision = choose_precision(losses)
        # A line begins at the zero state, so a model of lines needs no prompt.
        prompt = "" if trainer.settings.lines else trainer.charset.decode(self._corpus.validation.ids[:_PROMPT_CHARS])
        sample = self._serving.sample(config, tensors, precision, prompt, num_sampled)
        return {
            "format": 1,
            "published_at": int(time.time()),
            "command": _shortened(self._command),
            "corpus": _corpus_facts(self._corpus),
            "vocab_size": config.vocab_size,
            "num_parameters": config.num_parameters,
            "settings": {name: _shortened(value) for name, value in trainer.settings.model_dump().items()},
            "initial": trainer.state.initial.model_dump() if trainer.state.initial else None,
            "serving_precision": precision,
            "losses": {
                "training_nats_per_char": best.training_loss,
                "validation_nats_per_char": losses["float32"],
                "validation_bits_per_char": losses["float32"] / math.log(2),
                "validation_num_scored": text.num_scored,
                "validation_nats_per_char_by_precision": losses,
            },
            "run": _run_facts(trainer, best, _shortened(ended)),
            "curve": [point.model_dump() for point in curve],
            "sample": asdict(sample),
            "versions": {"gru-serve": __version__, "torch": torch.__version__},
        }

    def _writer(self, tensors: Tensors, facts: Mapping[str, Any], picture: bytes | None) -> Callable[[Path], None]:
        files = {CARD: model_card(self._name, facts, picture is not None).encode()}
        if picture is not None:
            files[CURVE] = picture
        if self._trainer.state.chat is not None:
            files[CHAT] = self._trainer.state.chat.to_json().encode()
        return lambda directory: write_artifact(directory, self._trainer.model.config, tensors, facts, files)


def _corpus_facts(corpus: Corpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "num_chars": corpus.num_chars,
        "num_training_chars": corpus.num_training_chars,
        "num_validation_chars": corpus.num_validation_chars,
        "notes": _shortened("\n".join(corpus.notes)),
    }


def _run_facts(trainer: Trainer, best: Evaluation, ended: str) -> dict[str, Any]:
    state, settings = trainer.state, trainer.settings
    num_chars = state.step * settings.batch_size * settings.sequence_length
    return {
        "num_updates": state.step,
        "num_epochs": state.step / trainer.streams.windows_per_epoch,
        "best_update": best.step,
        "ended": ended,
        "seconds": round(state.seconds, 1),
        "chars_per_s": round(num_chars / state.seconds) if state.seconds else 0,
        "device": state.device,
        "changes": [change.model_dump() for change in state.changes],
    }


def _shortened(value: Any) -> Any:
    """Shorten a long text, such as a charset of thousands of characters, so that the files keep their limits."""
    if isinstance(value, str) and len(value) > _MAX_WORDS:
        return f"{value[:_MAX_WORDS]}... ({len(value):,} characters)"
    return value

"""A training run on disk: one safetensors file whose metadata is JSON. Whole or not there, and never executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from service.errors import InvalidCheckpoint
from service.store.staging import fsync
from service.training.hyperparameters import Hyperparameters


class Evaluation(BaseModel):
    """One point of the loss curve. Losses in nats a character; the training loss with dropout, since the last point."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    epoch: float
    learning_rate: float
    training_loss: float
    validation_loss: float


class RunState(BaseModel):
    """Everything about a run that isn't a tensor."""

    model_config = ConfigDict(extra="forbid")

    settings: Hyperparameters
    charset: str
    corpus_name: str
    corpus_sha256: str
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[Evaluation] = []
    best_step: int | None = None
    finished: bool = False

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far, infinity before the first evaluation."""
        return min((point.validation_loss for point in self.curve), default=float("inf"))


def save_checkpoint(path: Path, state: RunState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the checkpoint at `path` in one step: a crash leaves the old one or the new one.

    Raises InvalidCheckpoint if it can't be written.
    """
    aside = path.with_name(path.name + ".part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, aside, metadata={"run": state.model_dump_json()})
        fsync(aside)
        os.replace(aside, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't write the checkpoint {path}: {_brief(error)}") from error


def read_state(path: Path) -> RunState:
    """The run that a checkpoint holds, without its tensors. Raises InvalidCheckpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return RunState.model_validate(json.loads(metadata["run"]))
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"there is no checkpoint at {path}") from error
    except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise InvalidCheckpoint(f"{path} is not a checkpoint of this version: {_brief(error)}") from error


def read_tensors(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, which must have the names, shapes and dtypes of `like`."""
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(like):
                raise InvalidCheckpoint(f"{path} holds other tensors than this run: {sorted(names ^ set(like))[:4]}")
            for name, wanted in like.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(wanted.shape):
                    raise InvalidCheckpoint(f"{path}: tensor {name} has another shape than {tuple(wanted.shape)}")
                found[name] = file.get_tensor(name)
                if found[name].dtype != wanted.dtype:
                    raise InvalidCheckpoint(f"{path}: tensor {name} is not {wanted.dtype}")
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't read {path}: {_brief(error)}") from error
    return found


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

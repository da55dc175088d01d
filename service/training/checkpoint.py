"""The checkpoint of a training run: one safetensors file with the run's state as JSON metadata.

A checkpoint is replaced atomically. Unlike a pickle, a checkpoint that is read executes nothing.
"""

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
    """One point of the loss curve. Losses are in nats a character."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int  # updates done
    epoch: float  # epochs done
    learning_rate: float  # of the last update
    training_loss: float  # with dropout, mean over the updates since the previous evaluation
    validation_loss: float  # of the averaged weights, without dropout


class RunState(BaseModel):
    """Everything about a run that is not a tensor."""

    model_config = ConfigDict(extra="forbid")

    settings: Hyperparameters
    charset: str
    corpus_name: str
    corpus_sha256: str
    step: int = 0  # updates done
    seconds: float = 0.0  # time spent on updates and evaluations
    loss_sum: float = 0.0  # of the updates since the last evaluation
    loss_count: int = 0  # how many updates `loss_sum` covers
    curve: list[Evaluation] = []
    best_step: int | None = None  # of the evaluation with the lowest validation loss; None before the first evaluation
    finished: bool = False

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far; infinity before the first evaluation."""
        return min((point.validation_loss for point in self.curve), default=float("inf"))


def save_checkpoint(path: Path, state: RunState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the checkpoint at `path`, atomically: after a crash the file is either the old one or the new one.

    Raises InvalidCheckpoint if it can't be written.
    """
    temporary = path.with_name(path.name + ".part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, temporary, metadata={"run": state.model_dump_json()})
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't write the checkpoint {path}: {_brief(error)}") from error


def read_state(path: Path) -> RunState:
    """Read the state of a run without its tensors. Raises InvalidCheckpoint if `path` holds no intact checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return RunState.model_validate(json.loads(metadata["run"]))
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"there is no checkpoint at {path}") from error
    except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
        raise InvalidCheckpoint(f"{path} is damaged or not a checkpoint of this version: {_brief(error)}") from error


def read_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint.

    Raises InvalidCheckpoint if their names, shapes and dtypes are not those of `expected`, or the file is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                differences = sorted(names ^ set(expected))[:4]
                raise InvalidCheckpoint(
                    f"the tensors in {path} are not those of this run; they differ in {differences}"
                )
            for name, template in expected.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(template.shape):
                    raise InvalidCheckpoint(f"{path}: the shape of tensor {name} is not {tuple(template.shape)}")
                tensors[name] = file.get_tensor(name)
                if tensors[name].dtype != template.dtype:
                    raise InvalidCheckpoint(f"{path}: the dtype of tensor {name} is not {template.dtype}")
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't read {path}: {_brief(error)}") from error
    return tensors


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

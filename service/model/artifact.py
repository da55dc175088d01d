"""The files of one model version: `config.json`, `model.safetensors`, `training.json`, perhaps a chat template, a model
card, and their manifest.

Reading trusts none of them: lengths and SHA-256 sums are compared with the manifest, then names, dtypes and shapes with
the config, before a weight is copied anywhere. The formats are JSON and safetensors; neither can contain code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from service.errors import InvalidArtifact
from service.model.charset import Charset
from service.model.chat_template import MAX_CHAT_BYTES, ChatTemplate, parse_template
from service.model.config import ModelConfig
from service.model.manifest import MANIFEST, Manifest, describe_first_error
from service.model.quantize import IntegerPrecision

CONFIG, WEIGHTS, TRAINING, CARD = "config.json", "model.safetensors", "training.json", "README.md"
CHAT = "chat.json"  # a version may have none
_DECIDING = (CONFIG, WEIGHTS, TRAINING, CHAT)  # the other files are for people
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_TRAINING_BYTES = 1024 * 1024
_MAX_HEADER_BYTES = 64 * 1024
_MAX_OTHER_BYTES = 4 * 1024 * 1024

Tensors = dict[str, NDArray[np.float32]]


class Losses(BaseModel):
    """Losses that training measured. Only those that other code reads are declared; there may be more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    validation_nats_per_char: float | None = None


class TrainingFacts(BaseModel):
    """The content of `training.json`: how the model was made. It doesn't affect what the model computes.

    Only what other code reads is declared; a trainer may add any field.
    """

    model_config = ConfigDict(extra="allow")

    published_at: int | None = Field(None, ge=0, lt=2**53, description="seconds since 1970")
    losses: Losses = Losses()
    serving_precision: IntegerPrecision = "int8"  # what the trainer found sufficient, see choose_precision
    corpus: dict[str, str | int | float | None] = {}


@dataclass(frozen=True)
class Artifact:
    """The checked contents of a model version."""

    config: ModelConfig
    tensors: Tensors  # name -> float32 weights, with the shapes of `config.tensor_shapes()`
    training: TrainingFacts
    digest: str  # SHA-256 of config and weights: models with equal digests compute the same function
    warnings: tuple[str, ...] = ()  # what is wrong with files that decide nothing, such as the card
    chat: ChatTemplate | None = None  # how the messages of a chat are written; None if the version has no template

    @property
    def charset(self) -> Charset:
        """The characters that the model knows, and their ids."""
        return Charset(self.config.charset)


def write_artifact(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[np.float32]],
    training: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Write the files of a model version into an empty directory, the manifest last.

    Args:
        directory: an existing, empty directory.
        config: the model's sizes and charset.
        tensors: float32 weights, with the names and shapes of `config.tensor_shapes()`.
        training: the content of `training.json`, see TrainingFacts.
        extra_files: name -> content of further files, such as the model card `README.md` or a chat template.
    """
    (directory / CONFIG).write_text(_json(config.model_dump()), encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    (directory / WEIGHTS).write_bytes(save_safetensors(contiguous))
    (directory / TRAINING).write_text(_json(dict(training)), encoding="utf-8")
    for name, data in extra_files.items():
        (directory / name).write_bytes(data)
    (directory / MANIFEST).write_text(Manifest.of(directory).to_json(), encoding="utf-8")


def read_artifact(directory: Path) -> Artifact:
    """Read a model version and check all of its files.

    Raises InvalidArtifact, which says what is wrong and where. A model card or picture that was edited or removed is
    only a warning, because it decides nothing.
    """
    manifest = Manifest.read(directory, needed=_DECIDING)
    config = _read_config(directory, manifest)
    shapes = config.tensor_shapes()
    path = directory / WEIGHTS
    max_bytes = 4 * config.num_parameters + _MAX_HEADER_BYTES
    data = manifest.read_file(directory, WEIGHTS, max_bytes, lambda file: _check_header(path, file, shapes))
    warnings = []
    for name in sorted(set(manifest.files) - set(_DECIDING)):
        try:
            manifest.read_file(directory, name, _MAX_OTHER_BYTES)
        except InvalidArtifact as error:
            warnings.append(f"{error.message}; it is ignored, because {name} decides nothing")
    try:
        tensors: Tensors = load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise InvalidArtifact(f"{path} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise InvalidArtifact(f"{path}: {name} contains a number that is not finite")
    training, chat = _read_training(directory, manifest), _read_chat(directory, manifest, config)
    return Artifact(config, tensors, training, _digest(manifest), tuple(warnings), chat)


def read_description(directory: Path) -> tuple[ModelConfig, TrainingFacts, str, ChatTemplate | None]:
    """Return config, training facts, digest and chat template of a version without reading its weights.

    Raises InvalidArtifact.
    """
    manifest = Manifest.read(directory, needed=_DECIDING)
    config = _read_config(directory, manifest)
    chat = _read_chat(directory, manifest, config)
    return config, _read_training(directory, manifest), _digest(manifest), chat


def copy_artifact(source: Path, directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a checked version into an empty directory, with these added or replaced, the manifest last.

    A file that was edited or removed, and decides nothing, is left out. Raises InvalidArtifact.
    """
    manifest = Manifest.read(source, needed=_DECIDING)
    for name in manifest.files:
        if name in files:
            continue
        try:
            data = manifest.read_file(source, name, manifest.files[name].num_bytes)
        except InvalidArtifact:
            if name in _DECIDING:
                raise
        else:
            (directory / name).write_bytes(data)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    (directory / MANIFEST).write_text(Manifest.of(directory).to_json(), encoding="utf-8")


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of the sums of config and weights, because they alone determine what the model computes."""
    sums = [manifest.files[name].sha256 if name in manifest.files else "" for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _read_config(directory: Path, manifest: Manifest) -> ModelConfig:
    data = manifest.read_file(directory, CONFIG, _MAX_CONFIG_BYTES)
    try:
        return ModelConfig.model_validate_json(data)
    except ValidationError as error:
        raise InvalidArtifact(f"{directory / CONFIG}: {describe_first_error(error)}") from error


def _read_training(directory: Path, manifest: Manifest) -> TrainingFacts:
    data = manifest.read_file(directory, TRAINING, _MAX_TRAINING_BYTES)
    try:
        return TrainingFacts.model_validate_json(data)
    except ValidationError as error:
        raise InvalidArtifact(f"{directory / TRAINING}: {describe_first_error(error)}") from error


def _read_chat(directory: Path, manifest: Manifest, config: ModelConfig) -> ChatTemplate | None:
    if CHAT not in manifest.files:
        return None
    template = parse_template(manifest.read_file(directory, CHAT, MAX_CHAT_BYTES), directory / CHAT)
    if unknown := template.unknown_to(Charset(config.charset)):
        raise InvalidArtifact(f"{directory / CHAT}: the model doesn't know {unknown}, which the template writes")
    return template


def read_safetensors_header(file: BinaryIO, num_bytes: int, max_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and its length in bytes. Nothing in it is checked.

    Format: 8 bytes with the header's length (little-endian), the header as JSON {name: {dtype, shape, data_offsets}},
    the data.

    Args:
        file: at its beginning.
        num_bytes: the length of the file.
        max_bytes: of the header.

    Raises ValueError with what is wrong, as the end of a sentence.
    """
    length = int.from_bytes(file.read(8), "little")
    if num_bytes < 8 or length > min(max_bytes, num_bytes - 8):
        raise ValueError(f"its header would be {length:,} bytes long")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, length


def _check_header(path: Path, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a safetensors header with the shapes of the config, before any weight is read."""
    num_bytes = os.fstat(file.fileno()).st_size
    try:
        header, length = read_safetensors_header(file, num_bytes, _MAX_HEADER_BYTES)
    except ValueError as error:
        raise InvalidArtifact(f"{path} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    if missing := sorted(set(shapes) - set(header)):
        raise InvalidArtifact(f"{path}: tensor {missing[0]} is missing")
    if foreign := sorted(set(header) - set(shapes)):
        raise InvalidArtifact(f"{path}: tensor {foreign[0][:80]} is not part of this model")
    for name, shape in shapes.items():
        entry = header[name]
        if not isinstance(entry, dict):
            raise InvalidArtifact(f"{path}: the header's entry for {name} is not an object")
        if entry.get("dtype") != "F32":
            raise InvalidArtifact(
                f"{path}: {name} has the dtype {str(entry.get('dtype'))[:20]}, the config requires F32"
            )
        if entry.get("shape") != list(shape):
            found = str(entry.get("shape"))[:60]
            raise InvalidArtifact(f"{path}: {name} has the shape {found}, the config requires {list(shape)}")
    expected = 4 * sum(math.prod(shape) for shape in shapes.values())
    if num_bytes - 8 - length != expected:
        raise InvalidArtifact(f"{path}: {num_bytes - 8 - length} bytes of weights, the config requires {expected}")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n"

"""Keras files: `.weights.h5`, whole models in HDF5 (`.h5`), and `.keras`, of Keras 2 and 3."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.errors import InvalidModelFile
from service.importing.archive import Archive
from service.importing.foreign import WEIGHTS_ONLY, ForeignModel, Tokens, max_json_bytes, shown
from service.importing.hdf5 import HDF5, read_hdf5
from service.importing.keras_roles import check_layer_names, find_keras_roles
from service.importing.vocabulary import tokens_of

CONFIG, WEIGHTS, METADATA = "config.json", "model.weights.h5", "metadata.json"
CHARSET = "charset.json"  # a member that `gru-serve export` adds; Keras ignores it


def read_keras_hdf5(path: Path, order: Sequence[str]) -> ForeignModel:
    """Read `.weights.h5` or a whole model in HDF5. Raises InvalidModelFile, UnsupportedModel, MissingLibrary."""
    content = read_hdf5(path, path.name)
    root = content.attributes.get("", {})
    config = _json(root["model_config"], path) if "model_config" in root else None
    kind = "Keras model (HDF5)" if config is not None else "Keras weights (HDF5)"
    return _model_of(content, kind, root.get("keras_version"), config, order, None)


def read_keras_archive(path: Path, order: Sequence[str]) -> ForeignModel:
    """Read a `.keras` file. Raises InvalidModelFile, UnsupportedModel, MissingLibrary."""
    limit = max_json_bytes(path.stat().st_size)
    with Archive(path, path.name) as archive, tempfile.NamedTemporaryFile(suffix=".h5") as file:
        config = _json(archive.read(CONFIG, limit), path)
        metadata = _json(archive.read(METADATA, limit), path) if METADATA in archive.names() else {}
        tokens = None
        if CHARSET in archive.names():
            tokens = tokens_of(_json(archive.read(CHARSET, limit), path))
        archive.copy(WEIGHTS, file)
        file.flush()
        content = read_hdf5(Path(file.name), path.name)
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return _model_of(content, "Keras model (.keras)", version, config, order, tokens)


def _model_of(
    content: HDF5, kind: str, version: object, config: Any, order: Sequence[str], tokens: Tokens | None
) -> ForeignModel:
    if config is None:
        check_layer_names(content.groups)
    library = f"keras {version[:20]}" if isinstance(version, str) else "keras"
    # A whole model in HDF5 has its weights in this group, and may have those of the optimizer beside it.
    whole = "model_weights/"
    arrays = {path.removeprefix(whole).replace("\\", "/"): array for path, array in content.arrays.items()}
    names = {
        path.removeprefix(whole).replace("\\", "/"): values["name"]
        for path, values in content.attributes.items()
        if "name" in values
    }
    model = find_keras_roles(arrays, kind, library, config=config, names=names, order=order, tokens=tokens)
    return model if config is not None else replace(model, notes=(*model.notes, WEIGHTS_ONLY))


def _json(data: str | bytes, path: Path) -> Any:
    if len(data) > max_json_bytes(path.stat().st_size):
        raise InvalidModelFile(f"{shown(path.name)}: its config is longer than that of any model")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidModelFile(f"{shown(path.name)}: its config is not JSON: the file is damaged") from error

"""Finds out what a file is, by its first bytes, and calls its reader."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import GruServeError, InvalidModelFile
from service.importing.archive import Archive
from service.importing.foreign import ForeignModel, shown
from service.importing.keras_files import CONFIG, WEIGHTS, read_keras_archive, read_keras_hdf5
from service.importing.onnx_files import external_files, read_onnx
from service.importing.tensor_bundle import INDEX
from service.importing.tensorflow_files import (
    GRAPH,
    VARIABLES,
    checkpoint_files,
    find_checkpoint,
    read_checkpoint,
    read_saved_model,
)
from service.importing.torch_files import read_safetensors, read_torch_archive, read_torch_legacy

_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
_PICKLE = b"\x80"
_MAX_BYTES = 4 << 30
_KNOWN = (
    "Known are .weights.h5, .h5 and .keras of Keras, TensorFlow checkpoints and SavedModels, .pt and .pth of PyTorch, "
    ".safetensors and .onnx"
)


@dataclass(frozen=True)
class Source:
    """The files of a foreign model, for its card."""

    name: str  # of the file or folder, in a form that is safe everywhere
    num_bytes: int
    # In hexadecimal. Of one file: of its bytes. Of several: of their sums in the order of their names, a line each.
    sha256: str


def read_foreign(path: Path, order: Sequence[str] = ()) -> tuple[ForeignModel, Source]:
    """Read a model that another library has written, and the sum of its files.

    Args:
        path: of a file, of a TensorFlow checkpoint without `.index`, or of a folder with a SavedModel.
        order: names of the GRU layers in their order, where the file doesn't say it.

    Raises:
        InvalidModelFile: it can't be read, is damaged or hostile, or is of an unknown kind.
        UnsupportedModel: it is another function than this service's models.
        MissingLibrary: h5py is needed and not installed.
    """
    try:
        files = _files_of(path)
        model = _read(path, files, order)
        return model, _source(path, files)
    except OSError as error:
        raise InvalidModelFile(f"can't read {shown(str(path))}: {error.strerror or error}") from error
    except GruServeError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, RecursionError,
            ArithmeticError, MemoryError, UnicodeError, zlib.error) as error:  # fmt: skip
        # The readers check what they use. What they missed is a damaged file too, and its user needs no traceback.
        raise InvalidModelFile(f"{shown(path.name)} is damaged ({type(error).__name__})") from error


def _files_of(path: Path) -> list[Path]:
    """Return the files that belong to a model, which exist and are plain files. Raises InvalidModelFile, OSError."""
    if (path / GRAPH).is_file():
        files = [path / GRAPH, *checkpoint_files(path / VARIABLES)]
    elif (prefix := find_checkpoint(path)) is not None:
        files = checkpoint_files(prefix)
    else:
        files = [path]
        if path.is_file() and _is_onnx(path):
            files += external_files(path)
    total = 0
    for file in files:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelFile(f"{shown(str(file))} is not a file, nor a folder with a model. {_KNOWN}")
        if not status.st_size:
            raise InvalidModelFile(f"{shown(file.name)} is empty")
        total += status.st_size
    if total > _MAX_BYTES:
        raise InvalidModelFile(f"{shown(path.name)} has {total:,} bytes; at most {_MAX_BYTES:,} are read")
    return files


def _read(path: Path, files: list[Path], order: Sequence[str]) -> ForeignModel:
    first = files[0]
    if first.name == GRAPH:
        return read_saved_model(first.parent, order)
    if first.name.endswith(INDEX) and len(files) > 1:
        return read_checkpoint(first.with_name(first.name.removesuffix(INDEX)), order)
    with first.open("rb") as file:
        head = file.read(16)
    if head.startswith(_HDF5):
        return read_keras_hdf5(path, order)
    if head.startswith(_ZIP):
        with Archive(path, path.name) as archive:
            names = archive.names()
        if CONFIG in names and WEIGHTS in names:
            return read_keras_archive(path, order)
        return read_torch_archive(path, order)
    if head[:1] == _PICKLE and len(head) > 1 and head[1] <= 5:
        return read_torch_legacy(path, order)
    if head[8:9] == b"{":
        return read_safetensors(path, order)
    if _is_onnx(path):
        return read_onnx(path)
    raise InvalidModelFile(f"{shown(path.name)} is of no known kind. {_KNOWN}")


def _is_onnx(path: Path) -> bool:
    """Return whether a file begins as ONNX files do, with the version of the format, or is called one."""
    with path.open("rb") as file:
        head = file.read(3)
    return head[:1] == b"\x08" and 1 <= head[1] <= 64 and head[2:] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42")


def _source(path: Path, files: list[Path]) -> Source:
    sums = []
    for file in files:
        with file.open("rb") as stream:
            sums.append(hashlib.file_digest(stream, "sha256").hexdigest())
    sha256 = sums[0] if len(sums) == 1 else hashlib.sha256("".join(f"{one}\n" for one in sums).encode()).hexdigest()
    name = shown(path.name or path.resolve().name)
    return Source(name, sum(os.path.getsize(file) for file in files), sha256)

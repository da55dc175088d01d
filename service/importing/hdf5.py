"""HDF5 files: attributes and arrays of floating-point numbers, read in a process of its own (`hdf5_process`)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

import service
from service.errors import InvalidModelFile, MissingLibrary
from service.importing import hdf5_process
from service.importing.foreign import Array, shown

_WAIT_S = 120  # until a process that doesn't use its time is ended
_DTYPES = ("<f2", "<f4", "<f8")
_SIGNALS = {getattr(signal, "SIGXCPU", None): "reading it takes too long", signal.SIGKILL: "reading it takes too long"}


@dataclass(frozen=True)
class HDF5:
    """What a model can consist of in an HDF5 file."""

    attributes: dict[str, dict[str, str]]  # path of a group, empty for the root -> name -> text
    arrays: dict[str, Array]  # path -> floating-point numbers
    groups: tuple[str, ...] = ()  # names of the layers of a container of Keras 3, also of those without weights


def read_hdf5(path: Path, name: str) -> HDF5:
    """Read a file. `name` is what messages call it.

    Raises InvalidModelFile if it is damaged, links to other files, or declares more than it has; MissingLibrary.
    """
    # A crash of the library may print something: nobody needs to see that.
    environment = os.environ | {
        "PYTHONPATH": str(Path(service.__file__).parent.parent),
        "HDF5_USE_FILE_LOCKING": "FALSE",
    }
    for variable in ("HDF5_PLUGIN_PATH", "HDF5_DRIVER", "HDF5_VOL_CONNECTOR"):
        environment.pop(variable, None)
    environment |= {"HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(  # noqa: S603 - this Python runs a module of this package
        [sys.executable, "-P", "-m", hdf5_process.__name__, os.fspath(path.absolute())],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    stream = cast(IO[bytes], process.stdout)
    try:
        found, problem = _receive(stream, path.stat().st_size)
        stream.close()
        code = process.wait(_WAIT_S)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        stream.close()
    if problem:
        raise InvalidModelFile(f"{name} can't be read: {problem}")
    if code or found is None:
        what = _SIGNALS.get(-code, "it is damaged: the HDF5 library ended without an answer")
        raise InvalidModelFile(f"{name} can't be read: {what}")
    return found


def _receive(stream: IO[bytes], num_bytes: int) -> tuple[HDF5 | None, str]:
    """Return the contents, or what is wrong. Neither if the answer is incomplete. Raises MissingLibrary."""
    line = stream.readline(hdf5_process.MAX_HEADER_BYTES + 1)
    try:
        header: dict[str, Any] = json.loads(line)
    except ValueError:
        return None, ""
    if "missing" in header:
        raise MissingLibrary("this file needs h5py, which is not installed: run pip install h5py")
    if "error" in header:
        return None, shown(str(header["error"]))
    arrays: dict[str, Array] = {}
    for path, dtype, shape in header["datasets"]:
        size = math.prod(shape) * int(dtype[2:])
        if dtype not in _DTYPES or size > num_bytes:
            return None, f"{shown(path)} is larger than the file"
        array = np.empty(shape, dtype)
        if size and stream.readinto(array.data.cast("B")) != size:  # type: ignore[attr-defined]
            return None, ""
        arrays[str(path)] = array
    return HDF5(header["attributes"], arrays, tuple(map(str, header["groups"]))), ""

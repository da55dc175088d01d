"""Reads an HDF5 file in a process of its own, with limits of the operating system: `python -m ... PATH`.

The HDF5 library is written in C, and a hostile file can make it crash, loop or allocate without end. So it runs where
that ends nothing else: with a limit of memory in proportion to the file, and a limit of time.

Standard output: one line of JSON, {"error"} or {"attributes", "groups", "datasets": [[path, dtype, shape], ...]}, and
then the bytes of these datasets, one after the other, little-endian.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

MEMORY_FACTOR = 2  # bytes of memory for each byte of the file
MEMORY_BYTES = 48 << 20  # and these in addition: the library's own caches
CPU_S = 20  # seconds, and CPU_PER_GB for each GB of the file
CPU_PER_GB = 60
MAX_OBJECTS = 4096
MAX_HEADER_BYTES = 1 << 20
_MAX_DEPTH = 16
_MAX_ATTRIBUTE_BYTES = 512 << 10
_ATTRIBUTES = ("model_config", "keras_version", "name")
_SKIPPED = ("optimizer", "optimizer_weights", "training_config", "metrics")  # at the top: not part of the model


class Refused(Exception):
    """The file is damaged, or has what no model needs."""


def limit(num_bytes: int) -> None:
    """Limit memory and time of this process. Called after all libraries are loaded."""
    try:
        import resource
    except ImportError:
        return  # no such limits on this system
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        allowed = used + MEMORY_FACTOR * num_bytes + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    except OSError:
        pass  # only Linux says how much is used
    seconds = CPU_S + CPU_PER_GB * num_bytes // 10**9
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Reader:
    """Collects the attributes and datasets of a file that a model can consist of."""

    def __init__(self, h5py: Any, num_bytes: int) -> None:
        self._h5py = h5py
        self._bytes_left = num_bytes
        self._num_objects = 0
        self.attributes: dict[str, dict[str, str]] = {}  # path -> name -> value
        self.datasets: list[tuple[str, Any]] = []
        self.groups: list[str] = []  # of layers: the ones in the group `layers`

    def walk(self, group: Any, path: str = "", depth: int = 0) -> None:
        """Collect what is in a group. Raises Refused."""
        if depth > _MAX_DEPTH:
            raise Refused("its groups are nested deeper than in any model, or contain themselves")
        self._read_attributes(group, path)
        for name in group:
            self._num_objects += 1
            if self._num_objects > MAX_OBJECTS:
                raise Refused(f"it has more than {MAX_OBJECTS} objects")
            where = f"{path}/{name}" if path else name
            if depth == 0 and name in _SKIPPED:
                continue
            link = group.get(name, getlink=True)
            if not isinstance(link, self._h5py.HardLink):
                raise Refused(f"{where} is a link to another place or file, which is never followed")
            found = group[name]
            if isinstance(found, self._h5py.Group):
                if path == "layers":
                    self.groups.append(name)
                self.walk(found, where, depth + 1)
            elif isinstance(found, self._h5py.Dataset):
                self._add(where, found)

    def _add(self, path: str, dataset: Any) -> None:
        dtype, shape = dataset.dtype, dataset.shape
        if dtype.kind != "f" or shape is None or len(shape) == 0:
            return  # counters, seeds
        if dtype.itemsize not in (2, 4, 8):
            raise Refused(f"{path} has numbers of {dtype.itemsize} bytes")
        if dataset.is_virtual or dataset.external:
            raise Refused(f"the numbers of {path} are in another file, which is never opened")
        if dataset.chunks is not None:
            raise Refused(
                f"{path} is stored in chunks or compressed, which Keras doesn't do: save the model with Keras"
            )
        size = dtype.itemsize
        for length in shape:
            size *= length
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise Refused(f"{path} would have {size:,} bytes, more than the file has left")
        self.datasets.append((path, dataset))

    def _read_attributes(self, group: Any, path: str) -> None:
        for name in _ATTRIBUTES:
            if name not in group.attrs:
                continue
            attribute = self._h5py.h5a.open(group.id, name.encode())
            if attribute.get_storage_size() > _MAX_ATTRIBUTE_BYTES or attribute.shape not in ((), (1,)):
                continue
            value = group.attrs[name]
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            if isinstance(value, str) and len(value) <= _MAX_ATTRIBUTE_BYTES:
                self.attributes.setdefault(path, {})[name] = value


def write(reader: Reader, out: BinaryIO) -> None:
    """Write what was collected. Raises Refused, OSError."""
    import numpy as np

    table = [[path, dataset.dtype.newbyteorder("<").str, list(dataset.shape)] for path, dataset in reader.datasets]
    header = json.dumps({"attributes": reader.attributes, "groups": reader.groups, "datasets": table}).encode(
        "utf-8", "replace"
    )
    if len(header) > MAX_HEADER_BYTES:
        raise Refused("its names and attributes are longer than in any model")
    out.write(header + b"\n")
    for _, dataset in reader.datasets:
        out.write(np.ascontiguousarray(dataset[()], dataset.dtype.newbyteorder("<")).data.cast("B"))


def main(path: str) -> None:
    """Read a file and write its contents to standard output; an error as one line of JSON."""
    out = sys.stdout.buffer
    try:
        import h5py
    except ImportError:
        out.write(b'{"missing": "h5py"}\n')
        return
    num_bytes = os.path.getsize(path)
    limit(num_bytes)
    try:
        with h5py.File(path, "r") as file:
            reader = Reader(h5py, num_bytes)
            reader.walk(file)
            write(reader, out)
    except Refused as error:
        out.write(json.dumps({"error": str(error)}).encode("utf-8", "replace") + b"\n")
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes the library raise, the file is damaged
        out.write(json.dumps({"error": f"it is damaged ({type(error).__name__})"}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""TensorFlow's checkpoint format: an index of names (`.index`) and the numbers (`.data-00000-of-00001`, ...).

The index is a table as LevelDB writes it (tensorflow/core/lib/io/table_format.txt): blocks of keys and values, each key
without the prefix that it shares with the one before; a footer points to the block that lists the others. A value is
a BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto): dtype, shape, shard, offset, size and checksum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import InvalidModelFile
from service.importing.crc32c import masked_crc32c
from service.importing.foreign import BFLOAT16, Array, shown
from service.importing.protobuf import Message, read_varint

INDEX = ".index"
_OBJECTS, _MAX_GRAPH_BYTES = "_CHECKPOINTABLE_OBJECT_GRAPH", 1 << 20
_FOOTER_BYTES, _TABLE_MAGIC = 48, 0xDB4775248B80FB57
_MAX_INDEX_BYTES = 4 << 20
_MAX_ENTRIES = 2048
_MAX_KEY_BYTES = 512
_MAX_BLOCKS = 1024
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 19: np.dtype("<f2"), 14: BFLOAT16}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int  # masked CRC32C


def data_files(prefix: Path) -> list[Path]:
    """Return the files of the numbers, in order. The index says how many they are. Raises InvalidModelFile, OSError."""
    num_shards = _read_index(prefix)[0]
    return [prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{num_shards:05}") for shard in range(num_shards)]


def read_bundle(prefix: Path, unwanted: Callable[[list[str]], set[str]]) -> dict[str, Array]:
    """Return name -> floating-point array of a checkpoint.

    Args:
        prefix: the path without `.index`.
        unwanted: returns those of the names of all tensors that are left out, such as the variables of an optimizer.

    Raises InvalidModelFile if it is damaged or declares more than it has; OSError.
    """
    name = shown(prefix.name)
    num_shards, entries = _read_index(prefix)
    paths = [prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{num_shards:05}") for shard in range(num_shards)]
    sizes = [path.stat().st_size for path in paths]
    found: dict[str, Array] = {}
    left = sum(sizes)
    left_out = unwanted([key for key, _ in entries])
    for key, entry in entries:
        if entry.dtype not in _DTYPES or key in left_out or not entry.shape:
            continue
        left -= entry.size
        if entry.size != math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise InvalidModelFile(f"{name}: {shown(key)} has the shape {list(entry.shape)} and {entry.size:,} bytes")
        if entry.shard >= num_shards or entry.offset + entry.size > sizes[entry.shard] or left < 0:
            raise InvalidModelFile(f"{name}: {shown(key)} would be beyond the end of {shown(paths[0].name)}")
        with paths[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size or masked_crc32c(data) != entry.checksum:
            raise InvalidModelFile(f"{name}: the checksum of {shown(key)} differs: the file is damaged")
        found[key] = np.frombuffer(data, _DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def read_object_graph(prefix: Path) -> bytes:
    """Return what a checkpoint says about its objects, a message TrackableObjectGraph; nothing if it has none.

    Raises InvalidModelFile, OSError.
    """
    num_shards, entries = _read_index(prefix)
    for key, entry in entries:
        if key != _OBJECTS or entry.shard >= num_shards:
            continue
        with prefix.with_name(f"{prefix.name}.data-{entry.shard:05}-of-{num_shards:05}").open("rb") as file:
            file.seek(entry.offset)
            return file.read(min(entry.size, _MAX_GRAPH_BYTES))
    return b""


def _read_index(prefix: Path) -> tuple[int, list[tuple[str, _Entry]]]:
    """Return the number of data files, and the entries by name. Raises InvalidModelFile, OSError."""
    path = prefix.with_name(prefix.name + INDEX)
    name = shown(path.name)
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise InvalidModelFile(f"{name} is larger than the index of any model")
    data = memoryview(path.read_bytes())
    if len(data) < _FOOTER_BYTES or int.from_bytes(data[-8:], "little") != _TABLE_MAGIC:
        raise InvalidModelFile(f"{name} is not the index of a TensorFlow checkpoint, or is incomplete")
    footer = data[-_FOOTER_BYTES:]
    position = 0
    numbers = []
    for _ in range(4):  # offset and size of the block of other blocks' positions come last
        number, position = read_varint(footer, position)
        numbers.append(number)
    entries: list[tuple[str, _Entry]] = []
    num_shards = 0
    for count, (_, handle) in enumerate(_block(data, numbers[2], numbers[3], name)):
        if count > _MAX_BLOCKS:
            raise InvalidModelFile(f"{name} has more blocks than the index of any model")
        offset, position = read_varint(handle, 0)
        size, _ = read_varint(handle, position)
        for key, value in _block(data, offset, size, name):
            if not key:
                header = Message(value)
                num_shards = header.integer(1)
                if header.integer(2) != 0:
                    raise InvalidModelFile(f"{name} was written on a big-endian machine, which isn't supported")
                continue
            if len(entries) >= _MAX_ENTRIES:
                raise InvalidModelFile(f"{name} has more than {_MAX_ENTRIES} tensors")
            entries.append((key.decode("utf-8", "replace"), _entry(Message(value))))
    if not 1 <= num_shards <= 1024:
        raise InvalidModelFile(f"{name} names no data files: it is damaged")
    return num_shards, entries


def _entry(message: Message) -> _Entry:
    shape = tuple(dim.integer(1) for dim, _ in zip(message.message(2).messages(2), range(9), strict=False))
    numbers = (message.integer(3), message.integer(4), message.integer(5))
    if any(number < 0 for number in (*shape, *numbers)):
        raise InvalidModelFile("a tensor of the checkpoint has a negative size: the index is damaged")
    return _Entry(message.integer(1), shape, *numbers, checksum=message.integer(6))


def _block(data: memoryview, offset: int, size: int, name: str) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the keys and values of a block. Raises InvalidModelFile."""
    if offset + size + 5 > len(data) - _FOOTER_BYTES or size < 4:
        raise InvalidModelFile(f"{name} is damaged: a block is beyond its end")
    if data[offset + size] != 0:
        raise InvalidModelFile(f"{name} is compressed, which TensorFlow doesn't do to an index")
    checksum = int.from_bytes(data[offset + size + 1 : offset + size + 5], "little")
    if masked_crc32c(data[offset : offset + size + 1]) != checksum:
        raise InvalidModelFile(f"{name} is damaged: the checksum of a block differs")
    block = data[offset : offset + size]
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # restart positions, which only a search needs
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position)
        added, position = read_varint(block, position)
        length, position = read_varint(block, position)
        if shared > len(key) or position + added + length > end or shared + added > _MAX_KEY_BYTES:
            raise InvalidModelFile(f"{name} is damaged: a name in it is incomplete, or longer than in any model")
        key = key[:shared] + bytes(block[position : position + added])
        position += added
        yield key, block[position : position + length]
        position += length

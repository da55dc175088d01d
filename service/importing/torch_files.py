"""PyTorch files: state dicts, checkpoints, whole modules, in zip archives or the format before 1.6; and safetensors."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.archive import Archive
from service.importing.foreign import BFLOAT16, NEEDED, Array, ForeignModel, Tokens, max_json_bytes, shown
from service.importing.restricted_pickle import (
    MAX_PICKLE_BYTES,
    Inert,
    Storage,
    Tensor,
    read_pickle,
    texts_of_numpy,
    values_of,
)
from service.importing.torch_roles import Found, find_torch_roles, is_model
from service.importing.vocabulary import is_vocabulary_name, tokens_in_file, tokens_of_metadata
from service.model.artifact import read_safetensors_header

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
_ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "float16": np.dtype("<f2"), "bfloat16": BFLOAT16,
}  # fmt: skip
_SIZES = {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "": 1} | _ITEMSIZE
# Attributes of a user's own module that say that it computes something else.
_CHANGES = re.compile(r"_?(temperature|temp|tau|(\w+_)?scale|scale_\w+|(use_)?(residual|skip)s?(_connections?)?)", re.I)
_MAX_DEPTH = 6
_MAX_VISITED = 20_000
_SAFETENSORS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}


def read_torch_archive(path: Path, order: Sequence[str]) -> ForeignModel:
    """Read what torch.save has written since PyTorch 1.6. Raises InvalidModelFile, UnsupportedModel."""
    with Archive(path, path.name) as archive:
        names = archive.names()
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise UnsupportedModel(
                f"{shown(path.name)} is a TorchScript program: save model.state_dict() with "
                "torch.save, or export to ONNX"
            )
        if len(pickles) != 1:
            raise InvalidModelFile(f"{shown(path.name)} is a zip archive of no known kind")
        prefix = pickles[0].removesuffix("data.pkl")
        order_name = f"{prefix}byteorder"
        big = order_name in names and archive.read(order_name, 16) == b"big"

        def read(storage: Storage, itemsize: int) -> bytes:
            member = f"{prefix}data/{storage.key}"
            if member not in names:
                raise InvalidModelFile(f"{shown(path.name)} lacks the numbers {shown(member)}")
            size = storage.num_elements * itemsize
            if archive.size(member) != size:
                raise InvalidModelFile(
                    f"{shown(path.name)}: {shown(member)} has {archive.size(member):,} bytes, and {size:,} are declared"
                )
            return archive.read(member, size)

        data = archive.read(pickles[0], MAX_PICKLE_BYTES)
        num_bytes = path.stat().st_size
        value, _ = read_pickle(memoryview(data), 0, shown(path.name), num_bytes)
        return _model_of(value, _Loader(read, big, num_bytes), order)


def read_torch_legacy(path: Path, order: Sequence[str]) -> ForeignModel:
    """Read what torch.save wrote before PyTorch 1.6: pickles, then numbers.

    Raises InvalidModelFile, UnsupportedModel.
    """
    name = shown(path.name)
    data = memoryview(path.read_bytes())
    magic, position = read_pickle(data, 0, name, len(data))
    if magic != MAGIC:
        raise InvalidModelFile(
            f"{name} is a pickle that torch.save has not written: save model.state_dict() with torch.save"
        )
    _, position = read_pickle(data, position, name, len(data))  # version of the protocol
    system, position = read_pickle(data, position, name, len(data))
    value, position = read_pickle(data, position, name, len(data))
    keys, position = read_pickle(data, position, name, len(data))
    if not isinstance(keys, list) or len(keys) > 4096:
        raise InvalidModelFile(f"{name} is damaged: it doesn't list its numbers")
    big = isinstance(system, dict) and system.get("little_endian") is False
    storages = _declared(value)
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, keys):
        storage = storages.get(key)
        if storage is None or position + 8 > len(data):
            raise InvalidModelFile(f"{name} is damaged: its numbers are incomplete")
        count = int.from_bytes(data[position : position + 8], "big" if big else "little")
        size = count * _SIZES[storage.dtype]
        position += 8
        if count != storage.num_elements or position + size > len(data):
            raise InvalidModelFile(f"{name} is damaged: its numbers are incomplete")
        places[key] = position, size
        position += size

    def read(storage: Storage, _: int) -> memoryview:
        start, size = places[storage.key]
        return data[start : start + size]

    return _model_of(value, _Loader(read, big, len(data)), order)


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # position in the file


def read_safetensors(path: Path, order: Sequence[str]) -> ForeignModel:
    """Read a safetensors file. Raises InvalidModelFile, UnsupportedModel."""
    name, num_bytes = shown(path.name), path.stat().st_size
    with path.open("rb") as file:
        try:
            header, length = read_safetensors_header(file, num_bytes, max_json_bytes(num_bytes))
        except ValueError as error:
            raise InvalidModelFile(f"{name} is no safetensors file: {error}") from error
        metadata = header.pop("__metadata__", None)
        entries: dict[str, _Entry] = {}
        total = 0
        for key, entry in header.items():
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if not all(type(one) is int and one >= 0 for one in (*shape, begin, end)):
                raise InvalidModelFile(f"{name}: the shape of {shown(key)} is none")
            total += end - begin
            if end < begin or total > num_bytes - 8 - length or end > num_bytes - 8 - length:
                raise InvalidModelFile(f"{name}: {shown(key)} would be beyond the end of the file")
            dtype = _SAFETENSORS.get(entry["dtype"])
            if dtype is None:
                continue
            if math.prod(shape) * dtype.itemsize != end - begin:
                raise InvalidModelFile(f"{name}: {shown(key)} has the shape {shape} and {end - begin:,} bytes")
            entries[key] = _Entry(entry["dtype"], tuple(shape), 8 + length + begin)

        def load(entry: _Entry) -> Array:
            file.seek(entry.begin)
            return np.fromfile(file, _SAFETENSORS[entry.dtype], math.prod(entry.shape)).reshape(entry.shape)

        if not is_model(list(entries)):
            raise UnsupportedModel(f"{name} has no recurrent layer as PyTorch names them: it holds no GRU")
        found = find_torch_roles(entries, load, order, {})
    texts = metadata if isinstance(metadata, dict) else {}
    tokens = tokens_of_metadata(texts, len(found.dense))
    return found.model("safetensors", "torch", tokens)


class _Loader:
    """Reads the numbers of tensors."""

    def __init__(self, read: Callable[[Storage, int], bytes | memoryview], is_big_endian: bool, num_bytes: int) -> None:
        self._read, self._is_big_endian = read, is_big_endian
        # Tensors may be parts of one storage, as those of a GRU on CUDA are: it is read once.
        self._storages: dict[str, bytes | memoryview] = {}
        self.num_bytes = num_bytes  # of the file

    def __call__(self, tensor: Tensor) -> Array:
        """Return a tensor as an array. Raises InvalidModelFile if it reaches beyond its storage."""
        storage, dtype = tensor.storage, tensor.dtype
        itemsize = _ITEMSIZE[dtype]
        num_bytes = storage.num_elements * (_SIZES[storage.dtype])
        num_elements = num_bytes // itemsize
        last = tensor.offset + sum(
            (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        size = math.prod(tensor.shape)
        if size == 0 or size > num_elements or last >= num_elements:
            raise InvalidModelFile(
                f"a tensor of the shape {list(tensor.shape)} reaches beyond its {num_elements:,} numbers"
            )
        data = self._storages.get(storage.key)
        if data is None:
            data = self._storages[storage.key] = self._read(storage, _SIZES[storage.dtype])
        numbers = np.frombuffer(data, _NUMPY[dtype].newbyteorder(">") if self._is_big_endian else _NUMPY[dtype])
        strides = [stride * numbers.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)


def _check_overlap(roles: Found, num_bytes: int) -> None:
    """Raise InvalidModelFile if float32 copies of the tensors, which may share numbers, exceed twice the file."""
    arrays = [array for layer in roles.layers for array in (layer.inputs, layer.recurrent)]
    arrays.append(roles.dense)
    if roles.embedding is not None and roles.embedding.ctypes.data != roles.dense.ctypes.data:  # not tied
        arrays.append(roles.embedding)
    if 4 * sum(array.size for array in arrays) > 2 * num_bytes:
        raise InvalidModelFile("the tensors overlap: together they would be larger than the file")


def _declared(value: Any) -> dict[str, Storage]:
    """Return the storages of all tensors in a value, by key."""
    return {one.storage.key: one.storage for one in _walk(value) if isinstance(one, Tensor)}


def _walk(value: Any) -> Iterator[Any]:
    """Yield every container and tensor in a value, once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        parts: Iterable[Any] = ()
        if isinstance(one, dict):
            parts = one.values()
        elif isinstance(one, list | tuple):
            parts = one
        elif isinstance(one, Inert):
            parts = (one.state, one.items, one.elements, one.args)
        # Checkpoints have lists of a loss for each step, whose numbers aren't listed once more.
        waiting.extend(part for part in parts if isinstance(part, dict | list | tuple | Inert | Tensor))


def _model_of(value: Any, load: _Loader, order: Sequence[str]) -> ForeignModel:
    """Return the model in the value of a file."""
    found = list(_models_in(value))
    if not found:
        if any(isinstance(one, Tensor) for one in _walk(value)):
            raise UnsupportedModel(
                "the file has tensors, and no recurrent layer as PyTorch names them: it holds no GRU"
            )
        raise InvalidModelFile("the file has no tensors")
    # A model may be in the file twice: as a module and as its state dict.
    if len(found) > 1 and any(set(map(id, one[1].values())) != set(map(id, found[0][1].values())) for one in found):
        whole = [one for one in found if one[0] in order]
        if len(whole) != 1:
            raise UnsupportedModel(
                f"the file has {len(found)} models "
                f"({', '.join(shown(name or 'itself') for name, *_ in found[:6])}): save the "
                "state dict of one of them alone"
            )
        found, order = whole, []
    name, tensors, classes = found[0]
    roles = find_torch_roles(tensors, load, order, classes)
    _check_overlap(roles, load.num_bytes)
    kind = "PyTorch module" if classes else "PyTorch checkpoint" if name else "PyTorch state dict"
    return roles.model(kind, "torch", _vocabulary(value, len(roles.dense)))


def _models_in(
    value: Any, path: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """Yield path, tensors by name, and classes by path of a module, of each model in a value."""
    seen = set() if seen is None else seen
    if depth > _MAX_DEPTH or id(value) in seen or len(seen) > _MAX_VISITED:
        return
    seen.add(id(value))
    if isinstance(value, Inert) and "_modules" in value.attributes():
        tensors: dict[str, Tensor] = {}
        classes: dict[str, str] = {}
        _flatten(value, "", tensors, classes, 0)
        if is_model(list(tensors)):
            yield path, tensors, classes
            return
    named = {key: one for key, one in values_of(value) if isinstance(one, Tensor) and one.dtype in _ITEMSIZE}
    if is_model(list(named)):
        yield path, named, {}
        return
    for key, one in values_of(value):
        yield from _models_in(one, f"{path}.{key}".lstrip("."), depth + 1, seen)
    if isinstance(value, list | tuple):
        for index, one in enumerate(value[:64]):
            yield from _models_in(one, f"{path}[{index}]", depth + 1, seen)


def _flatten(module: Inert, path: str, tensors: dict[str, Tensor], classes: dict[str, str], depth: int) -> None:
    """Add the tensors and classes of a module and of those in it. Raises UnsupportedModel."""
    if depth > 16 or len(classes) > 512:
        raise UnsupportedModel("the module has more modules in it than a GRU character model")
    attributes = module.attributes()
    classes[path] = module.name
    if attributes.get("bidirectional") is True:
        raise UnsupportedModel(
            f"{shown(path)} is bidirectional: a text is generated forwards. Train it with bidirectional=False"
        )
    if attributes.get("max_norm") is not None:
        raise UnsupportedModel(
            f"{shown(path)} has max_norm={shown(str(attributes['max_norm'])[:40])}: it changes its rows when they are "
            "read. Train it without"
        )
    is_own = not module.name.startswith("torch.")
    for key, one in attributes.items() if is_own else ():
        if _CHANGES.fullmatch(key) and isinstance(one, int | float) and (one is True or one not in (0, 1)):
            raise UnsupportedModel(
                f"{shown(path) or 'the module'} has {shown(key)}={shown(str(one)[:40])}, and its program isn't read: "
                "if that doesn't change what it computes, save model.state_dict() instead"
            )
    before = len(tensors)
    for part in ("_parameters", "_buffers"):
        for key, value in values_of(attributes.get(part)):
            if isinstance(value, Tensor) and value.dtype in _ITEMSIZE:
                tensors[f"{path}.{key}".lstrip(".")] = value
    for key, value in values_of(attributes.get("_modules")):
        if isinstance(value, Inert):
            _flatten(value, f"{path}.{key}".lstrip("."), tensors, classes, depth + 1)
    if path and is_own and len(tensors) == before:
        raise UnsupportedModel(
            f"the module {shown(path)} ({shown(module.name)}) has no weights, so that nothing says what it computes; "
            f"{NEEDED} is needed"
        )


def _texts_of(array: Inert, length: int) -> list[Any] | None:
    """Return the items of a numpy array of this many texts; None for anything else."""
    state = array.state
    if not array.name.endswith("._reconstruct") or not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, _, items = state
    if shape != (length,) or not isinstance(dtype, Inert):
        return None
    if isinstance(items, list):
        return items
    return texts_of_numpy(dtype, items, length)


def _vocabulary(value: Any, num_rows: int) -> Tokens | None:
    """Return the vocabulary in the value of a file: a text, list or mapping with as many characters as there are rows.

    Several of the same characters in the same order are one. Those whose names say that they are characters come first.
    """
    found: list[tuple[bool, Tokens]] = []
    seen: set[int] = set()
    waiting: deque[tuple[str, Any, int]] = deque([("", value, 0)])
    while waiting and len(seen) < _MAX_VISITED:
        name, one, depth = waiting.popleft()
        if id(one) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(one))
        tokens = tokens_in_file(_texts_of(one, num_rows) if isinstance(one, Inert) else one, num_rows)
        if tokens is not None:
            found.append((not is_vocabulary_name(name), tokens))
            continue
        if not isinstance(one, Mapping | Inert):
            continue
        waiting.extend((key, inner, depth + 1) for key, inner in values_of(one))
    return min(found, key=lambda one: one[0])[1] if found else None

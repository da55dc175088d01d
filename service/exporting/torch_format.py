"""PyTorch: what torch.save writes of {"state_dict": ..., "charset": ...}.

    checkpoint = torch.load("model.pt", weights_only=True)

The format is a zip archive of a pickle, in which tensors refer to other members by key, and these members.
"""

from __future__ import annotations

import struct
import zipfile
from typing import IO

import numpy as np

from service.arrays import Float32
from service.model.artifact import Tensors
from service.model.config import ModelConfig

_PROTOCOL, _MARK, _STOP = b"\x80\x02", b"(", b"."
_EMPTY_DICT, _EMPTY_TUPLE, _TUPLE, _SET_ITEMS, _CALL, _PERSISTENT, _FALSE = b"}", b")", b"t", b"u", b"R", b"Q", b"\x89"
_ORDERED_DICT = b"ccollections\nOrderedDict\n" + _EMPTY_TUPLE + _CALL
_REBUILD, _STORAGE = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"


def write_torch(file: IO[bytes], config: ModelConfig, tensors: Tensors) -> None:
    """Write a checkpoint, whose state dict has the names of `config.tensor_shapes()`, into an empty file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", _pickle(config, tensors))
        archive.writestr("model/byteorder", "little")
        for key, tensor in enumerate(tensors.values()):
            archive.writestr(f"model/data/{key}", np.ascontiguousarray(tensor, "<f4").data.cast("B"))
        archive.writestr("model/version", "3\n")


def _pickle(config: ModelConfig, tensors: Tensors) -> bytes:
    out = [_PROTOCOL, _EMPTY_DICT, _MARK, _text("state_dict"), _ORDERED_DICT, _MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        out += [_text(name), _tensor(key, tensor)]
    out += [_SET_ITEMS]
    for name in ("embedding_dim", "num_units", "num_layers"):
        out += [_text(name), _number(getattr(config, name))]
    out += [_text("charset"), _text(config.charset), _SET_ITEMS, _STOP]
    return b"".join(out)


def _tensor(key: int, tensor: Float32) -> bytes:
    shape = b"".join(map(_number, tensor.shape))
    strides = b"".join(_number(stride // tensor.itemsize) for stride in np.empty(tensor.shape, "<f4").strides)
    storage = [_text("storage"), _STORAGE, _text(str(key)), _text("cpu"), _number(tensor.size)]
    parts = [
        _REBUILD, _MARK, _MARK, *storage, _TUPLE, _PERSISTENT, _number(0), _MARK, shape, _TUPLE, _MARK, strides, _TUPLE,
        _FALSE, _ORDERED_DICT, _TUPLE, _CALL,
    ]  # fmt: skip
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)

"""A device that is not the CPU, for machines without a GPU: `install()` makes torch know the device "gpu".

Its tensors have memory of the CPU and are computed by the CPU's kernels, so results are those of the CPU to the bit. It
refuses what CUDA refuses: an operation on tensors of two devices, and a numpy array of its tensors. Like CUDA it takes
indices, and scalars without dimensions, from the CPU.

The device can't be removed from a process, so install it in one of its own. It uses an experimental interface of torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

_DL_CPU, _DL_EXTENSION = 1, 12  # devices in DLPack
_INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
_registered: list[torch.library.Library] = []  # a library that is garbage takes its operations with it


class _Head(ctypes.Structure):
    """The beginning of DLPack's description of a tensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


def install() -> torch.device:
    """Let torch know the device, and return it."""
    backend_registration._setup_privateuseone_for_python_backend("gpu")
    _library("_").fallback(_compute, "PrivateUse1")
    aten = _library("aten")
    for name, function in {
        "_copy_from": lambda source, target, *_: (_cpu(target).copy_(_cpu(source)), target)[1],
        "empty.memory_format": lambda size, dtype=None, **_: _gpu(torch.empty(size, dtype=dtype)),
        "empty_strided": lambda size, stride, dtype=None, **_: _gpu(torch.empty_strided(size, stride, dtype=dtype)),
        "as_strided": lambda tensor, *place: _gpu(torch.as_strided(_cpu(tensor), *place)),
        "view": lambda tensor, size: _gpu(_cpu(tensor).view(size)),
        "_local_scalar_dense": lambda tensor: _cpu(tensor).item(),
    }.items():
        aten.impl(name, function, "PrivateUse1")
    return torch.device("gpu", 0)


def _library(namespace: str) -> torch.library.Library:
    _registered.append(torch.library.Library(namespace, "IMPL"))
    return _registered[-1]


def _compute(operation: Any, *arguments: Any, **options: Any) -> Any:
    """Compute any operation on the CPU, in the same memory."""
    name = operation._schema.name
    for leaf in tree_leaves((arguments, options)):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.dim() and name not in _INDEXED:
            raise RuntimeError(f"{name}: expected all tensors on the same device")
    device = options.pop("device", None)
    options.pop("pin_memory", None)
    if device is not None:
        options["device"] = torch.device("cpu")
    own: dict[int, torch.Tensor] = {}  # the tensors of the device by those on the CPU

    def unwrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
            return value
        inner = _cpu(value)
        own[id(inner)] = value
        return inner

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (device is not None and torch.device(device).type == "cpu"):
            return value
        return own[id(value)] if id(value) in own else _gpu(value)

    inner_arguments, inner_options = tree_map(unwrap, (arguments, options))
    return tree_map(wrap, operation(*inner_arguments, **inner_options))


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.device.type == "cpu" else _moved(tensor, _DL_CPU)


def _gpu(tensor: torch.Tensor) -> torch.Tensor:
    return _moved(tensor, _DL_EXTENSION)


def _moved(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    """Return a tensor of the same memory on the other device."""
    capsule = torch._C._to_dlpack(tensor.detach())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    head = _Head.from_address(pointer(capsule, b"dltensor"))
    head.device_type, head.device_id = device_type, 0
    return torch._C._from_dlpack(capsule)

"""The compiled kernel, through ctypes: its functions and structures as `src/abi.h` declares them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec

import numpy as np

_ERRORS = {1: MemoryError("no memory for the kernel"), 2: ValueError("the kernel refuses sizes that make no sense")}


class Linear(Structure):
    """GruLinear: addresses of a weight, (rows, columns) int8, and of scale and bias, (rows,) float32."""

    _fields_ = (("weight", POINTER(c_int8)), ("scale", POINTER(c_float)), ("bias", POINTER(c_float)))


class Layer(Structure):
    """GruLayer."""

    _fields_ = (("recurrent", Linear), ("inputs", Linear))


class Model(Structure):
    """GruModel."""

    _fields_ = (
        ("vocab", c_int64),
        ("units", c_int64),
        ("num_layers", c_int64),
        ("bits", c_int64),
        ("table", POINTER(c_float)),
        ("layers", POINTER(Layer)),
        ("dense", Linear),
    )


_ROW_FIELDS: dict[str, type[np.generic]] = {
    "seed": np.uint64, "position": np.int64, "hidden": np.uintp, "num_steps": np.int64, "stopped": np.int64,
    "num_prompt": np.int64, "prompt": np.uintp, "chars": np.uintp,
    "temperature": np.float64, "is_plain": np.int64, "top_k": np.int64, "top_p": np.float64, "min_p": np.float64,
    "repetition": np.float64, "presence": np.float64, "frequency": np.float64,
    "num_biases": np.int64, "bias_ids": np.uintp, "biases": np.uintp,
    "in_prompt": np.uintp, "num_generated": np.uintp,
    "num_stops": np.int64, "stop_lengths": np.uintp, "stop_ids": np.uintp, "text": np.uintp, "text_length": np.int64,
    "num_top": np.int64, "scores_start": np.int64, "chosen": np.uintp, "top_ids": np.uintp, "top": np.uintp,
    "num_keep": np.int64, "checkpoint_positions": np.uintp, "kept": np.uintp,
    "reaches_length": np.int64, "num_next": np.int64, "next_ids": np.uintp, "next": np.uintp,
}  # fmt: skip
ROW = np.dtype(list(_ROW_FIELDS.items()))  # GruRow; addresses as integers


@cache
def load() -> ctypes.CDLL | None:
    """The library, if it was compiled when the package was installed. Calls release the interpreter's lock."""
    found = find_spec("service.engine.native._kernel")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:  # compiled for another system
        return None
    library.gru_layout.restype = c_int64
    if library.gru_layout() != 1000 * ROW.itemsize + ctypes.sizeof(Model):
        return None  # left over from another version
    library.gru_variant.argtypes, library.gru_variant.restype = [c_int32], c_char_p
    library.gru_create.argtypes = [POINTER(Model), c_char_p, c_int32, c_int32, POINTER(c_void_p)]
    library.gru_destroy.argtypes, library.gru_destroy.restype = [c_void_p], None
    library.gru_advance.argtypes = [c_void_p, c_void_p, c_int64]
    library.gru_recurrent_products.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
    return library


def variants() -> list[str]:
    """Names of the kernels that this processor can run, the best first; none where the library is missing."""
    library, found = load(), list[str]()
    while library is not None and (name := library.gru_variant(len(found))) is not None:
        found.append(name.decode())
    return found


def check(code: int) -> None:
    """Raise what a function of the library reported."""
    if code:
        raise _ERRORS[code]

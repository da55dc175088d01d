"""The compiled kernel through ctypes: its functions, and numpy dtypes of the structures that are passed to it."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "the native kernel ran out of memory"),
    2: (ValueError, "the native kernel refuses the arguments: a size, weight, variant or number of threads is invalid"),
}

# The fields that Python writes or reads, and the types it expects, as `type_code` in layout.h names them: i, u or f and
# the number of bytes; * for an address. Order and offsets of the fields are those that the library reports.
FIELDS: dict[str, dict[str, str]] = {
    "GruLinear": {"weight": "*i1", "scale": "*f4", "bias": "*f4"},
    "GruLayer": {"recurrent": "GruLinear", "inputs": "GruLinear"},
    "GruModel": {
        "vocab": "i8", "units": "i8", "num_layers": "i8", "bits": "i8",
        "table": "*f4", "layers": "*GruLayer", "dense": "GruLinear",
    },
    "GruRow": {
        "seed": "u8", "position": "i8", "hidden": "*f4",
        "prompt": "*i8", "num_read": "i8", "num_generated": "i8", "num_prompt": "i8", "max_draws": "i8",
        "temperature": "f8", "is_plain": "i8", "top_k": "i8", "top_p": "f8", "min_p": "f8",
        "repetition_penalty": "f8", "presence_penalty": "f8", "frequency_penalty": "f8",
        "num_biases": "i8", "bias_ids": "*i8", "biases": "*f8", "allowed": "*u1", "in_prompt": "*u1",
        "times_generated": "*f8",
        "classes": "*i4", "num_classes": "i8", "transitions": "*i4", "fewest": "*i4", "fewest_after": "*i4",
        "stop_chars": "*i4", "withheld": "*i4", "state": "i8", "num_left": "i8", "first_stop": "i8",
        "num_top": "i8", "scores_start": "i8", "chosen": "*f4", "top_ids": "*i4", "top": "*f4",
        "among_allowed": "*f4",
        "num_checkpoints": "i8", "checkpoint_positions": "*i8", "checkpoints": "*f4",
        "num_next": "i8", "next_ids": "*i4", "next": "*f4",
    },
    "GruStepped": {
        "num_read": "i8", "num_drawn": "i8", "is_finished": "i8", "has_stopped": "i8", "num_withheld": "i8",
    },
}  # fmt: skip


class LayoutMismatch(Exception):
    """The library's structures have other fields than this version of the package uses."""


@dataclass(frozen=True)
class Library:
    """The compiled kernel. Calls of its functions release the interpreter's lock."""

    functions: ctypes.CDLL
    layer: np.dtype[np.void]  # GruLayer; addresses are integers in all of them
    model: np.dtype[np.void]  # GruModel
    make_row: type[ctypes.Structure]  # GruRow of zeros
    make_stepped: type[ctypes.Structure]  # GruStepped of zeros


@cache
def load() -> Library | None:
    """Return the kernel, or None if this installation has no kernel, or one of another version of the package."""
    spec = find_spec("service.engine.native._kernel")
    if spec is None or spec.origin is None:
        return None
    try:
        return open_library(spec.origin)
    except OSError as error:  # such as one for another system, or for a newer version of its libraries
        log.warning("the native kernel is not used, because it can't be loaded: %s", error)
        return None
    except LayoutMismatch as mismatch:
        log.warning("the native kernel is not used, because %s: install the package again", mismatch)
        return None


def why_not_compiled() -> str | None:
    """Return the reason that the build stored if it failed (see setup.py), or None if it did not fail."""
    try:
        return Path(__file__).with_name("not_compiled.txt").read_text().strip()
    except FileNotFoundError:
        return None


def open_library(path: str) -> Library:
    """Load a compiled kernel and check it. Raises OSError, and LayoutMismatch if it belongs to another version."""
    return declare(_load_exactly(path))


def declare(functions: ctypes.CDLL) -> Library:
    """Declare the types of a kernel's functions, and read its layout. Raises LayoutMismatch."""
    try:
        functions.gru_describe_layout.restype = c_char_p
        functions.gru_variant.argtypes, functions.gru_variant.restype = [c_int32], c_char_p
        functions.gru_create.argtypes = [c_void_p, c_char_p, c_int32, c_int32, POINTER(c_void_p)]
        functions.gru_destroy.argtypes, functions.gru_destroy.restype = [c_void_p], None
        functions.gru_advance.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        functions.gru_recurrent_products.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
    except AttributeError as missing:
        raise LayoutMismatch(f"it lacks a function: {missing}") from missing
    dtypes = read_layout(functions.gru_describe_layout().decode())
    return Library(
        functions,
        layer=dtypes["GruLayer"],
        model=dtypes["GruModel"],
        make_row=structure_of(dtypes["GruRow"]),
        make_stepped=structure_of(dtypes["GruStepped"]),
    )


def structure_of(dtype: np.dtype[np.void]) -> type[ctypes.Structure]:
    """Return a structure with the fields of a dtype. Writing one of its fields takes a third of the time."""
    if dtype.fields is None:
        raise AssertionError("a structure has fields")
    fields = [(name, np.ctypeslib.as_ctypes_type(field[0])) for name, field in dtype.fields.items()]
    structure = type("Structure", (ctypes.Structure,), {"_fields_": fields, "dtype": dtype})
    if [getattr(structure, name).offset for name in dtype.fields] != [field[1] for field in dtype.fields.values()]:
        raise LayoutMismatch("the compiler aligns its fields in another way")
    return structure


def _load_exactly(path: str) -> ctypes.CDLL:
    """Load a library, and leave the thread's floating-point environment as it was.

    A library that was linked with `-ffast-math` changes it while it is loaded: from then on this thread, and every
    thread that it starts, takes tiny numbers for 0, in the other stepper too.
    """
    environment = ctypes.create_string_buffer(64)  # C's fenv_t: 32 bytes or less
    # On a system without these functions, such as Windows, loading a library does not change the environment.
    save, restore = (getattr(ctypes.pythonapi, name, None) for name in ("fegetenv", "fesetenv"))
    if save is None or restore is None:
        return ctypes.CDLL(path)
    save(environment)
    try:
        return ctypes.CDLL(path)
    finally:
        restore(environment)


def read_layout(description: str) -> dict[str, np.dtype[np.void]]:
    """Return a dtype for each structure of a library from its description, which `describe_layout` in layout.h writes.

    Raises LayoutMismatch, naming the field, if a structure lacks a field of FIELDS, has one of another type, or has one
    that FIELDS doesn't list.
    """
    sizes: dict[str, int] = {}
    types: dict[str, dict[str, str]] = {}
    offsets: dict[str, dict[str, int]] = {}
    structure = ""
    for line in description.splitlines():
        match line.split():
            case ["structure", structure, size]:
                sizes[structure], types[structure], offsets[structure] = int(size), {}, {}
            case ["field", name, code, offset]:
                types[structure][name], offsets[structure][name] = code, int(offset)
    dtypes: dict[str, np.dtype[np.void]] = {}
    for structure, expected in FIELDS.items():
        reported = types.get(structure, {})
        for name in expected | reported:
            if reported.get(name) != expected.get(name):
                raise LayoutMismatch(
                    f"the type of its field {structure}.{name} is {reported.get(name)}, while this version of the "
                    f"package expects {expected.get(name)}"
                )
        dtypes[structure] = np.dtype(
            {
                "names": list(reported),
                "formats": [np.uintp if code[0] == "*" else dtypes.get(code, code) for code in reported.values()],
                "offsets": list(offsets[structure].values()),
                "itemsize": sizes[structure],
            }
        )
    return dtypes


def supported_variants() -> list[str]:
    """Return the names of the kernel's variants that this processor can run, best first; empty without a kernel."""
    library, names = load(), list[str]()
    while library is not None and (name := library.functions.gru_variant(len(names))) is not None:
        names.append(name.decode())
    return names


def check(code: int) -> None:
    """Raise the error that a function of the library returned. 0 is success."""
    if code:
        error, message = _ERRORS[code]
        raise error(message)

"""The kernel of another processor, which runs under an emulator, for the Python of this one.

The kernel is built by `setup.py` with a cross compiler, as a wheel on that processor would be. A small C++ program
(kernel_driver.cpp) loads it under qemu and calls its functions. Python stays native, so the tests need neither another
Python nor its libraries, and everything but the kernel runs at full speed. `EmulatedKernel.library()` takes the place
of `binding.load()`, so every test of the native stepper can run on it.

A call sends a copy of all memory that it needs, and takes back what the kernel has written. The addresses in the
structures are found with the layout that the library itself describes.

`TEST_EMULATED=aarch64 pytest tests/engine/test_stepper.py tests/engine/test_native.py` runs these tests so
(tests/engine/conftest.py).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import FrameType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from service.engine.native.binding import FIELDS, Library, declare, load, read_layout
from tests.harness.programs import program

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "kernel_driver.cpp"
Array = NDArray[Any]


@dataclass(frozen=True)
class Processor:
    """A kind of processor, for which Debian has a cross compiler and an emulator."""

    compiler: str
    emulator: str
    byte_order: str  # as in numpy

    @property
    def system(self) -> str:
        """The folder that has the libraries of the processor."""
        return "/usr/" + self.compiler.removesuffix("-g++")


# The processor on whose kernel the tests of the native stepper run, or "" for this one.
EMULATED = os.environ.get("TEST_EMULATED", "")
NATIVE = load  # what loads the kernel of this processor
PROCESSORS = {
    "aarch64": Processor("aarch64-linux-gnu-g++", "qemu-aarch64", "<"),
    "s390x": Processor("s390x-linux-gnu-g++", "qemu-s390x", ">"),
}


def build_kernel(processor: Processor, folder: Path, *flags: str) -> Path:
    """Build the kernel with `setup.py` and further flags; return its path. Skips without the compiler."""
    assert not (folder / "lib").exists()
    compiler = program(processor.compiler)
    linker = f"{compiler} -shared"
    tools = {"CC": compiler, "CXX": compiler, "LDSHARED": linker, "LDCXXSHARED": linker}
    for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"):
        tools[name] = ""
    if flags:
        # The build removes flags that change results from the environment: as if a wrapper of the compiler added them.
        wrapper = folder / "compiler"
        wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" {" ".join(flags)}\n')
        wrapper.chmod(0o755)
        tools |= {"CC": str(wrapper), "CXX": str(wrapper)}
    words = ["build_ext", "--force", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | tools, capture_output=True, text=True, check=False)
    built = list(folder.glob("lib/**/_kernel*.so"))
    assert built, done.stderr[-3000:]
    return built[0]


@cache
def _driver(processor: Processor) -> tuple[Path, TemporaryDirectory[str]]:
    """Build the program that calls a kernel; return its path, and what removes it at the end of the process."""
    folder = TemporaryDirectory()
    driver = Path(folder.name, "kernel_driver")
    words = ["-std=c++17", "-O2", "-Wall", "-Wextra", str(DRIVER), "-o", str(driver), "-ldl"]
    subprocess.run([program(processor.compiler), *words], check=True)
    return driver, folder


@cache
def _kernel(processor: Processor) -> tuple[Path, TemporaryDirectory[str]]:
    folder = TemporaryDirectory()
    return build_kernel(processor, Path(folder.name)), folder


class EmulatedKernel:
    """A running emulator. Ends with the block if it is used as a context manager.

    Args:
        processor: What is emulated.
        model: The emulator's name of the exact processor, which decides what instructions there are; None for its
            default.
        kernel: What `build_kernel` has built; None for a kernel as wheels have it, which is built once.
    """

    def __init__(self, processor: Processor, model: str | None = None, kernel: Path | None = None) -> None:
        kernel = kernel or _kernel(processor)[0]
        self._lock = Lock()
        self._order = processor.byte_order
        self._swaps = (self._order == "<") != (sys.byteorder == "little")
        words = ["-cpu", model] if model else []
        command = [program(processor.emulator), *words, "-L", processor.system, str(_driver(processor)[0]), str(kernel)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._functions: dict[str, _Function] = {}
        self._postponed: list[tuple[str, tuple[ctypes.c_void_p, ...]]] = []
        self._handles: set[int] = set()  # addresses of objects in the emulated memory
        self._addresses: dict[np.dtype[Any], list[int]] = {}  # offsets of addresses in each structure

    def close(self) -> None:
        """End the emulator."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def __enter__(self) -> EmulatedKernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> _Function:
        if not name.startswith("gru_"):
            raise AttributeError(name)
        return self._functions.setdefault(name, _Function(self, name))

    def library(self) -> Library:
        """Return what `binding.load()` returns for a kernel of this processor."""
        library = declare(cast(ctypes.CDLL, self))
        dtypes = read_layout(self.gru_describe_layout().decode())
        self._addresses = {dtype: list(_addresses(name, dtypes)) for name, dtype in dtypes.items()}
        self._addresses[np.dtype(np.uintp)] = [0]  # of rows
        return library

    def postpone(self, name: str, handles: tuple[ctypes.c_void_p, ...]) -> None:
        """Call a function that destroys objects before the next call.

        The garbage collector may destroy an object at any time, also in the middle of a call.
        """
        self._postponed.append((name, handles))

    def call(self, name: str, arguments: Iterable[Any], returns_text: bool, caller: FrameType) -> tuple[int, bytes]:
        """Call a function with arguments as ctypes takes them. Return its number and its text.

        Args:
            name: The function's.
            arguments: A number that is an address must be that of an array which `caller` keeps alive.
            returns_text: Whether the function returns one.
            caller: Where the arrays are found.
        """
        memory = _Memory(self._addresses, self._handles, caller)
        words: list[tuple[int, int]] = []
        results: list[tuple[Any, NDArray[np.uint64]]] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                words.append((1, memory.add(np.frombuffer(argument + b"\0", np.uint8))))
            elif isinstance(argument, ctypes.c_void_p):  # an object of the kernel
                words.append((0, argument.value or 0))
            elif hasattr(argument, "_obj"):  # made by byref
                results.append((argument._obj, np.zeros(1, np.uint64)))
                words.append((1, memory.add(results[-1][1])))
            elif isinstance(argument, _Address):
                words.append((0, 0) if argument.value == 0 else (1, memory.add_at(argument.value)))
            else:
                words.append((0, int(argument)))
        with self._lock:
            while self._postponed:
                destroy, handles = self._postponed.pop()
                nothing = _Memory(self._addresses, self._handles, caller)
                self._exchange(destroy, nothing, [(0, handle.value or 0) for handle in handles], False)
            returned, text = self._exchange(name, memory, words, returns_text)
        for variable, result in results:
            variable.value = int(result[0]) or None
            self._handles.add(int(result[0]))
        return returned, text

    def _exchange(
        self, name: str, memory: _Memory, words: list[tuple[int, int]], returns_text: bool
    ) -> tuple[int, bytes]:
        to, answer = self._process.stdin, self._process.stdout
        assert to is not None
        assert answer is not None

        def numbers(*values: int) -> bytes:
            return np.array([value & (2**64 - 1) for value in values], np.uint64).astype(self._order + "u8").tobytes()

        def read(size: int) -> bytes:
            data = answer.read(size)
            if len(data) < size:
                raise RuntimeError(f"the emulated kernel ended with {self._process.wait()}")
            return data

        def read_numbers(count: int) -> list[int]:
            return [int(value) for value in np.frombuffer(read(8 * count), self._order + "u8")]

        image, places = memory.image(self._swaps), memory.places()
        to.write(numbers(len(name)) + name.encode() + numbers(len(image)))
        to.write(image)
        to.write(numbers(len(places), *(number for pair in places for number in pair)))
        to.write(numbers(len(words), *(number for pair in words for number in pair), returns_text))
        to.flush()
        returned, length = read_numbers(2)
        text = read(length)
        (size,) = read_numbers(1)
        memory.store(read(size), self._swaps)
        return returned, text


@dataclass(frozen=True)
class _Address:
    value: int


class _Function:
    """A function of the emulated kernel, with those attributes of a function of ctypes that `declare` sets."""

    def __init__(self, kernel: EmulatedKernel, name: str) -> None:
        self._kernel, self._name = kernel, name
        self.argtypes: list[Any] = []
        self.restype: Any = ctypes.c_int32

    def __call__(self, *arguments: Any) -> Any:
        if self.restype is None:
            self._kernel.postpone(self._name, arguments)
            return None
        typed = [
            _Address(argument) if kind is ctypes.c_void_p and isinstance(argument, int) else argument
            for kind, argument in zip(self.argtypes, arguments, strict=True)
        ]
        is_text = self.restype is ctypes.c_char_p
        returned, text = self._kernel.call(self._name, typed, is_text, sys._getframe(1))
        if is_text:
            return text if returned else None
        return ctypes.c_int32(returned & 0xFFFFFFFF).value


class _Memory:
    """A copy of the arrays that a call needs, one after the other.

    Addresses in these arrays are followed. The arrays that they lead to are found among all arrays that the caller
    keeps alive: those in its variables, and in the objects of this package that these lead to.
    """

    def __init__(self, addresses: dict[np.dtype[Any], list[int]], handles: set[int], caller: FrameType) -> None:
        self._addresses, self._handles, self._caller = addresses, handles, caller
        self._arrays: list[Array] = []
        self._starts: list[int] = []  # place of each array
        self._size = 0
        self._place_of: dict[int, int] = {}  # by address of an array
        self._places: list[tuple[int, int]] = []
        self._known: tuple[list[int], list[Array]] | None = None

    def add(self, array: Array) -> int:
        """Add an array, and those that its structures point to; return its place."""
        address = _address(array)
        if address in self._place_of:
            return self._place_of[address]
        place = self._place_of[address] = self._size
        self._arrays.append(array)
        self._starts.append(place)
        self._size += (array.nbytes + 63) // 64 * 64
        for offset in self._addresses.get(array.dtype, ()) if array.size else ():
            words = np.lib.stride_tricks.as_strided(
                np.ndarray((1,), np.uint64, array, offset), (array.size,), (array.itemsize,)
            )
            for index, pointer in enumerate(words.tolist()):
                if pointer and pointer not in self._handles:
                    self._places.append((place + index * array.itemsize + offset, self.add_at(pointer)))
        return place

    def add_at(self, address: int) -> int:
        """Add the array that has an address; return the place of the address."""
        if self._known is None:
            arrays = {_address(array): array for array in _reachable(self._caller) if array.nbytes}
            self._known = sorted(arrays), [arrays[start] for start in sorted(arrays)]
        starts, arrays_at = self._known
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= starts[index] + arrays_at[index].nbytes:
            return 0  # of an array without elements, which nothing reads
        return self.add(arrays_at[index]) + address - starts[index]

    def places(self) -> list[tuple[int, int]]:
        """Return the place of each address in the memory, and the place that it points to."""
        return self._places

    def image(self, swaps: bool) -> bytes:
        """Return the bytes of all arrays, in the other byte order if `swaps`."""
        memory = bytearray(self._size)
        for place, array in zip(self._starts, self._arrays, strict=True):
            memory[place : place + array.nbytes] = (array.byteswap() if swaps else array).tobytes()
        return bytes(memory)

    def store(self, memory: bytes, swaps: bool) -> None:
        """Store what the kernel has written in the arrays."""
        for place, array in zip(self._starts, self._arrays, strict=True):
            data = memory[place : place + array.nbytes]
            if swaps:
                data = np.frombuffer(data, array.dtype).byteswap().tobytes()
            if data != array.tobytes():
                ctypes.memmove(_address(array), data, len(data))


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _addresses(structure: str, dtypes: dict[str, np.dtype[np.void]]) -> Iterator[int]:
    """Yield the offsets of all addresses in a structure."""
    fields = dtypes[structure].fields
    assert fields is not None
    for name, code in FIELDS[structure].items():
        if code in dtypes:
            yield from (fields[name][1] + offset for offset in _addresses(code, dtypes))
        elif code[0] == "*":
            yield fields[name][1]


def _reachable(caller: FrameType) -> Iterator[Array]:
    """Yield all arrays that own the memory of arrays in variables of a function, and in what these lead to."""
    seen: set[int] = set()
    stack: list[Any] = [dict(caller.f_locals)]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            yield item
        elif isinstance(item, ctypes.Structure):
            row: Any = item
            yield np.frombuffer(row, row.dtype)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif type(item).__module__.startswith("service."):
            stack.append(getattr(item, "__dict__", {}))
            stack.extend(
                getattr(item, name, None) for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())
            )

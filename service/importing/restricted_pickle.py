"""Reads a pickle without executing it: numbers, texts, plain containers and descriptions of tensors.

Python's own unpickler calls what a pickle names, and its memory isn't bounded by the pickle's size: one opcode can make
it allocate gigabytes. This reader knows the opcodes, but a name is only a name to it. A few calls have a meaning here,
see `_Machine._call`; any other call is refused. Objects of classes become inert records of their attributes.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from service.errors import InvalidModelFile
from service.importing.foreign import shown

MAX_PICKLE_BYTES = 32 << 20
# What objects take is charged to a budget of twice the file: with the file itself, three times its size.
_FREE_BYTES = 2 << 20
# What an opcode may allocate: an object, and its places on the stack, in the memo and in a container.
_OBJECT_BYTES = 128
_ITEM_BYTES = 16  # for each item of a list that is copied
# Opcodes that allocate another amount. Checkpoints have the losses of every step: numbers without an entry in the memo.
_OTHER_BYTES = {
    ord("("): 24, ord("N"): 24, 0x88: 24, 0x89: 24, ord("K"): 24, ord("M"): 48, ord("J"): 48, ord("G"): 44,
    0x8F: 256,  # an empty set
}  # fmt: skip
_MAX_MEMO = 1 << 20

# Names of Python's standard library that models are known to contain. Any other one is refused even if it isn't called.
_HARMLESS = {
    "collections.OrderedDict", "collections.defaultdict", "collections.Counter", "collections.deque",
    "argparse.Namespace", "types.SimpleNamespace", "copyreg._reconstructor", "copy_reg._reconstructor",
    "_codecs.encode", "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone",
    "decimal.Decimal", "uuid.UUID", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "set", "frozenset", "list", "dict", "tuple", "object", "int", "float", "str", "bytes", "bytearray", "bool",
        "complex", "slice", "range")),
}  # fmt: skip
_DICTIONARIES = {
    "collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict", "__builtin__.dict",
}  # fmt: skip
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
_OLD_MODULES = {"__builtin__", "copy_reg", "__builtins__", "exceptions", "commands", "nt", "posix", "__import__"}
# Calls whose result doesn't matter to a model's weights: their arguments are stored, and nothing is called.
_INERT_CALLS = {
    "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone", "decimal.Decimal", "uuid.UUID",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "argparse.Namespace", "types.SimpleNamespace", "builtins.slice", "builtins.complex", "builtins.range",
    "collections.deque", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer",
    "torch.device", "torch.Generator", "torch.serialization._get_layout", "torch.distributions.constraints",
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A name of a class or function, which nobody looks up."""

    name: str  # module and qualified name


@dataclass(eq=False)
class Inert:
    """What would be an object of a class, with its attributes and items."""

    name: str  # of the class
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        """Return the attributes by name."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # those in __dict__, and those in slots
            state = {**_if_dict(state[0]), **_if_dict(state[1])}
        return {key: value for key, value in _if_dict(state).items() if isinstance(key, str)}


@dataclass(frozen=True)
class Storage:
    """A named array of numbers in the file."""

    dtype: str  # name of a dtype of torch, such as `float32`; empty if the tensor says it
    key: str
    num_elements: int  # of a byte each, if the dtype is empty


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage. Nothing of it has been read or checked."""

    storage: Storage
    dtype: str
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


class _Mark:
    pass


_MARK = _Mark()
_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "",
}  # fmt: skip


def read_pickle(data: memoryview, start: int, what: str, file_bytes: int) -> tuple[Any, int]:
    """Read the pickle that begins at a position. Return its value and the position after it.

    Args:
        data: the file.
        start: of the pickle.
        what: is read, for messages.
        file_bytes: size of the whole file, in proportion to which memory may be taken.

    Raises InvalidModelFile if it is damaged, too large, or would call or name anything that a model doesn't need.
    """
    machine = _Machine(data, start, what, file_bytes)
    try:
        return machine.run(), machine.position
    except (struct.error, IndexError, UnicodeError, ValueError, TypeError, KeyError, AttributeError, OverflowError,
            RecursionError) as error:  # fmt: skip
        raise InvalidModelFile(f"{what} is damaged: it holds no whole pickle") from error


class _Machine:
    """The stack machine of the pickle format: https://docs.python.org/3/library/pickletools.html."""

    def __init__(self, data: memoryview, start: int, what: str, file_bytes: int) -> None:
        self._data, self.position, self._what = data, start, what
        self._end = min(len(data), start + MAX_PICKLE_BYTES)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._bytes_left = _FREE_BYTES + 2 * file_bytes

    def run(self) -> Any:
        """Execute the opcodes up to STOP. Return the value on the stack."""
        while True:
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                return self._pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self._error(f"it has the opcode {code:#04x}, which no model needs")
            self._charge(_OTHER_BYTES.get(code, _OBJECT_BYTES))
            operation(self)

    def _charge(self, num_bytes: int) -> None:
        """Take memory from the budget. Raises InvalidModelFile if it is used up."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise self._error("its objects and texts take more memory than those of any model of its size")

    # Reading

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > self._end:
            raise InvalidModelFile(
                f"{self._what} is damaged: its pickle is incomplete, or larger than that of any model"
            )
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        limit = min(self._end, self.position + 4096)
        line = bytes(self._data[self.position : limit])
        length = line.index(b"\n")
        self.position += length + 1
        return line[:length].decode()

    # The stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise self._error("its opcodes are out of order")
        return value

    def _pop_to_mark(self) -> list[Any]:
        index = len(self._stack) - 1
        while self._stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise self._error("its opcodes are out of order")
        items = self._stack[index + 1 :]
        del self._stack[index:]
        return items

    def _error(self, problem: str) -> InvalidModelFile:
        return InvalidModelFile(f"{self._what} is refused: {problem}")

    # What opcodes do

    def memoize(self, index: int) -> None:
        if len(self._memo) > _MAX_MEMO:
            raise self._error("it has more objects than any model")
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            target = target.elements
        if not isinstance(target, list):
            raise self._error("it appends to something that is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error("it sets items of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """Return a key that can be hashed quickly; nested ones of the same parts could take for ever."""
        parts = key if isinstance(key, tuple) else (key,)
        # Tensors are keys in a whole optimizer. They and inert objects are told apart by identity.
        if all(part is None or isinstance(part, str | int | float | bytes | Name | Tensor | Inert) for part in parts):
            return key
        raise self._error("a dictionary or set in it has keys that no model has")

    def add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, set):
            raise self._error("it adds to something that is no set")
        target.update(map(self._key, items))

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        root = module.partition(".")[0]
        if full not in _HARMLESS and (root in sys.stdlib_module_names or root in _OLD_MODULES):
            raise self._error(f"it names {shown(full)}, which no model needs. Nothing was executed")
        self.push(Name(full))

    def reduce(self) -> None:
        args, function = self._pop(), self._pop()
        self.push(self._call(function, args))

    def new_object(self, args: Any, kind: Any) -> None:
        if not isinstance(kind, Name) or not isinstance(args, tuple):
            raise self._error("it makes an object of something that is no class")
        self.push(self._object(kind.name, args))

    def _object(self, name: str, args: tuple[Any, ...]) -> Any:
        if name in _DICTIONARIES:
            return {}
        if name in ("builtins.set", "builtins.frozenset", "__builtin__.set"):
            return set()
        return Inert(name, args)

    def build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict | list | set | Tensor):
            raise self._error("it sets attributes of something that is no object")

    def persistent(self, identity: Any) -> None:
        if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage":
            _, kind, key, _, size = identity[:5]
            class_name = kind.name.rpartition(".")[2] if isinstance(kind, Name) else ""
            if class_name in _STORAGES and isinstance(size, int) and isinstance(key, str | int):
                self.push(Storage(_STORAGES[class_name], str(key), size))
                return
            raise self._error(f"it has numbers of an unknown kind ({shown(class_name)})")
        if (
            isinstance(identity, tuple)
            and len(identity) >= 2
            and identity[0] == "module"
            and isinstance(identity[1], Name)
        ):
            self.push(identity[1])  # a class with its source code, which is not read
            return
        raise self._error("it refers to something outside of it")

    def _call(self, function: Any, args: Any) -> Any:
        """Return what a call of the pickle means. Raises InvalidModelFile for any call without a meaning here."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise self._error("it calls something that is no function")
        name = function.name
        if name in _TENSORS:
            return _TENSORS[name](self, args)
        if name in ("collections.OrderedDict", "collections.Counter", "builtins.dict", "__builtin__.dict"):
            return self._dictionary(args[0] if args else ())
        if name == "collections.defaultdict":
            return {}
        if name in ("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"):
            items = args[0] if args else ()
            self._charge(_OBJECT_BYTES * len(items))
            return {self._key(one) for one in items}
        if name in ("builtins.list", "__builtin__.list", "builtins.tuple", "torch.Size"):
            found = args[0] if args else ()
            if not isinstance(found, list | tuple):
                raise self._error(f"it calls {name} in a way that no model needs")
            self._charge(_ITEM_BYTES * len(found))
            return list(found) if name.endswith("list") else tuple(found)
        if (
            name == "_codecs.encode"
            and len(args) == 2
            and isinstance(args[0], str)
            and args[1] in ("latin1", "latin-1")
        ):
            self._charge(len(args[0]))
            return args[0].encode("latin1")
        if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and args and isinstance(args[0], Name):
            return self._object(args[0].name, ())
        if name in ("builtins.bytes", "builtins.bytearray") and all(isinstance(arg, bytes) for arg in args):
            return args[0] if args else b""
        if name.endswith(".multiarray.scalar") and name in _INERT_CALLS and len(args) == 2:
            texts = texts_of_numpy(args[0], args[1], 1)
            return texts[0] if texts else Inert(name, args)
        if name in _INERT_CALLS:
            return Inert(name, args)
        raise self._error(
            f"it would call {shown(name)}. Nothing was executed. If you trust its author, load it with "
            "PyTorch and save model.state_dict() alone"
        )

    def _dictionary(self, pairs: Any) -> dict[Any, Any]:
        if isinstance(pairs, dict):
            pairs = list(pairs.items())
        if not isinstance(pairs, list | tuple):
            raise self._error("it makes a dictionary of something that is none")
        self._charge(_OBJECT_BYTES * len(pairs))
        return {self._key(key): value for key, value in pairs}

    # Tensors

    def tensor(self, args: tuple[Any, ...]) -> Tensor:
        """Return the tensor of torch._utils._rebuild_tensor, _v2 or _v3."""
        storage, offset, shape, strides = args[:4]
        dtype = args[6].name.rpartition(".")[2] if len(args) > 6 and isinstance(args[6], Name) else ""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or not all(type(one) is int and 0 <= one < 2**40 for one in numbers):
            raise self._error("a tensor in it is none")
        if len(shape) != len(strides) or len(shape) > 8:
            raise self._error("a tensor in it has an impossible shape")
        return Tensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))

    def parameter(self, args: tuple[Any, ...]) -> Any:
        """Return the tensor of a parameter."""
        if not isinstance(args[0], Tensor):
            raise self._error("a parameter in it is no tensor")
        return args[0]

    def tensor_of_type(self, args: tuple[Any, ...]) -> Any:
        """Return the tensor of torch._tensor._rebuild_from_type_v2: function, type, arguments, state."""
        function, _, inner = args[:3]
        if not isinstance(function, Name) or function.name not in _TENSORS or function.name.endswith("_from_type_v2"):
            raise self._error("a tensor in it is made in a way that no model needs")
        return _TENSORS[function.name](self, inner)

    # Opcodes with arguments

    def integer_line(self) -> None:
        line = self._line()
        self.push(line == "01" if line in ("00", "01") else int(line))

    def long_line(self) -> None:
        self.push(int(self._line().rstrip("L")))

    def long(self, layout: str) -> None:
        length = self._number(layout)
        if length > 64:
            raise self._error("it has an integer larger than any model needs")
        self.push(int.from_bytes(self._take(length), "little", signed=True))

    def text(self, layout: str) -> None:
        data = self._counted(layout)
        # Python stores a text with as many bytes for each character as the widest of them needs.
        widest = max(data, default=0)
        width = 1 if widest < 0xC4 else 2 if widest < 0xF0 else 4
        self._bytes_left += len(data)  # which are freed here
        self._charge(width * len(data.translate(None, _CONTINUATION)))
        self.push(data.decode("utf-8", "surrogatepass"))

    def old_text(self, layout: str) -> None:
        self.push(self._counted(layout).decode("latin-1"))

    def binary(self, layout: str) -> None:
        self.push(self._counted(layout))

    def _counted(self, layout: str) -> bytes:
        """Return the bytes after their length, and charge them to the budget."""
        size: int = self._number(layout)
        self._charge(size)
        return self._take(size)

    def text_line(self) -> None:
        self.push(self._line().strip("'\""))

    def number(self, layout: str) -> None:
        self.push(self._number(layout))

    def float_line(self) -> None:
        self.push(float(self._line()))

    def name_lines(self) -> None:
        module = self._line()
        self.name(module, self._line())

    def name_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._error("it names something with no text")
        self.name(module, name)

    def pack(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def tuple_to_mark(self) -> None:
        self.push(tuple(self._pop_to_mark()))

    def list_to_mark(self) -> None:
        self.push(self._pop_to_mark())

    def dict_to_mark(self) -> None:
        items = self._pop_to_mark()
        self.push({})
        self.set_items(items)

    def frozenset_to_mark(self) -> None:
        self.push({self._key(item) for item in self._pop_to_mark()})

    def append_one(self) -> None:
        item = self._pop()
        self.append([item])

    def append_many(self) -> None:
        items = self._pop_to_mark()
        self.append(items)

    def set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def set_many(self) -> None:
        items = self._pop_to_mark()
        self.set_items(items)

    def add_many(self) -> None:
        items = self._pop_to_mark()
        self.add_items(items)

    def object_of_class(self) -> None:
        args = self._pop()
        self.new_object(args, self._pop())

    def object_with_keywords(self) -> None:
        self._pop()
        self.object_of_class()

    def object_of_mark(self) -> None:
        kind, *args = self._pop_to_mark()
        self.new_object(tuple(args), kind)

    def object_of_lines(self) -> None:
        args = tuple(self._pop_to_mark())
        self.name_lines()
        self.new_object(args, self._pop())

    def duplicate(self) -> None:
        self.push(self._stack[-1])

    def pop_one(self) -> None:
        self._stack.pop()

    def pop_to_mark(self) -> None:
        self._pop_to_mark()

    def skip(self, count: int) -> None:
        self._take(count)

    def memoize_next(self) -> None:
        self.memoize(len(self._memo))


def texts_of_numpy(dtype: Any, data: Any, length: int) -> list[str] | None:
    """Return the texts in the bytes of a numpy array of fixed-width texts; None for anything else."""
    if not isinstance(dtype, Inert) or dtype.name != "numpy.dtype" or not isinstance(data, bytes):
        return None
    kind = dtype.args[0] if dtype.args else None
    if not isinstance(kind, str) or not kind.startswith("U") or not kind[1:].isdecimal() or len(kind) > 3:
        return None
    width = 4 * int(kind[1:])  # UTF-32
    if width == 0 or len(data) != width * length:
        return None
    is_big = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    codec = "utf-32-be" if is_big else "utf-32-le"
    return [data[start : start + width].decode(codec, "replace").rstrip("\0") for start in range(0, len(data), width)]


def _if_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def values_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named parts of a dictionary or an inert object: its items and attributes."""
    if isinstance(value, Inert):
        yield from value.attributes().items()
        yield from ((key, one) for key, one in value.items.items() if isinstance(key, str))
    elif isinstance(value, dict):
        yield from ((key, one) for key, one in value.items() if isinstance(key, str))


_TENSORS: dict[str, Callable[[_Machine, Any], Any]] = {
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_tensor_v3": _Machine.tensor,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
    "torch._tensor._rebuild_from_type_v2": _Machine.tensor_of_type,
}
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord("("): lambda m: m.push(_MARK),
    ord("0"): _Machine.pop_one,
    ord("1"): _Machine.pop_to_mark,
    ord("2"): _Machine.duplicate,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): _Machine.integer_line,
    ord("J"): lambda m: m.number("<i"),
    ord("K"): lambda m: m.number("<B"),
    ord("M"): lambda m: m.number("<H"),
    ord("L"): _Machine.long_line,
    0x8A: lambda m: m.long("<B"),
    0x8B: lambda m: m.long("<I"),
    ord("F"): _Machine.float_line,
    ord("G"): lambda m: m.number(">d"),
    ord("S"): _Machine.text_line,
    ord("T"): lambda m: m.old_text("<I"),
    ord("U"): lambda m: m.old_text("<B"),
    ord("V"): _Machine.text_line,
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    ord("B"): lambda m: m.binary("<I"),
    ord("C"): lambda m: m.binary("<B"),
    0x8E: lambda m: m.binary("<Q"),
    0x96: lambda m: m.binary("<Q"),
    ord("]"): lambda m: m.push([]),
    ord("a"): _Machine.append_one,
    ord("e"): _Machine.append_many,
    ord("l"): _Machine.list_to_mark,
    ord(")"): lambda m: m.push(()),
    ord("t"): _Machine.tuple_to_mark,
    0x85: lambda m: m.pack(1),
    0x86: lambda m: m.pack(2),
    0x87: lambda m: m.pack(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): _Machine.dict_to_mark,
    ord("s"): _Machine.set_one,
    ord("u"): _Machine.set_many,
    0x8F: lambda m: m.push(set()),
    0x90: _Machine.add_many,
    0x91: _Machine.frozenset_to_mark,
    ord("p"): lambda m: m.memoize(int(m._line())),
    ord("q"): lambda m: m.memoize(m._number("<B")),
    ord("r"): lambda m: m.memoize(m._number("<I")),
    0x94: _Machine.memoize_next,
    ord("g"): lambda m: m.recall(int(m._line())),
    ord("h"): lambda m: m.recall(m._number("<B")),
    ord("j"): lambda m: m.recall(m._number("<I")),
    ord("c"): _Machine.name_lines,
    0x93: _Machine.name_of_stack,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("i"): _Machine.object_of_lines,
    ord("o"): _Machine.object_of_mark,
    0x81: _Machine.object_of_class,
    0x92: _Machine.object_with_keywords,
    ord("P"): lambda m: m.persistent(m._line()),
    ord("Q"): lambda m: m.persistent(m._pop()),
    0x80: lambda m: m.skip(1),
    0x95: lambda m: m.skip(8),
}

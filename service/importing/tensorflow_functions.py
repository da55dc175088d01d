"""Functions of a TensorFlow graph as they are stored, and the operators of a GRU's step in numpy.

tensorflow/core/framework/{function,node_def,attr_value,tensor}.proto
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.errors import InvalidModelFile
from service.importing.foreign import BFLOAT16, Array
from service.importing.protobuf import Message, text_of

MAX_CONSTANT = 1 << 16  # numbers of a constant that is read
_MAX_NODES = 4096  # of a function
_CONSTANTS = {  # DataType: dtype, field of the numbers
    1: ("<f4", 5), 2: ("<f8", 6), 3: ("<i4", 7), 9: ("<i8", 10), 10: ("?", 11), 14: ("<u2", 13), 19: ("<u2", 13),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Node:
    name: str
    op: str
    inputs: tuple[str, ...]  # without control inputs
    message: Message

    def attribute(self, name: str) -> Message:
        """Return an attribute; an empty one if the node lacks it."""
        for attribute in self.message.messages(5):
            if attribute.bytes(1) == name.encode():
                return attribute.message(2)
        return Message(memoryview(b""))

    def integer(self, name: str) -> int:
        return self.attribute(name).integer(3)

    def flag(self, name: str) -> bool:
        return bool(self.attribute(name).integer(5))


@dataclass(frozen=True, eq=False)
class Function:
    name: str
    args: tuple[str, ...]
    nodes: Mapping[str, Node]
    results: tuple[str, ...]  # references of the outputs, in order


def limited(messages: Iterator[Message], limit: int, what: str) -> Iterator[Message]:
    for count, message in enumerate(messages):
        if count >= limit:
            raise InvalidModelFile(f"the graph has more than {limit:,} {what}")
        yield message


def parse_function(name: str, definition: Message) -> Function:
    signature = definition.message(1)
    nodes: dict[str, Node] = {}
    for message in limited(definition.messages(3), _MAX_NODES, "operations in a function"):
        references = (text_of(one) for one in message.all(3))
        node = Node(message.text(1), message.text(2), tuple(one for one in references if one[:1] != "^"), message)
        nodes[node.name] = node
    returned = {entry.text(1): entry.text(2) for entry in limited(definition.messages(4), 4096, "results")}
    args = tuple(arg.text(1) for arg in limited(signature.messages(2), 4096, "arguments"))
    outputs = [arg.text(1) for arg in limited(signature.messages(3), 4096, "results")]
    return Function(name, args, nodes, tuple(returned[one] for one in outputs if one in returned))


def constant(node: Node) -> Array:
    """Return the numbers of a constant. Raises InvalidModelFile, UnsupportedModel for other kinds."""
    tensor = node.attribute("value").message(8)
    kind = tensor.integer(1)
    if kind not in _CONSTANTS:
        return np.array(["?"])  # texts and handles: no operation here reads them
    dtype, number = _CONSTANTS[kind]
    shape = [dim.integer(1) for dim in limited(tensor.message(2).messages(2), 8, "axes")]
    size = math.prod(shape)
    if not 0 <= size <= MAX_CONSTANT:
        return np.array(["?"])
    content = tensor.bytes(4)
    if len(content):
        numbers: Array = np.frombuffer(content, dtype)
    elif kind in (1, 2):
        numbers = tensor.numbers(number, dtype)
    else:
        numbers = np.array(tensor.integers(number, MAX_CONSTANT), np.int64).astype(dtype)
    if kind in (14, 19):
        numbers = wide(numbers.view(BFLOAT16 if kind == 14 else "<f2"))
    if not numbers.size:
        numbers = np.zeros(1, numbers.dtype)
    if numbers.size < size:  # TensorFlow repeats the last number
        numbers = np.concatenate([numbers, np.full(size - numbers.size, numbers[-1])])
    return numbers[:size].reshape(shape)


def wide(array: Array) -> Array:
    """Return numbers that numpy computes with fast."""
    if array.dtype.names == BFLOAT16.names:
        return np.asarray((array["bfloat16"].astype(np.uint32) << 16).view(np.float32))
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5)


# The operators of a GRU's step


def _axis(value: Array) -> int:
    return int(value.reshape(-1)[0])


def _factors(node: Node, values: list[Array]) -> tuple[Array, Array]:
    left, right = values
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError
    return left.T if node.flag("transpose_a") else left, right.T if node.flag("transpose_b") else right


def _matmul(node: Node, values: list[Array]) -> Array:
    left, right = _factors(node, values)
    return np.asarray(left @ right)


def _strided_slice(node: Node, values: list[Array]) -> Array:
    data, begin, end, strides = values
    masks = {name: node.integer(f"{name}_mask") for name in ("begin", "end", "shrink_axis", "new_axis", "ellipsis")}
    if masks["new_axis"] or masks["ellipsis"]:
        raise ValueError
    index: list[Any] = []
    for axis, (first, last, stride) in enumerate(zip(begin, end, strides, strict=True)):
        bit = 1 << axis
        if masks["shrink_axis"] & bit:
            index.append(int(first))
        else:
            index.append(
                slice(
                    None if masks["begin"] & bit else int(first), None if masks["end"] & bit else int(last), int(stride)
                )
            )
    return np.asarray(data[tuple(index)])


def _squeeze(node: Node, values: list[Array]) -> Array:
    axes = node.attribute("squeeze_dims").message(1).integers(3, 8)
    return np.squeeze(values[0], tuple(axes) if axes else None)


def _split(node: Node, values: list[Array]) -> list[Array]:
    return np.split(values[1], max(1, min(node.integer("num_split"), 64)), _axis(values[0]))


def _split_sizes(_: Node, values: list[Array]) -> list[Array]:
    return np.split(values[0], np.cumsum(values[1])[:-1], _axis(values[2]))


def _unpack(node: Node, values: list[Array]) -> list[Array]:
    if values[0].shape[node.integer("axis")] > 64:
        raise ValueError
    return list(np.moveaxis(values[0], node.integer("axis"), 0))


def _select(_: Node, values: list[Array]) -> Array:
    return np.where(values[0], values[1], values[2])


OPERATIONS: dict[str, Callable[[Node, list[Array]], Array | list[Array]]] = {
    "AddV2": lambda _, v: v[0] + v[1], "Add": lambda _, v: v[0] + v[1], "BiasAdd": lambda _, v: v[0] + v[1],
    "Sub": lambda _, v: v[0] - v[1], "Mul": lambda _, v: v[0] * v[1],
    "Sigmoid": lambda _, v: sigmoid(v[0]), "Tanh": lambda _, v: np.tanh(v[0]),
    "MatMul": _matmul, "StridedSlice": _strided_slice, "Squeeze": _squeeze, "Split": _split, "SplitV": _split_sizes,
    "OnesLike": lambda _, v: np.ones_like(v[0]), "Unpack": _unpack, "SelectV2": _select,
    "Tile": lambda _, v: np.tile(v[0], v[1]),
    "ConcatV2": lambda _, v: np.concatenate(v[:-1], _axis(v[-1])),
    "ExpandDims": lambda _, v: np.expand_dims(v[0], _axis(v[1])),
    "Transpose": lambda _, v: np.transpose(v[0], [int(one) for one in v[1].reshape(-1)[:8]]),
    "Reshape": lambda _, v: v[0].reshape([int(one) for one in v[1].reshape(-1)[:8]]),
}  # fmt: skip

_ELEMENTWISE = {"AddV2", "Add", "BiasAdd", "Sub", "Mul", "SelectV2"}
_VIEWS = {"StridedSlice", "Squeeze", "Split", "SplitV", "Unpack", "ExpandDims", "Transpose"}


def num_computed(node: Node, values: list[Array]) -> int:
    """Return how many numbers an operator of `OPERATIONS` makes of these. Raises ValueError if they don't fit."""
    if node.op in _ELEMENTWISE:
        return int(math.prod(np.broadcast_shapes(*(value.shape for value in values))))
    if node.op == "MatMul":
        left, right = _factors(node, values)
        return len(left) * int(right.shape[1])
    if node.op == "Tile":
        return values[0].size * math.prod(int(one) for one in values[1].reshape(-1)[:8])
    return 0 if node.op in _VIEWS else sum(value.size for value in values)

"""Values in the functions of a SavedModel, followed to what makes them. Nothing is run.

A value passes through calls of functions and operations that change nothing. What remains is a `Place`: an output of an
operation, or an argument of a function that nobody calls, such as a variable of the model.

tensorflow/core/protobuf/saved_object_graph.proto
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import NEEDED, Array, NamedArrays, shown
from service.importing.protobuf import Message
from service.importing.tensorflow_functions import Function, Node, constant, limited, parse_function

_MAX_FUNCTIONS = 64  # that are parsed for one way
_MAX_STEPS = 100_000

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_SAME = {"Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics"}
_FLOAT_TYPES = {1, 2, 14, 19}  # DataType: float32, float64, bfloat16, float16


@dataclass(eq=False)
class Frame:
    """A call of a function."""

    function: Function
    bindings: list[tuple[Frame, str]] | None  # of the arguments; None for a root, and for the body of a loop
    bound: Mapping[int, str | None] = field(default_factory=dict)  # argument -> name of a variable in the checkpoint
    calls: dict[str, Frame] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Place:
    """An output of a node, or an argument of a root."""

    frame: Frame
    node: Node | None
    index: int  # of the output or of the argument

    @property
    def made_by(self) -> Node:
        """The node. Raises InvalidModelFile for an argument, where only a node can be."""
        if self.node is None:
            raise InvalidModelFile("an operation of the graph is missing: the file is damaged")
        return self.node


class Values:
    """The values of all functions of a SavedModel.

    Args:
        graph: the SavedModel.
        objects: the TrackableObjectGraph of its checkpoint.
        arrays: name in the checkpoint -> array.
    """

    def __init__(self, graph: Message, objects: bytes, arrays: NamedArrays) -> None:
        meta = graph.message(2)
        self._arrays = arrays
        self._saved = list(limited(meta.message(7).messages(1), 1 << 16, "objects"))
        self._keys = _keys_of_variables(self._saved, objects)
        self._definitions = {
            definition.message(1).text(1): definition
            for definition in limited(meta.message(2).message(2).messages(1), 1 << 14, "functions")
        }
        self._functions: dict[str, Function] = {}
        self._steps = 0
        # Function -> what its last arguments are bound to, by the numbers of objects. These are called from outside.
        self._bound = {
            entry.text(1): entry.message(2).integers(2, 4096)
            for entry in limited(meta.message(7).messages(2), 1 << 14, "functions")
        }

    @property
    def concrete(self) -> list[str]:
        """The names of the functions that a program may call, also those that the graph lacks."""
        return [*self._bound]

    def signatures(self) -> Iterator[str]:
        """Yield the names of the functions that are served."""
        for child, name in _children(self._saved[0]) if self._saved else ():
            if name == "signatures" and 0 <= child < len(self._saved):
                for one, _ in _children(self._saved[child]):
                    if 0 <= one < len(self._saved):
                        yield self._saved[one].message(8).text(1)

    def root(self, name: str) -> Frame | None:
        """Return a call of a function by a program; None if the graph lacks the function."""
        if name not in self._definitions:
            return None
        bound_inputs = self._bound[name]
        function = self.function(name)
        first = len(function.args) - len(bound_inputs)
        return Frame(function, None, {first + index: self._keys.get(one) for index, one in enumerate(bound_inputs)})

    def function(self, name: str) -> Function:
        """Return a function by its name. Raises InvalidModelFile."""
        found = self._functions.get(name)
        if found is None:
            if len(self._functions) >= _MAX_FUNCTIONS:
                self._functions.clear()
            if name not in self._definitions:
                raise InvalidModelFile(f"the graph lacks its function {shown(name)}: the file is damaged")
            found = self._functions[name] = parse_function(name, self._definitions[name])
        return found

    def has(self, name: str, operations: tuple[str, ...], depth: int = 0) -> bool:
        """Return whether a function, or one that it calls, has an operation with such a beginning of its name."""
        if depth > 8 or name not in self._definitions:
            return False
        self._step()
        nodes = self.function(name).nodes.values()
        return any(node.op.startswith(operations) for node in nodes) or any(
            self.has(node.attribute("f").message(10).text(1), operations, depth + 1)
            for node in nodes
            if node.op in _CALLS
        )

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise InvalidModelFile("the graph has more operations than that of any model")

    def at(self, frame: Frame, reference: str) -> Place:
        """Return what makes a value, through calls and operations that change nothing."""
        while True:
            self._step()
            name, _, rest = reference.partition(":")
            number = rest.rpartition(":")[2]
            index = int(number) if number.isdecimal() else 0
            if name in frame.function.args:
                position = frame.function.args.index(name)
                if frame.bindings is None:
                    return Place(frame, None, position)
                frame, reference = frame.bindings[position]
                continue
            node = frame.function.nodes.get(name)
            if node is None:
                raise InvalidModelFile(f"the graph lacks {shown(name)}: the file is damaged")
            if node.op in _CALLS:
                inner = frame.calls.get(name)
                if inner is None:
                    bindings = [(frame, one) for one in node.inputs]
                    inner = Frame(self.function(node.attribute("f").message(10).text(1)), bindings)
                    frame.calls[name] = inner
                frame, reference = inner, inner.function.results[index]
            elif node.op in _SAME or (node.op == "Cast" and self._is_float_cast(node)):
                reference = node.inputs[0]
            elif node.op == "IdentityN":
                reference = node.inputs[index]
            else:
                return Place(frame, node, index)

    def input(self, place: Place, index: int) -> Place:
        """Return what makes an input of an operation. Raises InvalidModelFile."""
        node = place.node
        if node is None or index >= len(node.inputs):
            raise InvalidModelFile("an operation of the graph lacks an input: the file is damaged")
        return self.at(place.frame, node.inputs[index])

    @staticmethod
    def _is_float_cast(node: Node) -> bool:
        return {node.attribute("SrcT").integer(6), node.attribute("DstT").integer(6)} <= _FLOAT_TYPES

    def variable(self, place: Place) -> Array | None:
        """Return the variable that a value is, in the order of its numbers in the file; None for another value."""
        key = self._key(place)
        return self._arrays.get(key) if key is not None else None

    def _key(self, place: Place) -> str | None:
        if place.node is not None and place.node.op == "ReadVariableOp":
            place = self.input(place, 0)
        return place.frame.bound.get(place.index) if place.node is None else None

    def is_array(self, place: Place, array: Array | None) -> bool:
        """Return whether a value is a variable, perhaps transposed as a tied one is."""
        if place.node is not None and place.node.op == "Transpose":
            place = self.input(place, 0)
        found = self.variable(place)
        return found is not None and array is not None and _begin(found) == _begin(array)

    def constant(self, place: Place) -> Array | None:
        """Return a constant, or several that are put together."""
        node = place.node
        if node is None:
            return None
        if node.op == "Const":
            return constant(node)
        if node.op == "Cast":
            return self.constant(self.input(place, 0))
        if node.op in ("ConcatV2", "Pack") and len(node.inputs) <= 8:
            parts = [
                self.constant(self.input(place, index)) for index in range(len(node.inputs) - (node.op == "ConcatV2"))
            ]
            if all(part is not None for part in parts):
                return np.concatenate([np.atleast_1d(part) for part in parts if part is not None])
        return None

    def is_counter(self, place: Place, index: int) -> bool:
        """Return whether the value of a loop after a step is one more than before it."""
        if place.made_by.op not in ("AddV2", "Add"):
            return False
        before, added = self.input(place, 0), self.constant(self.input(place, 1))
        return (
            before.node is None and before.index == index and added is not None
            and added.dtype.kind == "i" and added.size == 1 and int(added.reshape(-1)[0]) == 1
        )  # fmt: skip

    def refusal(self, place: Place, where: str = "between the ids and the logits") -> UnsupportedModel:
        """Return an error that names an operation, for the caller to raise."""
        if place.node is None:
            return UnsupportedModel(f"an input of the graph is used {where}; {NEEDED} is needed")
        return UnsupportedModel(
            f"the graph has the operation {shown(place.node.op)} ({shown(place.node.name)}) {where}, which this "
            f"service's models don't have; {NEEDED} is needed"
        )


def _begin(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _children(node: Message) -> Iterator[tuple[int, str]]:
    for child in limited(node.messages(1), 1 << 14, "objects"):
        yield child.integer(1), child.text(2)


def _keys_of_variables(saved: Sequence[Message], objects: bytes) -> dict[int, str]:
    """Return object of the graph -> name of its variable in the checkpoint. Both list objects by their names."""
    stored = list(limited(_object_graph(objects).messages(1), 1 << 16, "objects"))
    keys: dict[int, str] = {}
    waiting, seen = [(0, 0)], {0}
    while waiting:
        one, other = waiting.pop()
        if not (0 <= one < len(saved) and 0 <= other < len(stored)):
            continue
        for attribute in stored[other].messages(2):
            if attribute.text(1) == "VARIABLE_VALUE":
                keys[one] = attribute.text(3).removesuffix("/.ATTRIBUTES/VARIABLE_VALUE")
        named = {name: child for child, name in _children(stored[other])}
        for child, name in _children(saved[one]):
            if name in named and child not in seen:
                seen.add(child)
                waiting.append((child, named[name]))
    return keys


def _object_graph(data: bytes) -> Message:
    """Return the message in a tensor of one text: its length, a checksum of that, and the text."""
    size, position = 0, 0
    for position, byte in enumerate(data[:10]):
        size |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    start = position + 1 + 4
    return Message(memoryview(data)[start : start + size])

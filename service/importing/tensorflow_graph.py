"""What the functions of a SavedModel compute between ids and logits, read and never run.

From each function's outputs the way is followed back to the ids. It must consist of the output layer, GRU loops one
after another and the embedding, and operations between them that only move numbers. One step of each loop is compared
with a GRU's step in numbers, because programs write the same step in many ways: a few operators of our own do that.

tensorflow/core/protobuf/saved_object_graph.proto
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import NEEDED, Array, ForeignLayer, NamedArrays, shown
from service.importing.keras_roles import KerasRoles
from service.importing.protobuf import Message
from service.importing.tensorflow_functions import (
    MAX_CONSTANT,
    OPERATIONS,
    Function,
    Node,
    constant,
    limited,
    num_computed,
    parse_function,
    sigmoid,
    wide,
)

_MAX_FUNCTIONS = 64  # that are parsed for one way
_MAX_STEPS = 100_000
_MAX_DEPTH = 200
_MAX_SEARCHED = 1000  # operations before one that is refused, which may say why
_TOLERANCE = 1e-4

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_LOOPS = {"While", "StatelessWhile"}
_CUDNN = {"CudnnRNN", "CudnnRNNV2", "CudnnRNNV3"}
_SAME = {"Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics"}
_DRAWS = {"Multinomial", "StatelessMultinomial", "ArgMax"}
_RANDOM = ("RandomUniform", "StatelessRandomUniform", "RandomStandardNormal", "StatelessRandomNormal")
_SOFTMAX = {"Softmax", "LogSoftmax"}
_ROWS = {"Reshape", "ExpandDims", "Squeeze", "StridedSlice"}  # move or select rows, each with all numbers of a position
_TIME_FIRST = [1, 0, 2]
_FLOAT_TYPES = {1, 2, 14, 19}  # DataType: float32, float64, bfloat16, float16


@dataclass(frozen=True)
class GraphWay:
    """What a graph computes."""

    layers: tuple[str, ...]  # names of the GRU layers in the order in which they compute
    skips_row_0: bool  # the loops leave out positions with the id 0


@dataclass(eq=False)
class _Frame:
    """A call of a function."""

    function: Function
    bindings: list[tuple[_Frame, str]] | None  # of the arguments; None for a root, and for the body of a loop
    bound: Mapping[int, str | None] = field(default_factory=dict)  # argument -> name of a variable in the checkpoint
    calls: dict[str, _Frame] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Place:
    """An output of a node, or an argument of a root."""

    frame: _Frame
    node: Node | None
    index: int  # of the output or of the argument

    @property
    def made_by(self) -> Node:
        """The node. Raises InvalidModelFile for an argument, where only a node can be."""
        if self.node is None:
            raise InvalidModelFile("an operation of the graph is missing: the file is damaged")
        return self.node


def find_way(graph: Message, objects: bytes, arrays: NamedArrays, roles: KerasRoles) -> GraphWay | None:
    """Return what the functions of a SavedModel compute; None if it has no function that computes anything.

    Args:
        graph: the SavedModel.
        objects: the TrackableObjectGraph of its checkpoint.
        arrays: name in the checkpoint -> array.
        roles: what the arrays are.

    Raises UnsupportedModel if they compute something else, InvalidModelFile.
    """
    return _Graph(graph, objects, arrays, roles).way()


class _Graph:
    def __init__(self, graph: Message, objects: bytes, arrays: NamedArrays, roles: KerasRoles) -> None:
        self._meta = graph.message(2)
        self._arrays, self._roles = arrays, roles
        self._saved = list(limited(self._meta.message(7).messages(1), 1 << 16, "objects"))
        self._keys = _keys_of_variables(self._saved, objects)
        self._definitions = {
            definition.message(1).text(1): definition
            for definition in limited(self._meta.message(2).message(2).messages(1), 1 << 14, "functions")
        }
        self._functions: dict[str, Function] = {}
        self._steps = 0
        self._skips_row_0 = False

    def way(self) -> GraphWay | None:
        concrete = {
            entry.text(1): entry.message(2).integers(2, 4096)
            for entry in limited(self._meta.message(7).messages(2), 1 << 14, "functions")
        }
        served = [name for name in self._signatures() if name in concrete]
        ways: list[GraphWay] = []
        problems: list[tuple[str, UnsupportedModel]] = []
        for names in (served, [name for name in concrete if name not in served]):
            for name in names:
                if name not in self._definitions:
                    continue
                try:
                    way = self._way_of(self._root(name, concrete[name]))
                except UnsupportedModel as error:
                    problems.append((name, error))
                    continue
                if way is not None:
                    ways.append(way)
            if ways or problems:
                break  # what is served is the model; other functions may be those of a training
        # A library saves each function twice, for a prediction and for training, where dropout draws numbers.
        problems = [one for one in problems if not (ways and self._has(one[0], _RANDOM))]
        if problems:
            raise problems[0][1]
        if len({way.layers for way in ways}) > 1:
            raise UnsupportedModel(
                f"the functions of the graph apply the GRU layers in several orders; {NEEDED} is needed"
            )
        if not ways and any(self._has(name, ("MatMul", "While")) for name in concrete):
            raise UnsupportedModel(
                "no function of the graph leads from ids to logits: save the model with a signature that takes ids, "
                "as model.export does"
            )
        return ways[0] if ways else None

    def _signatures(self) -> Iterator[str]:
        """Yield the names of the functions that are served."""
        for child, name in _children(self._saved[0]) if self._saved else ():
            if name == "signatures" and 0 <= child < len(self._saved):
                for one, _ in _children(self._saved[child]):
                    if 0 <= one < len(self._saved):
                        yield self._saved[one].message(8).text(1)

    def _root(self, name: str, bound_inputs: Sequence[int]) -> _Frame:
        function = self._function(name)
        first = len(function.args) - len(bound_inputs)
        return _Frame(function, None, {first + index: self._keys.get(one) for index, one in enumerate(bound_inputs)})

    def _function(self, name: str) -> Function:
        found = self._functions.get(name)
        if found is None:
            if len(self._functions) >= _MAX_FUNCTIONS:
                self._functions.clear()
            if name not in self._definitions:
                raise InvalidModelFile(f"the graph lacks its function {shown(name)}: the file is damaged")
            found = self._functions[name] = parse_function(name, self._definitions[name])
        return found

    def _has(self, name: str, operations: tuple[str, ...], depth: int = 0) -> bool:
        """Return whether a function, or one that it calls, has an operation with such a beginning of its name."""
        if depth > 8 or name not in self._definitions:
            return False
        self._step()
        nodes = self._function(name).nodes.values()
        return any(node.op.startswith(operations) for node in nodes) or any(
            self._has(node.attribute("f").message(10).text(1), operations, depth + 1)
            for node in nodes
            if node.op in _CALLS
        )

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise InvalidModelFile("the graph has more operations than that of any model")

    # Following

    def _at(self, frame: _Frame, reference: str) -> _Place:
        """Return what makes a value, through calls and operations that change nothing."""
        while True:
            self._step()
            name, _, rest = reference.partition(":")
            number = rest.rpartition(":")[2]
            index = int(number) if number.isdecimal() else 0
            if name in frame.function.args:
                position = frame.function.args.index(name)
                if frame.bindings is None:
                    return _Place(frame, None, position)
                frame, reference = frame.bindings[position]
                continue
            node = frame.function.nodes.get(name)
            if node is None:
                raise InvalidModelFile(f"the graph lacks {shown(name)}: the file is damaged")
            if node.op in _CALLS:
                inner = frame.calls.get(name)
                if inner is None:
                    bindings = [(frame, one) for one in node.inputs]
                    inner = _Frame(self._function(node.attribute("f").message(10).text(1)), bindings)
                    frame.calls[name] = inner
                frame, reference = inner, inner.function.results[index]
            elif node.op in _SAME or (node.op == "Cast" and self._is_float_cast(node)):
                reference = node.inputs[0]
            elif node.op == "IdentityN":
                reference = node.inputs[index]
            else:
                return _Place(frame, node, index)

    def _input(self, place: _Place, index: int) -> _Place:
        node = place.node
        if node is None or index >= len(node.inputs):
            raise InvalidModelFile("an operation of the graph lacks an input: the file is damaged")
        return self._at(place.frame, node.inputs[index])

    @staticmethod
    def _is_float_cast(node: Node) -> bool:
        return {node.attribute("SrcT").integer(6), node.attribute("DstT").integer(6)} <= _FLOAT_TYPES

    def _variable(self, place: _Place) -> Array | None:
        """Return the variable that a value is, in the order of its numbers in the file; None for another value."""
        key = self._key(place)
        return self._arrays.get(key) if key is not None else None

    def _key(self, place: _Place) -> str | None:
        if place.node is not None and place.node.op == "ReadVariableOp":
            place = self._input(place, 0)
        return place.frame.bound.get(place.index) if place.node is None else None

    def _is(self, place: _Place, array: Array | None) -> bool:
        """Return whether a value is a variable, perhaps transposed as a tied one is."""
        if place.node is not None and place.node.op == "Transpose":
            place = self._input(place, 0)
        found = self._variable(place)
        return found is not None and array is not None and _begin(found) == _begin(array)

    def _is_output_product(self, place: _Place) -> bool:
        return (
            place.node is not None
            and place.node.op in ("MatMul", "BatchMatMulV2", "Einsum")
            and len(place.node.inputs) == 2
            and self._is(self._input(place, 1), self._roles.dense)
        )

    def _refuse(self, place: _Place, where: str = "between the ids and the logits") -> UnsupportedModel:
        if place.node is None:
            return UnsupportedModel(f"an input of the graph is used {where}; {NEEDED} is needed")
        return UnsupportedModel(
            f"the graph has the operation {shown(place.node.op)} ({shown(place.node.name)}) {where}, which this "
            f"service's models don't have; {NEEDED} is needed"
        )

    # The way

    def _way_of(self, root: _Frame) -> GraphWay | None:
        """Return the way of a function; None if it is only a part of a model. Raises UnsupportedModel."""
        products = self._after_logits(root)
        ways = [way for product in products if (way := self._before_logits(product)) is not None]
        if len({way.layers for way in ways}) > 1 or (ways and len(products) > 1):
            raise UnsupportedModel(
                f"a function of the graph applies its output layer {len(products)} times; {NEEDED} is needed"
            )
        return ways[0] if ways else None

    def _after_logits(self, root: _Frame) -> list[_Place]:
        """Return the products of the output layer that outputs are made of, and check what follows them."""
        parents: dict[tuple[Node | None, int], list[tuple[_Place, bool]]] = {}
        products: dict[Node, _Place] = {}
        waiting: list[tuple[_Place | None, bool, _Frame, str]] = [
            (None, False, root, one) for one in root.function.results
        ]
        seen: set[tuple[int, str, bool]] = set()
        after: list[tuple[_Place, bool]] = []
        while waiting:
            parent, drawn, frame, reference = waiting.pop()
            place = self._at(frame, reference)
            node = place.node
            if parent is not None:
                parents.setdefault((node, id(place.frame)), []).append((parent, drawn))
            if node is None or node.op in _LOOPS or node.op in _CUDNN or node.op in ("Shape", "Const"):
                continue
            if self._is_output_product(place):
                products[node] = place
                continue
            drawn = drawn or node.op in _DRAWS
            key = (id(place.frame), node.name, drawn)
            if key in seen:
                continue
            seen.add(key)
            waiting += [(place, drawn, place.frame, one) for one in node.inputs]
        for product in products.values():
            below: list[tuple[_Place, bool]] = list(parents.get((product.node, id(product.frame)), ()))
            done: set[tuple[Node | None, bool]] = set()
            while below:
                place, drawn = below.pop()
                if (place.node, drawn) in done or (place.node is not None and place.node.op in _DRAWS):
                    continue  # what a program does with a character isn't the model's
                done.add((place.node, drawn))
                after.append((place, drawn))
                below += parents.get((place.node, id(place.frame)), ())
            for place, drawn in after:
                self._check_after(place, drawn, product)
            softmaxes = [place for place, _ in after if place.node is not None and place.node.op in _SOFTMAX]
            for place in softmaxes:
                before = self._input(place, 0)
                while before.node is not None and before.node.op in _ROWS:
                    before = self._input(before, 0)
                if before.node is not None and before.node.op in _SOFTMAX:
                    raise self._refuse(before, "after the output layer, before another softmax")
        return list(products.values())

    def _check_after(self, place: _Place, drawn: bool, product: _Place) -> None:
        """Raise UnsupportedModel if an operation after the logits changes them and is part of the model.

        drawn: the value is only used to draw a character. Then temperature and masks belong to the program that draws,
        unless they have the name of a part of the model.
        """
        node = place.node
        if node is None or product.node is None:
            return
        if node.op in _SOFTMAX or node.op in ("Reshape", "ExpandDims", "Squeeze", "Shape", "BatchMatMulV2"):
            return
        if node.op in ("BiasAdd", "AddV2", "Add") and any(
            self._is(self._input(place, index), self._roles.dense_bias) for index in (0, 1)
        ):
            return
        if node.op == "StridedSlice" and self._keeps_rows(place):
            return
        if node.op == "Transpose" and self._order_of_axes(place) in ([0, 1, 2], _TIME_FIRST):
            return
        model = _scope_of_model(product.node.name)
        if drawn and not (model and node.name.startswith(model)):
            return
        raise self._refuse(place, "after the output layer")

    def _keeps_rows(self, place: _Place) -> bool:
        """Return whether a slice selects positions forwards, and takes all numbers of each."""
        node = place.made_by
        begin, strides = (self._constant(self._input(place, index)) for index in (1, 3))
        if begin is None or strides is None or (strides < 1).any() or node.integer("new_axis_mask"):
            return False
        last = 1 << 2
        masks = [node.integer(f"{name}_mask") for name in ("begin", "end")]
        return begin.size < 3 or all(mask & last for mask in masks) or bool(node.integer("ellipsis_mask"))

    def _order_of_axes(self, place: _Place) -> list[int] | None:
        order = self._constant(self._input(place, 1))
        return None if order is None else [int(one) for one in order.reshape(-1)[:8]]

    def _constant(self, place: _Place) -> Array | None:
        """Return a constant, or several that are put together."""
        node = place.node
        if node is None:
            return None
        if node.op == "Const":
            return constant(node)
        if node.op == "Cast":
            return self._constant(self._input(place, 0))
        if node.op in ("ConcatV2", "Pack") and len(node.inputs) <= 8:
            parts = [
                self._constant(self._input(place, index)) for index in range(len(node.inputs) - (node.op == "ConcatV2"))
            ]
            if all(part is not None for part in parts):
                return np.concatenate([np.atleast_1d(part) for part in parts if part is not None])
        return None

    def _before_logits(self, product: _Place) -> GraphWay | None:
        """Return the way to the input of the output layer; None if that is an argument of the function."""
        layers: list[str] = []
        place, is_time_first, is_last = self._input(product, 0), None, True
        while True:
            node = place.node
            if node is None:
                if not layers:
                    return None  # a function of the output layer alone
                raise self._refuse(place)
            if node.op == "Transpose":
                order = self._order_of_axes(place)
                if order == _TIME_FIRST:
                    is_time_first = not is_time_first if is_time_first is not None else None
                elif order is None or order != list(range(len(order))):
                    raise self._refuse(place)
                place = self._input(place, 0)
            elif is_last and (node.op in _ROWS and (node.op != "StridedSlice" or self._keeps_rows(place))):
                place = self._input(place, 0)
            elif node.op == "TensorListStack" or (is_last and node.op in _LOOPS):
                if node.op == "TensorListStack" and is_time_first is False:
                    raise self._refuse(place, "where the axes of texts and positions are exchanged")
                loop = self._input(place, 0) if node.op == "TensorListStack" else place
                if loop.node is None or loop.node.op not in _LOOPS:
                    raise self._refuse(loop)
                names, place = self._loop(loop, is_state=node.op in _LOOPS)
                layers[:0] = names
                is_time_first, is_last = True, False
            elif node.op in _CUDNN and (place.index == 0 or (is_last and place.index == 1)):
                time_major = self._is_time_major(node)
                if place.index == 0 and is_time_first is (not time_major):
                    raise self._refuse(place, "where the axes of texts and positions are exchanged")
                layers.insert(0, self._cudnn(place))
                place, is_time_first, is_last = self._input(place, 0), time_major, False
            elif self._ends(place):
                if is_time_first:
                    raise UnsupportedModel(
                        f"the graph reads the first axis of the ids as positions; {NEEDED} is needed"
                    )
                if not layers:
                    raise UnsupportedModel(f"the graph has no GRU layer before the output layer; {NEEDED} is needed")
                break
            elif (unrolled := self._unrolled_layer(place)) is not None:
                raise UnsupportedModel(
                    f"the graph has the steps of the layer {unrolled} one by one, because it was made with "
                    "unroll=True: make the model with unroll=False, load its weights, and save it again"
                )
            else:
                raise self._refuse(place)
        if sorted(layers) != sorted(layer.name for layer in self._roles.layers):
            twice = next((name for name in layers if layers.count(name) > 1), None)
            unused = [layer.name for layer in self._roles.layers if layer.name not in layers]
            what = f"applies the layer {twice} several times" if twice else f"doesn't apply {', '.join(unused)}"
            raise UnsupportedModel(f"the graph {what}; {NEEDED} is needed")
        return GraphWay(tuple(layers), self._skips_row_0)

    def _unrolled_layer(self, place: _Place) -> str | None:
        """Return the name of a GRU layer whose steps, outside of a loop, are part of what makes a value."""
        waiting, seen = [place], set[tuple[int, str]]()
        while waiting and len(seen) < _MAX_SEARCHED:
            place = waiting.pop()
            node = place.node
            if node is None or node.op in _LOOPS | _CUDNN or (id(place.frame), node.name) in seen:
                continue
            seen.add((id(place.frame), node.name))
            inputs = [self._input(place, index) for index in range(len(node.inputs))]
            if node.op == "MatMul" and len(inputs) == 2:
                for layer in self._roles.layers:
                    if self._is(inputs[1], layer.recurrent):
                        return layer.name
            waiting += inputs
        return None

    def _ends(self, place: _Place) -> bool:
        """Return whether a value is the embedding of the ids, and check these. Raises UnsupportedModel."""
        op = place.made_by.op
        if op in ("GatherV2", "ResourceGather") and self._is(self._input(place, 0), self._roles.embedding):
            self._check_ids(self._input(place, 1))
            return True
        if op == "OneHot" and self._roles.embedding is None:
            on, off = (self._constant(self._input(place, index)) for index in (2, 3))
            if (
                on is not None
                and off is not None
                and on.reshape(-1).tolist() == [1]
                and off.reshape(-1).tolist() == [0]
            ):
                self._check_ids(self._input(place, 0))
                return True
        return False

    def _check_ids(self, place: _Place) -> None:
        """Raise UnsupportedModel if ids are changed before the embedding."""
        for _ in range(_MAX_DEPTH):
            node = place.node
            if node is None or node.op.startswith("LookupTableFind"):
                return
            if node.op == "Cast":
                place = self._input(place, 0)
            elif node.op == "RaggedTensorToTensor":
                place = self._input(place, 1)
            elif node.op == "SelectV2":  # Keras lets negative ids count from the end
                condition, other = self._input(place, 0), self._input(place, 2)
                if condition.node is None or condition.node.op != "Less":
                    raise self._refuse(place, "before the embedding")
                zero = self._constant(self._input(condition, 1))
                if zero is None or zero.any() or self._input(condition, 0).node is not other.node:
                    raise self._refuse(place, "before the embedding")
                place = other
            else:
                raise self._refuse(place, "before the embedding")
        raise self._refuse(place, "before the embedding")

    # A loop

    def _loop(self, loop: _Place, is_state: bool) -> tuple[list[str], _Place]:
        """Return the names of the GRU layers of a loop over positions, and its input. Raises UnsupportedModel."""
        node, outer = loop.made_by, loop.frame
        body = _Frame(self._function(node.attribute("body").message(10).text(1)), None)
        if len(body.function.args) != len(node.inputs) or len(body.function.results) != len(node.inputs):
            raise InvalidModelFile(f"the loop {shown(node.name)} is damaged")
        results = [self._at(body, one) for one in body.function.results]
        written = [i for i, one in enumerate(results) if one.node is not None and one.node.op == "TensorListSetItem"]
        states = [
            index
            for index, one in enumerate(results)
            if one.node is not None and index not in written and not self._is_counter(one, index)
        ]
        if not states or (not is_state and loop.index not in written):
            raise self._refuse(loop)
        step = _Step(self, loop, body, states)
        new = [step.value(results[index]) for index in states]
        names: list[str] = []
        layers = {layer.name: layer for layer in self._roles.layers}
        value, source, order = step.x, step.source, []
        if value is None or source is None:
            raise self._refuse(loop, "which doesn't read one position after another")
        while True:
            fit = next(
                (
                    (index, name)
                    for index in range(len(states))
                    for name, layer in layers.items()
                    if index not in order and _fits(layer, value, step.hidden[index], new[index])
                ),
                None,
            )
            if fit is None:
                break
            order.append(fit[0])
            names.append(fit[1])
            value = new[fit[0]]
        # With a mask, Keras also hands the output on from step to step.
        others = [index for index in range(len(states)) if index not in order]
        if not order or not all(_equal(new[index], value) for index in others):
            raise UnsupportedModel(
                f"the step of the layer {shown(node.name.removesuffix('/while'))} in the graph isn't that of a GRU "
                f"with tanh, sigmoid and reset_after=True; {NEEDED} is needed"
            )
        output = results[loop.index] if is_state else self._input(results[loop.index], 2)
        if not _equal(step.value(output), value):
            raise self._refuse(output, "after the last layer of a loop")
        for index in states:
            self._check_initial(self._at(outer, node.inputs[index]))
        return names, source

    @staticmethod
    def _is_time_major(node: Node) -> bool:
        given = any(attribute.text(1) == "time_major" for attribute in node.message.messages(5))
        return node.flag("time_major") or not given

    def _cudnn(self, place: _Place) -> str:
        """Return the name of the layer that an operation of cuDNN is, as Keras writes it on a GPU."""
        node = place.made_by
        kinds = {name: node.attribute(name).text(2) for name in ("rnn_mode", "direction", "input_mode")}
        if (
            kinds["rnn_mode"] != "gru"
            or kinds["direction"] not in ("", "unidirectional")
            or kinds["input_mode"] not in ("", "linear_input", "auto_select")
            or self._input(place, 4).made_by.op not in ("Fill", "Const")  # lengths, which a mask computes
        ):
            raise self._refuse(place)
        numbers = _Step(self, place, _Frame(place.frame.function, None), ()).value(self._input(place, 3))
        for layer in self._roles.layers:
            if _is_cudnn(layer, numbers):
                self._check_initial(self._input(place, 1))
                return layer.name
        raise self._refuse(place, "with weights that are not those of a GRU layer")

    def _is_counter(self, place: _Place, index: int) -> bool:
        """Return whether the value of a loop after a step is one more than before it."""
        if place.made_by.op not in ("AddV2", "Add"):
            return False
        before, added = self._input(place, 0), self._constant(self._input(place, 1))
        return (
            before.node is None and before.index == index and added is not None
            and added.dtype.kind == "i" and added.size == 1 and int(added.reshape(-1)[0]) == 1
        )  # fmt: skip

    def _check_initial(self, start: _Place) -> None:
        """Raise UnsupportedModel if an initial state is neither zeros, an argument nor a state between calls."""
        waiting, seen = [start], set()
        while waiting:
            place = waiting.pop()
            node = place.node
            if node is None or node in seen or node.op in ("Shape", "Size"):
                continue
            seen.add(node)
            if node.op == "Const":
                value = constant(node)
                if value.dtype.kind == "f" and value.any():
                    raise self._refuse(place, "in an initial state that isn't zero")
            elif node.op == "Fill":
                waiting.append(self._input(place, 1))
            elif node.op in _LOOPS or node.op in ("TensorListStack", "MatMul"):
                raise self._refuse(place, "in an initial state, which must be zero")
            elif node.op == "ReadVariableOp":
                key = self._key(place)
                array = self._arrays.get(key) if key is not None else None
                if array is not None and any(_begin(array) == _begin(one) for one in self._all_weights()):
                    raise self._refuse(place, "in an initial state, which must be zero")
            else:
                waiting += [self._input(place, index) for index in range(len(node.inputs))]

    def _all_weights(self) -> Iterator[Array]:
        roles = self._roles
        for layer in roles.layers:
            yield from (layer.inputs, layer.recurrent)
        yield from (one for one in (roles.embedding, roles.dense, roles.dense_bias) if one is not None)

    def is_mask(self, place: _Place) -> bool:
        """Return whether a value says at which positions the id is not 0."""
        for _ in range(16):
            node = place.node
            if node is None:
                return False
            if node.op == "NotEqual":
                zero = self._constant(self._input(place, 1))
                return zero is not None and not zero.any()
            if node.op not in ("Transpose", "ExpandDims", "Cast"):
                return False
            place = self._input(place, 0)
        return False


class _Step:
    """The values of one step of a loop, for an input and states that are drawn."""

    def __init__(self, graph: _Graph, loop: _Place, body: _Frame, states: Sequence[int]) -> None:
        self._graph, self._loop, self._body = graph, loop, body
        self._random = np.random.default_rng(0)
        self.x: Array | None = None  # (1, I)
        self.source: _Place | None = None  # of the inputs
        self._states = {index: position for position, index in enumerate(states)}
        # Each state has the units of its layer; which layer that is isn't known yet, but layers have equal units.
        units = max((layer.num_units for layer in graph._roles.layers), default=1)
        self.hidden = [self._draw(units) for _ in states]
        self._values: dict[tuple[int, str, int], Array] = {}
        # Operators repeat numbers (a sum of a column and a row), so that a small file could take any memory.
        self._num_left = 4 * sum(array.size for array in graph._all_weights()) + MAX_CONSTANT

    def _draw(self, length: int) -> Array:
        # Large enough that tanh and sigmoid differ from what is nearly the same around 0.
        return self._random.uniform(-4, 4, (1, length)).astype(np.float32)

    def value(self, place: _Place, depth: int = 0) -> Array:
        """Return the numbers of a value. Raises UnsupportedModel for an operation that a GRU's step doesn't have."""
        graph, node = self._graph, place.node
        if depth > _MAX_DEPTH:
            raise InvalidModelFile("a step of the graph has more operations than that of any GRU")
        if node is None:
            if place.frame is self._body:
                return self._argument(place, depth)
            key = place.frame.bound.get(place.index)
            array = graph._arrays.get(key) if key is not None else None
            if array is None:
                raise graph._refuse(place, f"in the loop {shown(self._loop.node.name if self._loop.node else '')}")
            return wide(array)
        known = (id(place.frame), node.name, place.index)
        if known not in self._values:
            self._values[known] = self._compute(place, depth)
        return self._values[known]

    def _argument(self, place: _Place, depth: int) -> Array:
        if place.index in self._states:
            return self.hidden[self._states[place.index]]
        outer = self._graph._at(self._loop.frame, self._loop.made_by.inputs[place.index])
        return self.value(outer, depth + 1)

    def _compute(self, place: _Place, depth: int) -> Array:
        graph, node = self._graph, place.made_by
        if node.op == "Const":
            return constant(node)
        if node.op == "ReadVariableOp":
            return self.value(graph._input(place, 0), depth + 1)
        if node.op == "TensorListGetItem":
            return self._item(place)
        operation = OPERATIONS.get(node.op)
        if operation is None:
            raise graph._refuse(place, "in the step of a GRU layer")
        values = [self.value(graph._input(place, index), depth + 1) for index in range(len(node.inputs))]
        try:
            self._num_left -= num_computed(node, values)
            if self._num_left < 0:
                raise graph._refuse(place, "with more numbers than a GRU's step has")
            found = operation(node, values)
        except (ValueError, IndexError, TypeError, ArithmeticError) as error:
            raise graph._refuse(place, "with numbers that don't fit") from error
        return found[place.index] if isinstance(found, list) else found

    def _item(self, place: _Place) -> Array:
        """Return the input of a step, or whether a position counts."""
        graph = self._graph
        of_list = graph._input(place, 0)
        if of_list.node is not None or of_list.frame is not self._body or self._loop.node is None:
            raise graph._refuse(place, "in the step of a GRU layer")
        index = graph._input(place, 1)  # a step must read the position at which the loop's counter is
        result = graph._at(self._body, self._body.function.results[index.index]) if index.node is None else index
        if index.node is not None or result.node is None or not graph._is_counter(result, index.index):
            raise graph._refuse(place, "in another order than that of the text")
        start = graph._constant(graph._at(self._loop.frame, self._loop.node.inputs[index.index]))
        outer = graph._at(self._loop.frame, self._loop.node.inputs[of_list.index])
        if start is None or start.any() or outer.node is None or outer.node.op != "TensorListFromTensor":
            raise graph._refuse(outer, "as the input of a loop")
        source = graph._input(outer, 0)
        if graph.is_mask(source):
            graph._skips_row_0 = True
            return np.ones((1, 1), bool)
        if self.source is not None and self.x is not None:
            if source.node is not self.source.node:
                raise graph._refuse(source, "as a second input of a loop")
        else:
            self.source = source
            shape = graph._constant(graph._input(outer, 1))
            last = int(shape.reshape(-1)[-1]) if shape is not None and shape.size else 0
            if not 0 < last <= MAX_CONSTANT:
                raise graph._refuse(outer, "with inputs of an unknown size")
            self.x = self._draw(last)
        return self.x


def _fits(layer: ForeignLayer, inputs: Array, before: Array, after: Array) -> bool:
    """Return whether a value is what a layer computes of its inputs and its state before."""
    if inputs.shape != (1, layer.num_inputs) or before.shape != (1, layer.num_units) or after.shape != before.shape:
        return False
    x = _product(inputs, layer.inputs) + (0 if layer.input_bias is None else wide(layer.input_bias))
    h = _product(before, layer.recurrent) + (0 if layer.recurrent_bias is None else wide(layer.recurrent_bias))
    gates = {gate: index for index, gate in enumerate(layer.gates)}
    xs, hs = np.split(x, 3, 1), np.split(h, 3, 1)
    reset = sigmoid(xs[gates["r"]] + hs[gates["r"]])
    update = sigmoid(xs[gates["z"]] + hs[gates["z"]])
    expected = update * before + (1 - update) * np.tanh(xs[gates["n"]] + reset * hs[gates["n"]])
    return _equal(after, np.asarray(expected))


def _is_cudnn(layer: ForeignLayer, numbers: Array) -> bool:
    """Return whether numbers are a layer's weights as cuDNN has them: gates r, z, n, of inputs, then of the state."""
    position = 0
    numbers = numbers.reshape(-1)
    for part in (layer.inputs, layer.recurrent, layer.input_bias, layer.recurrent_bias):
        for gate in "rzn":
            if part is None:
                return False
            index = layer.gates.index(gate)
            own = part[index * layer.num_units : (index + 1) * layer.num_units].reshape(-1)
            if not np.array_equal(numbers[position : position + own.size], wide(own)):
                return False
            position += own.size
    return position == numbers.size


def _equal(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, atol=_TOLERANCE, rtol=_TOLERANCE))


def _product(row: Array, rows: Array) -> Array:
    return np.asarray(row @ wide(rows).T)


def _begin(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _scope_of_model(name: str) -> str:
    """Return what the names of a model's operations begin with, by that of its output layer's product."""
    layer = name.removesuffix("/MatMul").removesuffix("/Tensordot")
    scope, slash, _ = layer.rpartition("/")
    return scope + slash


# Reading


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

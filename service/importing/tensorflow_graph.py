"""What the functions of a SavedModel compute between ids and logits, read and never run.

From each function's outputs the way is followed back to the ids. It must consist of the output layer, GRU loops one
after another and the embedding, and operations between them that only move numbers. One step of each loop is compared
with a GRU's step in numbers (`tensorflow_steps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import NEEDED, Array, NamedArrays, shown
from service.importing.keras_roles import KerasRoles
from service.importing.protobuf import Message
from service.importing.tensorflow_functions import Node, constant
from service.importing.tensorflow_steps import Step, equal, fits, is_cudnn
from service.importing.tensorflow_values import Frame, Place, Values

_MAX_DEPTH = 200
_MAX_SEARCHED = 1000  # operations before one that is refused, which may say why

_LOOPS = {"While", "StatelessWhile"}
_CUDNN = {"CudnnRNN", "CudnnRNNV2", "CudnnRNNV3"}
_DRAWS = {"Multinomial", "StatelessMultinomial", "ArgMax"}
_RANDOM = ("RandomUniform", "StatelessRandomUniform", "RandomStandardNormal", "StatelessRandomNormal")
_SOFTMAX = {"Softmax", "LogSoftmax"}
_ROWS = {"Reshape", "ExpandDims", "Squeeze", "StridedSlice"}  # move or select rows, each with all numbers of a position
_TIME_FIRST = [1, 0, 2]


@dataclass(frozen=True)
class GraphWay:
    """What a graph computes."""

    layers: tuple[str, ...]  # names of the GRU layers in the order in which they compute
    skips_row_0: bool  # the loops leave out positions with the id 0


def find_way(graph: Message, objects: bytes, arrays: NamedArrays, roles: KerasRoles) -> GraphWay | None:
    """Return what the functions of a SavedModel compute; None if it has no function that computes anything.

    Args:
        graph: the SavedModel.
        objects: the TrackableObjectGraph of its checkpoint.
        arrays: name in the checkpoint -> array.
        roles: what the arrays are.

    Raises UnsupportedModel if they compute something else, InvalidModelFile.
    """
    return _Way(Values(graph, objects, arrays), roles).way()


class _Way:
    """The way between ids and logits, of layers with these roles."""

    def __init__(self, values: Values, roles: KerasRoles) -> None:
        self._values, self._roles = values, roles
        self._skips_row_0 = False

    def way(self) -> GraphWay | None:
        concrete = self._values.concrete
        served = [name for name in self._values.signatures() if name in concrete]
        ways: list[GraphWay] = []
        problems: list[tuple[str, UnsupportedModel]] = []
        for names in (served, [name for name in concrete if name not in served]):
            for name in names:
                root = self._values.root(name)
                if root is None:
                    continue
                try:
                    way = self._way_of(root)
                except UnsupportedModel as error:
                    problems.append((name, error))
                    continue
                if way is not None:
                    ways.append(way)
            if ways or problems:
                break  # what is served is the model; other functions may be those of a training
        # A library saves each function twice, for a prediction and for training, where dropout draws numbers.
        problems = [one for one in problems if not (ways and self._values.has(one[0], _RANDOM))]
        if problems:
            raise problems[0][1]
        if len({way.layers for way in ways}) > 1:
            raise UnsupportedModel(
                f"the functions of the graph apply the GRU layers in several orders; {NEEDED} is needed"
            )
        if not ways and any(self._values.has(name, ("MatMul", "While")) for name in concrete):
            raise UnsupportedModel(
                "no function of the graph leads from ids to logits: save the model with a signature that takes ids, "
                "as model.export does"
            )
        return ways[0] if ways else None

    def _is_output_product(self, place: Place) -> bool:
        return (
            place.node is not None
            and place.node.op in ("MatMul", "BatchMatMulV2", "Einsum")
            and len(place.node.inputs) == 2
            and self._values.is_array(self._values.input(place, 1), self._roles.dense)
        )

    def _way_of(self, root: Frame) -> GraphWay | None:
        """Return the way of a function; None if it is only a part of a model. Raises UnsupportedModel."""
        products = self._after_logits(root)
        ways = [way for product in products if (way := self._before_logits(product)) is not None]
        if len({way.layers for way in ways}) > 1 or (ways and len(products) > 1):
            raise UnsupportedModel(
                f"a function of the graph applies its output layer {len(products)} times; {NEEDED} is needed"
            )
        return ways[0] if ways else None

    def _after_logits(self, root: Frame) -> list[Place]:
        """Return the products of the output layer that outputs are made of, and check what follows them."""
        parents: dict[tuple[Node | None, int], list[tuple[Place, bool]]] = {}
        products: dict[Node, Place] = {}
        waiting: list[tuple[Place | None, bool, Frame, str]] = [
            (None, False, root, one) for one in root.function.results
        ]
        seen: set[tuple[int, str, bool]] = set()
        after: list[tuple[Place, bool]] = []
        while waiting:
            parent, drawn, frame, reference = waiting.pop()
            place = self._values.at(frame, reference)
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
            below: list[tuple[Place, bool]] = list(parents.get((product.node, id(product.frame)), ()))
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
                before = self._values.input(place, 0)
                while before.node is not None and before.node.op in _ROWS:
                    before = self._values.input(before, 0)
                if before.node is not None and before.node.op in _SOFTMAX:
                    raise self._values.refusal(before, "after the output layer, before another softmax")
        return list(products.values())

    def _check_after(self, place: Place, drawn: bool, product: Place) -> None:
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
            self._values.is_array(self._values.input(place, index), self._roles.dense_bias) for index in (0, 1)
        ):
            return
        if node.op == "StridedSlice" and self._keeps_rows(place):
            return
        if node.op == "Transpose" and self._order_of_axes(place) in ([0, 1, 2], _TIME_FIRST):
            return
        model = _scope_of_model(product.node.name)
        if drawn and not (model and node.name.startswith(model)):
            return
        raise self._values.refusal(place, "after the output layer")

    def _keeps_rows(self, place: Place) -> bool:
        """Return whether a slice selects positions forwards, and takes all numbers of each."""
        node = place.made_by
        begin, strides = (self._values.constant(self._values.input(place, index)) for index in (1, 3))
        if begin is None or strides is None or (strides < 1).any() or node.integer("new_axis_mask"):
            return False
        last = 1 << 2
        masks = [node.integer(f"{name}_mask") for name in ("begin", "end")]
        return begin.size < 3 or all(mask & last for mask in masks) or bool(node.integer("ellipsis_mask"))

    def _order_of_axes(self, place: Place) -> list[int] | None:
        order = self._values.constant(self._values.input(place, 1))
        return None if order is None else [int(one) for one in order.reshape(-1)[:8]]

    def _before_logits(self, product: Place) -> GraphWay | None:
        """Return the way to the input of the output layer; None if that is an argument of the function."""
        layers: list[str] = []
        place, is_time_first, is_last = self._values.input(product, 0), None, True
        while True:
            node = place.node
            if node is None:
                if not layers:
                    return None  # a function of the output layer alone
                raise self._values.refusal(place)
            if node.op == "Transpose":
                order = self._order_of_axes(place)
                if order == _TIME_FIRST:
                    is_time_first = not is_time_first if is_time_first is not None else None
                elif order is None or order != list(range(len(order))):
                    raise self._values.refusal(place)
                place = self._values.input(place, 0)
            elif is_last and (node.op in _ROWS and (node.op != "StridedSlice" or self._keeps_rows(place))):
                place = self._values.input(place, 0)
            elif node.op == "TensorListStack" or (is_last and node.op in _LOOPS):
                if node.op == "TensorListStack" and is_time_first is False:
                    raise self._values.refusal(place, "where the axes of texts and positions are exchanged")
                loop = self._values.input(place, 0) if node.op == "TensorListStack" else place
                if loop.node is None or loop.node.op not in _LOOPS:
                    raise self._values.refusal(loop)
                names, place = self._loop(loop, is_state=node.op in _LOOPS)
                layers[:0] = names
                is_time_first, is_last = True, False
            elif node.op in _CUDNN and (place.index == 0 or (is_last and place.index == 1)):
                time_major = self._is_time_major(node)
                if place.index == 0 and is_time_first is (not time_major):
                    raise self._values.refusal(place, "where the axes of texts and positions are exchanged")
                layers.insert(0, self._cudnn(place))
                place, is_time_first, is_last = self._values.input(place, 0), time_major, False
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
                raise self._values.refusal(place)
        self._check_layers(layers)
        return GraphWay(tuple(layers), self._skips_row_0)

    def _check_layers(self, layers: list[str]) -> None:
        """Raise UnsupportedModel unless each layer of the model is applied once."""
        if sorted(layers) != sorted(layer.name for layer in self._roles.layers):
            twice = next((name for name in layers if layers.count(name) > 1), None)
            unused = [layer.name for layer in self._roles.layers if layer.name not in layers]
            what = f"applies the layer {twice} several times" if twice else f"doesn't apply {', '.join(unused)}"
            raise UnsupportedModel(f"the graph {what}; {NEEDED} is needed")

    def _unrolled_layer(self, place: Place) -> str | None:
        """Return the name of a GRU layer whose steps, outside of a loop, are part of what makes a value."""
        waiting, seen = [place], set[tuple[int, str]]()
        while waiting and len(seen) < _MAX_SEARCHED:
            place = waiting.pop()
            node = place.node
            if node is None or node.op in _LOOPS | _CUDNN or (id(place.frame), node.name) in seen:
                continue
            seen.add((id(place.frame), node.name))
            inputs = [self._values.input(place, index) for index in range(len(node.inputs))]
            if node.op == "MatMul" and len(inputs) == 2:
                for layer in self._roles.layers:
                    if self._values.is_array(inputs[1], layer.recurrent):
                        return layer.name
            waiting += inputs
        return None

    def _ends(self, place: Place) -> bool:
        """Return whether a value is the embedding of the ids, and check these. Raises UnsupportedModel."""
        op = place.made_by.op
        if op in ("GatherV2", "ResourceGather") and self._values.is_array(
            self._values.input(place, 0), self._roles.embedding
        ):
            self._check_ids(self._values.input(place, 1))
            return True
        if op == "OneHot" and self._roles.embedding is None:
            on, off = (self._values.constant(self._values.input(place, index)) for index in (2, 3))
            if (
                on is not None
                and off is not None
                and on.reshape(-1).tolist() == [1]
                and off.reshape(-1).tolist() == [0]
            ):
                self._check_ids(self._values.input(place, 0))
                return True
        return False

    def _check_ids(self, place: Place) -> None:
        """Raise UnsupportedModel if ids are changed before the embedding."""
        for _ in range(_MAX_DEPTH):
            node = place.node
            if node is None or node.op.startswith("LookupTableFind"):
                return
            if node.op == "Cast":
                place = self._values.input(place, 0)
            elif node.op == "RaggedTensorToTensor":
                place = self._values.input(place, 1)
            elif node.op == "SelectV2":  # Keras lets negative ids count from the end
                condition, other = self._values.input(place, 0), self._values.input(place, 2)
                if condition.node is None or condition.node.op != "Less":
                    raise self._values.refusal(place, "before the embedding")
                zero = self._values.constant(self._values.input(condition, 1))
                if zero is None or zero.any() or self._values.input(condition, 0).node is not other.node:
                    raise self._values.refusal(place, "before the embedding")
                place = other
            else:
                raise self._values.refusal(place, "before the embedding")
        raise self._values.refusal(place, "before the embedding")

    def _loop(self, loop: Place, is_state: bool) -> tuple[list[str], Place]:
        """Return the names of the GRU layers of a loop over positions, and its input. Raises UnsupportedModel."""
        node, outer = loop.made_by, loop.frame
        body = Frame(self._values.function(node.attribute("body").message(10).text(1)), None)
        if len(body.function.args) != len(node.inputs) or len(body.function.results) != len(node.inputs):
            raise InvalidModelFile(f"the loop {shown(node.name)} is damaged")
        results = [self._values.at(body, one) for one in body.function.results]
        written = [i for i, one in enumerate(results) if one.node is not None and one.node.op == "TensorListSetItem"]
        states = [
            index
            for index, one in enumerate(results)
            if one.node is not None and index not in written and not self._values.is_counter(one, index)
        ]
        if not states or (not is_state and loop.index not in written):
            raise self._values.refusal(loop)
        step = self._step(loop, body, states)
        new = [step.value(results[index]) for index in states]
        names: list[str] = []
        layers = {layer.name: layer for layer in self._roles.layers}
        value, source, order = step.x, step.source, []
        if value is None or source is None:
            raise self._values.refusal(loop, "which doesn't read one position after another")
        while True:
            fit = next(
                (
                    (index, name)
                    for index in range(len(states))
                    for name, layer in layers.items()
                    if index not in order and fits(layer, value, step.hidden[index], new[index])
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
        if not order or not all(equal(new[index], value) for index in others):
            raise UnsupportedModel(
                f"the step of the layer {shown(node.name.removesuffix('/while'))} in the graph isn't that of a GRU "
                f"with tanh, sigmoid and reset_after=True; {NEEDED} is needed"
            )
        output = results[loop.index] if is_state else self._values.input(results[loop.index], 2)
        if not equal(step.value(output), value):
            raise self._values.refusal(output, "after the last layer of a loop")
        for index in states:
            self._check_initial(self._values.at(outer, node.inputs[index]))
        self._skips_row_0 = self._skips_row_0 or step.skips_row_0
        return names, source

    def _step(self, loop: Place, body: Frame, states: Sequence[int]) -> Step:
        # Which layer a state belongs to isn't known yet, but layers have equal units.
        num_units = max((layer.num_units for layer in self._roles.layers), default=1)
        return Step(self._values, loop, body, states, num_units, sum(array.size for array in self._all_weights()))

    @staticmethod
    def _is_time_major(node: Node) -> bool:
        given = any(attribute.text(1) == "time_major" for attribute in node.message.messages(5))
        return node.flag("time_major") or not given

    def _cudnn(self, place: Place) -> str:
        """Return the name of the layer that an operation of cuDNN is, as Keras writes it on a GPU."""
        node = place.made_by
        kinds = {name: node.attribute(name).text(2) for name in ("rnn_mode", "direction", "input_mode")}
        if (
            kinds["rnn_mode"] != "gru"
            or kinds["direction"] not in ("", "unidirectional")
            or kinds["input_mode"] not in ("", "linear_input", "auto_select")
            or self._values.input(place, 4).made_by.op not in ("Fill", "Const")  # lengths, which a mask computes
        ):
            raise self._values.refusal(place)
        numbers = self._step(place, Frame(place.frame.function, None), ()).value(self._values.input(place, 3))
        for layer in self._roles.layers:
            if is_cudnn(layer, numbers):
                self._check_initial(self._values.input(place, 1))
                return layer.name
        raise self._values.refusal(place, "with weights that are not those of a GRU layer")

    def _check_initial(self, start: Place) -> None:
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
                    raise self._values.refusal(place, "in an initial state that isn't zero")
            elif node.op == "Fill":
                waiting.append(self._values.input(place, 1))
            elif node.op in _LOOPS or node.op in ("TensorListStack", "MatMul"):
                raise self._values.refusal(place, "in an initial state, which must be zero")
            elif node.op == "ReadVariableOp":
                if any(self._values.is_array(place, one) for one in self._all_weights()):
                    raise self._values.refusal(place, "in an initial state, which must be zero")
            else:
                waiting += [self._values.input(place, index) for index in range(len(node.inputs))]

    def _all_weights(self) -> Iterator[Array]:
        roles = self._roles
        for layer in roles.layers:
            yield from (layer.inputs, layer.recurrent)
        yield from (one for one in (roles.embedding, roles.dense, roles.dense_bias) if one is not None)


def _scope_of_model(name: str) -> str:
    """Return what the names of a model's operations begin with, by that of its output layer's product."""
    layer = name.removesuffix("/MatMul").removesuffix("/Tensordot")
    scope, slash, _ = layer.rpartition("/")
    return scope + slash

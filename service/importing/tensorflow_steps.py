"""One step of a loop over positions, computed in numbers, and compared with a step of a GRU.

Programs write the same step in many ways. So its operations are not matched but computed, by a few operators of our
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.errors import InvalidModelFile
from service.importing.foreign import Array, ForeignLayer, shown
from service.importing.tensorflow_functions import MAX_CONSTANT, OPERATIONS, constant, num_computed, sigmoid, wide
from service.importing.tensorflow_values import Frame, Place, Values

_MAX_DEPTH = 200
_TOLERANCE = 1e-4


class Step:
    """The numbers of one step of a loop, for an input and states that are drawn.

    Args:
        values: of the graph.
        loop: the loop.
        body: a call of its body.
        states: the arguments of the body that are states.
        num_units: of each state, whichever layer it belongs to.
        num_weights: all numbers of the model.
    """

    def __init__(
        self, values: Values, loop: Place, body: Frame, states: Sequence[int], num_units: int, num_weights: int
    ) -> None:
        self._values, self._loop, self._body = values, loop, body
        self._random = np.random.default_rng(0)
        self.x: Array | None = None  # (1, I)
        self.source: Place | None = None  # of the inputs
        self._states = {index: position for position, index in enumerate(states)}
        self.skips_row_0 = False  # it leaves out positions with the id 0
        self.hidden = [self._draw(num_units) for _ in states]
        self._known: dict[tuple[int, str, int], Array] = {}
        # Operators repeat numbers (a sum of a column and a row), so that a small file could take any memory.
        self._num_left = 4 * num_weights + MAX_CONSTANT

    def _draw(self, length: int) -> Array:
        # Large enough that tanh and sigmoid differ from what is nearly the same around 0.
        return self._random.uniform(-4, 4, (1, length)).astype(np.float32)

    def value(self, place: Place, depth: int = 0) -> Array:
        """Return the numbers of a value. Raises UnsupportedModel for an operation that a GRU's step doesn't have."""
        node = place.node
        if depth > _MAX_DEPTH:
            raise InvalidModelFile("a step of the graph has more operations than that of any GRU")
        if node is None:
            if place.frame is self._body:
                return self._argument(place, depth)
            array = self._values.variable(place)
            if array is None:
                raise self._values.refusal(
                    place, f"in the loop {shown(self._loop.node.name if self._loop.node else '')}"
                )
            return wide(array)
        known = (id(place.frame), node.name, place.index)
        if known not in self._known:
            self._known[known] = self._compute(place, depth)
        return self._known[known]

    def _argument(self, place: Place, depth: int) -> Array:
        if place.index in self._states:
            return self.hidden[self._states[place.index]]
        outer = self._values.at(self._loop.frame, self._loop.made_by.inputs[place.index])
        return self.value(outer, depth + 1)

    def _compute(self, place: Place, depth: int) -> Array:
        node = place.made_by
        if node.op == "Const":
            return constant(node)
        if node.op == "ReadVariableOp":
            return self.value(self._values.input(place, 0), depth + 1)
        if node.op == "TensorListGetItem":
            return self._item(place)
        operation = OPERATIONS.get(node.op)
        if operation is None:
            raise self._values.refusal(place, "in the step of a GRU layer")
        values = [self.value(self._values.input(place, index), depth + 1) for index in range(len(node.inputs))]
        try:
            self._num_left -= num_computed(node, values)
            if self._num_left < 0:
                raise self._values.refusal(place, "with more numbers than a GRU's step has")
            found = operation(node, values)
        except (ValueError, IndexError, TypeError, ArithmeticError) as error:
            raise self._values.refusal(place, "with numbers that don't fit") from error
        return found[place.index] if isinstance(found, list) else found

    def _item(self, place: Place) -> Array:
        """Return the input of a step, or whether a position counts."""
        of_list = self._values.input(place, 0)
        if of_list.node is not None or of_list.frame is not self._body or self._loop.node is None:
            raise self._values.refusal(place, "in the step of a GRU layer")
        index = self._values.input(place, 1)  # a step must read the position at which the loop's counter is
        result = self._values.at(self._body, self._body.function.results[index.index]) if index.node is None else index
        if index.node is not None or result.node is None or not self._values.is_counter(result, index.index):
            raise self._values.refusal(place, "in another order than that of the text")
        start = self._values.constant(self._values.at(self._loop.frame, self._loop.node.inputs[index.index]))
        outer = self._values.at(self._loop.frame, self._loop.node.inputs[of_list.index])
        if start is None or start.any() or outer.node is None or outer.node.op != "TensorListFromTensor":
            raise self._values.refusal(outer, "as the input of a loop")
        source = self._values.input(outer, 0)
        if _is_mask(self._values, source):
            self.skips_row_0 = True
            return np.ones((1, 1), bool)
        if self.source is not None and self.x is not None:
            if source.node is not self.source.node:
                raise self._values.refusal(source, "as a second input of a loop")
        else:
            self.source = source
            shape = self._values.constant(self._values.input(outer, 1))
            last = int(shape.reshape(-1)[-1]) if shape is not None and shape.size else 0
            if not 0 < last <= MAX_CONSTANT:
                raise self._values.refusal(outer, "with inputs of an unknown size")
            self.x = self._draw(last)
        return self.x


def _is_mask(values: Values, place: Place) -> bool:
    """Return whether a value says at which positions the id is not 0."""
    for _ in range(16):
        node = place.node
        if node is None:
            return False
        if node.op == "NotEqual":
            zero = values.constant(values.input(place, 1))
            return zero is not None and not zero.any()
        if node.op not in ("Transpose", "ExpandDims", "Cast"):
            return False
        place = values.input(place, 0)
    return False


def fits(layer: ForeignLayer, inputs: Array, before: Array, after: Array) -> bool:
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
    return equal(after, np.asarray(expected))


def is_cudnn(layer: ForeignLayer, numbers: Array) -> bool:
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


def equal(one: Array, other: Array) -> bool:
    """Return whether numbers are equal but for rounding."""
    return one.shape == other.shape and bool(np.allclose(one, other, atol=_TOLERANCE, rtol=_TOLERANCE))


def _product(row: Array, rows: Array) -> Array:
    return np.asarray(row @ wide(rows).T)

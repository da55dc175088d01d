"""Functions of SavedModels, written as TensorFlow writes those of Keras models, with changes at named places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.importing.protobuf import field, write_varint
from tests.harness.foreign_models import KerasWeights, checkpointed, write_bundle

Change = Callable[["Function", str], str]  # adds operations to a function after a value; returns the changed value
_KEY = "/.ATTRIBUTES/VARIABLE_VALUE"
_FLOAT, _INT = 1, 3


def tensor(value: Any) -> bytes:
    """Return a TensorProto of numbers or texts."""
    array = np.asarray(value)
    shape = field(2, b"".join(field(2, field(1, length)) for length in array.shape))
    if array.dtype.kind in "US":
        return field(1, 7) + shape + b"".join(field(8, str(one)) for one in array.reshape(-1))
    kind = {"f": (_FLOAT, "<f4"), "i": (_INT, "<i4"), "b": (10, "?")}[array.dtype.kind]
    return field(1, kind[0]) + shape + field(4, array.astype(kind[1]).tobytes())


class Function:
    """A FunctionDef that is being written. Values are names of arguments and outputs, as TensorFlow writes them."""

    def __init__(self, name: str, args: Sequence[str]) -> None:
        self.name, self.args = name, list(args)
        self._nodes: list[bytes] = []
        self._numbers = itertools.count()

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add an operation; return its first output. Attributes: integers, flags, bytes of an AttrValue, functions."""
        name = name or f"{op}_{next(self._numbers)}"
        node = field(1, name) + field(2, op) + b"".join(field(3, one) for one in inputs)
        for key, value in attributes.items():
            if isinstance(value, bool):
                content = field(5, int(value))
            elif isinstance(value, int):
                content = field(3, value)
            elif isinstance(value, Function):
                content = field(10, field(1, value.name))
            else:
                content = bytes(value)
            node += field(5, field(1, key) + field(2, content))
        self._nodes.append(node)
        return f"{name}:output:0"

    def constant(self, value: Any) -> str:
        """Add a constant."""
        return self.add("Const", value=field(8, tensor(value)))

    def definition(self, *results: str) -> bytes:
        """Return the FunctionDef with these outputs."""
        names = [f"result_{index}" for index in range(len(results))]
        signature = field(1, self.name) + b"".join(field(2, field(1, arg)) for arg in self.args)
        signature += b"".join(field(3, field(1, name)) for name in names)
        returned = (field(4, field(1, name) + field(2, one)) for name, one in zip(names, results, strict=True))
        return field(1, signature) + b"".join(field(3, node) for node in self._nodes) + b"".join(returned)


def step(
    body: Function, x: str, h: str, variables: Sequence[str], units: int, activation: str = "Tanh",
    candidate: Change = lambda _, value: value,
) -> str:  # fmt: skip
    """Add a step of GRU(reset_after=True) as Keras writes it; return the new state."""
    kernel, recurrent, bias = variables
    biases = body.add("Split", body.constant(0), body.add("ReadVariableOp", bias), num_split=2)
    first, second = (body.add("Squeeze", biases[:-1] + str(index)) for index in range(2))
    of_input = body.add("BiasAdd", body.add("MatMul", x, body.add("ReadVariableOp", kernel)), first)
    of_state = body.add("AddV2", body.add("MatMul", h, body.add("ReadVariableOp", recurrent)), second)
    parts = body.add("Split", body.constant(-1), of_input, num_split=3)[:-1]

    def slice_of(index: int) -> str:
        begin, end = body.constant([0, index * units]), body.constant([0, (index + 1) * units])
        return body.add("StridedSlice", of_state, begin, end, body.constant([1, 1]), begin_mask=1, end_mask=1)

    update = body.add("Sigmoid", body.add("AddV2", parts + "0", slice_of(0)))
    reset = body.add("Sigmoid", body.add("AddV2", parts + "1", slice_of(1)))
    new = candidate(body, body.add("AddV2", parts + "2", body.add("Mul", reset, slice_of(2))))
    new = body.add(activation, new)
    rest = body.add("Sub", body.constant(1.0), update)
    return body.add("AddV2", body.add("Mul", update, h), body.add("Mul", rest, new))


def write_graph(
    folder: Path,
    weights: KerasWeights,
    *,
    changes: Mapping[str, Change] | None = None,
    order: Sequence[int] | None = None,
    tokens: Sequence[str] = (),
    activation: str = "Tanh",
    candidate: Change = lambda _, value: value,
    initial: float = 0.0,
    stacked: bool = False,
    is_served: bool = True,
    masked: bool = False,
    cudnn: Sequence[int] = (),
    unrolled: int = 0,
) -> Path:
    """Write a SavedModel with one function from ids to logits.

    Args:
        folder: that is made.
        weights: of the model.
        changes: place -> what is added there: `ids`, `embedding`, `gru_0` and so on, and `logits`.
        order: of the GRU layers in the function, by their numbers; one may be applied twice.
        tokens: of a lookup table of the graph.
        activation: the operation of the candidate state.
        candidate: what is added before that.
        initial: each number of the states before the first character.
        stacked: the layers are cells of one loop.
        is_served: the function is a signature.
        masked: the loops leave out positions with the id 0.
        cudnn: the gates in the order of an operation of cuDNN, which is written instead of loops; none for loops.
        unrolled: how many steps are written one by one instead of a loop; 0 for a loop.
    """
    changes = changes or {}
    count = len(weights.grus)
    arrays = checkpointed(weights, [f"gru_{index}" for index in range(count)])
    paths = sorted(key.removesuffix(_KEY) for key in arrays if "optimizer" not in key and "counter" not in key)
    function = Function("__inference_call_7", ["ids", *(path.replace("/", "_") for path in paths)])
    bodies: list[bytes] = []

    def variables(index: int) -> list[str]:
        return [f"model_gru_{index}_cell_{part}" for part in ("kernel", "recurrent_kernel", "bias")]

    def change(place: str, value: str) -> str:
        return changes[place](function, value) if place in changes else value

    def on_gpu(value: str, layer: int) -> str:
        """Add the operation that Keras writes where it finds a GPU."""
        kernel, recurrent, bias = (function.add("ReadVariableOp", name) for name in variables(layer))
        parts = []
        for matrix in (kernel, recurrent):
            gates = function.add("Split", function.constant(1), matrix, num_split=3)[:-1]
            parts += [function.add("Transpose", f"{gates}{gate}", function.constant([1, 0])) for gate in cudnn]
        flat = function.add("Reshape", bias, function.constant([-1]))
        gates = function.add("Split", function.constant(0), flat, num_split=6)[:-1]
        parts += [f"{gates}{gate + offset}" for offset in (0, 3) for gate in cudnn]
        rows = [function.add("Reshape", part, function.constant([-1])) for part in parts]
        state = function.add("Fill", function.constant([1, 1, 1]), function.constant(initial))
        lengths = function.add("Fill", function.constant([1]), function.constant(9))
        return function.add(
            "CudnnRNNV3", value, state, function.constant(0.0), function.add("ConcatV2", *rows, function.constant(0)),
            lengths, rnn_mode=field(2, "gru"), time_major=False, name=f"model/gru_{layer}/CudnnRNNV3",
        )  # fmt: skip

    def one_by_one(value: str, layer: int) -> str:
        """Add the steps of GRU(unroll=True)."""
        units = weights.grus[layer][1].shape[0]
        state = function.add("Fill", function.constant([1, units]), function.constant(initial))
        rows = function.add("Unpack", value, num=unrolled, axis=1)[:-1]
        states = [
            state := step(function, f"{rows}{index}", state, variables(layer), units) for index in range(unrolled)
        ]
        return function.add("Transpose", function.add("Pack", *states), function.constant([1, 0, 2]))

    def loop(value: str, layers: Sequence[int]) -> str:
        if cudnn:
            return on_gpu(value, layers[0])
        if unrolled:
            return one_by_one(value, layers[0])
        units = weights.grus[layers[0]][1].shape[0]
        captured = [name for layer in layers for name in variables(layer)]
        states = [f"state_{index}" for index in range(len(layers))]
        body = Function(
            f"while_body_{len(bodies)}", ["counter", "max", "time", "written", *states, "read", "mask", *captured]
        )
        one = body.constant(1)
        inner = body.add("TensorListGetItem", "read", "time", body.constant([-1]))
        new = []
        for state, layer in zip(states, layers, strict=True):
            inner = step(body, inner, state, variables(layer), units, activation, candidate)
            if masked:
                counts = body.add("TensorListGetItem", "mask", "time", body.constant([-1]))
                inner = body.add("SelectV2", body.add("Tile", counts, body.constant([1, 1])), inner, state)
            new.append(inner)
        results = [body.add("AddV2", "counter", one), "max", body.add("AddV2", "time", one)]
        results += [body.add("TensorListSetItem", "written", "time", inner), *new, "read", "mask", *captured]
        bodies.append(body.definition(*map(str, results)))
        size = weights.grus[layers[0]][0].shape[0]
        rows = function.add("Transpose", value, function.constant([1, 0, 2]))
        listed = function.add("TensorListFromTensor", rows, function.constant([-1, size]))
        counted = function.add("NotEqual", "ids", function.constant(0))
        counted = function.add("ExpandDims", counted, function.constant(-1))
        counted = function.add("Transpose", counted, function.constant([1, 0, 2]))
        mask = function.add("TensorListFromTensor", counted, function.constant([-1, 1]))
        zero = function.add("Fill", function.constant([1, units]), function.constant(initial))
        handle = function.add("TensorListReserve", function.constant([-1, units]), function.constant(9))
        start = [function.constant(0), function.constant(9), function.constant(0), handle]
        start += [*(zero for _ in layers), listed, mask, *captured]
        found = function.add("While", *start, body=body, name=f"model/gru_{layers[0]}/{len(bodies)}/while")
        stack = function.add("TensorListStack", found[:-1] + "3", function.constant([-1, units]))
        return function.add("Transpose", stack, function.constant([1, 0, 2]))

    ids = change("ids", function.add("Cast", "ids", SrcT=field(6, 9), DstT=field(6, _INT)))
    table = function.add("ReadVariableOp", "model_table__embeddings")
    value = change("embedding", function.add("GatherV2", table, ids, function.constant(0)))
    layers = list(range(count)) if order is None else list(order)
    for group in [layers] if stacked else [[layer] for layer in layers]:
        value = change(f"gru_{group[-1]}", loop(value, group))
    axes = function.add("ConcatV2", function.constant([0, 1]), function.constant([2]), function.constant(0))
    rows = function.add("Reshape", function.add("Transpose", value, axes), function.constant([-1, 1]))
    kernel = function.add("ReadVariableOp", "model_head__kernel")
    product = function.add("MatMul", rows, kernel, name="model/head/Tensordot/MatMul")
    product = function.add("Reshape", product, function.constant([1, -1, 1]), name="model/head/Tensordot")
    logits = function.add("BiasAdd", product, function.add("ReadVariableOp", "model_head_bias"))
    output = function.add("Identity", change("logits", logits))

    library = b"".join(field(1, one) for one in [*bodies, function.definition(output)])
    table_of_tokens = b""
    if tokens:
        for one in (list(tokens), [f"{path}{_KEY}" for path in paths]):  # the names in a checkpoint are texts too
            value_of = field(1, "value") + field(2, field(8, tensor(one)))
            table_of_tokens += field(1, field(1, "keys") + field(2, "Const") + field(5, value_of))
    saved, stored, bound = _objects(paths, function.name if is_served else None)
    concrete = field(1, function.name) + field(2, b"".join(field(2, one) for one in bound))
    graph = field(2, table_of_tokens + field(2, library)) + field(7, saved + field(2, concrete))
    (folder / "variables").mkdir(parents=True)
    text = write_varint(len(stored)) + bytes(4) + stored
    padded = np.frombuffer(text + bytes(-len(text) % 8), "<i8")
    write_bundle(folder / "variables" / "variables", arrays | {"_CHECKPOINTABLE_OBJECT_GRAPH": padded})
    (folder / "saved_model.pb").write_bytes(field(1, 1) + field(2, graph))
    return folder


def _objects(paths: Sequence[str], served: str | None) -> tuple[bytes, bytes, list[int]]:
    """Return a SavedObjectGraph without functions, a TrackableObjectGraph, and the objects of the variables."""
    children: list[dict[str, int]] = [{}]
    places: dict[int, str] = {}
    for path in paths:
        here = 0
        for part in path.split("/"):
            if part not in children[here]:
                children[here][part] = len(children)
                children.append({})
            here = children[here][part]
        places[here] = path
    saved, stored = [], []
    for index, named in enumerate(children):
        links = b"".join(field(1, field(1, child) + field(2, name)) for name, child in named.items())
        stored.append(links)
        if index in places:
            stored[-1] += field(2, field(1, "VARIABLE_VALUE") + field(3, places[index] + _KEY))
        saved.append(links + (field(7, field(1, _FLOAT)) if index in places else b""))
    if served is not None:
        first = len(saved)
        saved[0] += field(1, field(1, first) + field(2, "signatures"))
        saved += [field(1, field(1, first + 1) + field(2, "serving_default")), field(8, field(1, served))]
    return (
        b"".join(field(1, one) for one in saved),
        b"".join(field(1, one) for one in stored),
        [next(index for index, one in places.items() if one == path) for path in paths],
    )

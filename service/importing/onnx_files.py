"""ONNX files: the graph from the ids to the logits must be an embedding, GRU nodes and a product with the output layer.

Nodes between are followed if they only move numbers. Weights that the graph computes from constants, as exporters do to
bring gates into ONNX's order (z, r, n), are computed here by the few operators that this needs.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://onnx.ai/onnx/operators/onnx__GRU.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import NEEDED, Array, ForeignLayer, ForeignModel, shown
from service.importing.protobuf import FIXED32, Message, text_of
from service.importing.vocabulary import tokens_of_metadata

_MAX_NODES = 4096
_MAX_NAMES = 20_000  # inputs and outputs of all nodes
_MAX_STEPS = 1000  # nodes on the way from the output to the input
_FLOATS = {1: ("<f4", 4), 11: ("<f8", 10), 10: ("<f2", 5), 16: ("<u2", 5)}  # TensorProto.DataType: dtype, field
_CASTS = {1: "<f4", 11: "<f8", 10: "<f2", 7: "<i8", 6: "<i4"}
_INTS = {7: ("<i8", 7), 6: ("<i4", 5)}
_MOVES = {"Squeeze", "Unsqueeze", "Transpose", "Reshape", "Identity", "Cast", "Dropout", "Flatten", "Slice"}
_PROBABILITIES = {"Softmax", "LogSoftmax"}
_MAX_RANK = 8  # axes of a value
_EXTERNAL = 1  # data_location
_BEYOND = "a tensor of the file would be larger than the file"


@dataclass(frozen=True)
class _Node:
    """An operator of the graph."""

    op: str
    inputs: tuple[str, ...]  # names; empty for one that is left out
    outputs: tuple[str, ...]
    message: Message

    def attribute(self, name: str) -> Message | None:
        """Return an attribute, None if the node lacks it."""
        for attribute in self.message.messages(5):
            if attribute.bytes(1) == name.encode():
                return attribute
        return None


@dataclass(frozen=True)
class _Way:
    """How a value reaches a place of the graph."""

    source: _Node | None  # that makes it; None for an input of the graph
    name: str  # of the value that this node makes
    moves: tuple[_Node, ...]  # from the source on


def external_files(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that have weights of it. Raises InvalidModelFile, OSError."""
    graph = Message(memoryview(path.read_bytes())).message(7)
    names = {_location(tensor)[0] for tensor in graph.messages(5) if _is_external(tensor)}
    if len(names) > 16:
        raise InvalidModelFile(f"{shown(path.name)} has its weights in {len(names)} other files")
    return [path.parent / name for name in sorted(names)]


def read_onnx(path: Path) -> ForeignModel:
    """Read an ONNX file. Raises InvalidModelFile, UnsupportedModel, OSError."""
    # Arrays are views of these bytes.
    message = Message(memoryview(path.read_bytes()))
    graph = message.message(7)
    producer = f"{message.text(2)[:40]} {message.text(3)[:20]}".strip()
    metadata = {entry.text(1): entry.text(2) for entry, _ in zip(message.messages(14), range(256), strict=False)}
    reader = _Graph(graph, path)
    model = reader.model(f"onnx by {shown(producer)}" if producer else "onnx")
    return model.with_tokens(tokens_of_metadata(metadata, model.vocab_size))


class _Graph:
    """The graph of a file."""

    def __init__(self, graph: Message, path: Path) -> None:
        self._path = path
        external = [file.stat().st_size for file in external_files(path)]
        self._bytes_left = path.stat().st_size + sum(external)  # that tensors and what is computed of them may take
        self._bytes_left *= 2
        self._tensors: dict[str, Message] = {}
        for tensor in graph.messages(5):
            self._tensors[tensor.text(8)] = tensor
            self._check_count(self._tensors)
        self._producers: dict[str, _Node] = {}
        self.nodes: list[_Node] = []
        num_names = 0
        for item in graph.messages(1):
            node = _node(item)
            self.nodes.append(node)
            self._check_count(self.nodes)
            num_names += len(node.inputs) + len(node.outputs)
            if num_names > _MAX_NAMES:
                raise InvalidModelFile(f"{shown(path.name)} has more names than any model")
            for output in node.outputs:
                self._producers[output] = node
        self._shapes = {  # of the inputs: lengths, None for a free one
            item.text(1): [dim.integer(1) or None for dim in item.message(2).message(1).message(2).messages(1)]
            for item, _ in zip(graph.messages(11), range(64), strict=False)
        }
        self._outputs = [text_of(item.bytes(1)) for item in graph.messages(12)]
        self._constants: dict[str, Array | None] = {}

    def _check_count(self, items: Any) -> None:
        if len(items) > _MAX_NODES:
            raise InvalidModelFile(f"{shown(self._path.name)} has more nodes than any model")

    def model(self, library: str) -> ForeignModel:
        """Return the model. Raises UnsupportedModel, InvalidModelFile."""
        recurrent = [node for node in self.nodes if node.op in ("GRU", "LSTM", "RNN")]
        for node in recurrent:
            if node.op != "GRU":
                raise UnsupportedModel(f"the graph has an {node.op} node; {NEEDED} is needed: train it with GRU layers")
        if not recurrent:
            scan = next((node.op for node in self.nodes if node.op in ("Scan", "Loop")), None)
            more = f": it has a {scan} node instead, so export it with its GRU layers as they are" if scan else ""
            raise UnsupportedModel(f"the graph has no GRU node{more}; {NEEDED} is needed")
        if any(node.op in ("Attention", "MultiHeadAttention") for node in self.nodes):
            raise UnsupportedModel(f"the graph has attention; {NEEDED} is needed")
        found = [end for name in self._outputs if (end := self._output_layer(name)) is not None]
        if len(found) != 1:
            raise UnsupportedModel(f"{len(found)} outputs of the graph are those of a dense layer; {NEEDED} is needed")
        dense, bias, name = found[0]
        layers: list[ForeignLayer] = []
        nodes: list[_Node] = []
        while (way := self._way(name)).source is not None and way.source.op == "GRU":
            if layers:
                self._check_sequence(way, layers[-1], nodes[-1])
            layers.append(self._layer(way.source))
            nodes.append(way.source)
            name = way.source.inputs[0]
            if len(layers) > len(recurrent):
                raise InvalidModelFile("the graph goes in circles: the file is damaged")
        if len(layers) != len(recurrent):
            raise UnsupportedModel(
                f"{len(recurrent) - len(layers)} GRU nodes don't follow one another; {NEEDED} is needed"
            )
        layers.reverse()
        embedding = self._embedding(way.source)
        self._check_sequence(way, layers[0], nodes[-1])
        if embedding is not None and embedding.shape[0] != dense.shape[0]:
            raise UnsupportedModel(
                f"the embedding has {embedding.shape[0]} rows and the output layer {dense.shape[0]}: both "
                "must know the same characters"
            )
        sizes = [dense.shape[0] if embedding is None else embedding.shape[1], *(layer.num_units for layer in layers)]
        if [layer.num_inputs for layer in layers] != sizes[:-1] or dense.shape[1] != sizes[-1]:
            raise UnsupportedModel(f"the sizes of the layers don't fit together; {NEEDED} is needed")
        return ForeignModel("ONNX model", library, embedding, tuple(layers), dense, bias)

    def _way(self, name: str) -> _Way:
        """Return the node that makes what a name means, and the nodes between, which only move numbers."""
        moves: list[_Node] = []
        for _ in range(_MAX_STEPS):
            node = self._producers.get(name)
            if node is None or not node.inputs or not (node.op in _MOVES or self._takes_last(node)):
                return _Way(node, name, tuple(reversed(moves)))
            moves.append(node)
            name = node.inputs[0]
        raise InvalidModelFile("the graph goes in circles: the file is damaged")

    def _check_sequence(self, way: _Way, layer: ForeignLayer, node: _Node) -> None:
        """Raise UnsupportedModel if a layer doesn't read position after position of all that precedes it."""
        axes = self._moved(way, self._axes_of(way), layer.num_inputs, is_sequence=True)
        if (
            len(axes) != 3
            or axes[-1] != "units"
            or (way.source is not None and way.source.op == "GRU" and axes[0] != "time")
        ):
            raise UnsupportedModel(
                f"the input of {layer.name} isn't the sequence before it: its axes are exchanged or mixed; "
                f"{NEEDED} is needed"
            )

        lengths = self._length("batch"), self._length("time")
        if axes[0] == "batch" and lengths[0] == 1 and (lengths[1] or 1) > 1:
            raise UnsupportedModel(
                f"{layer.name} reads the first axis of the ids as positions, and that has only one: export the model "
                "with ids of the shape that it was trained with"
            )
        if len(node.inputs) > 4 and node.inputs[4]:
            self._check_lengths(node.inputs[4], axes[0], layer.name)

    def _check_lengths(self, name: str, positions: str, layer: str) -> None:
        """Raise UnsupportedModel if a layer may end before the last position. What it gives is then zeros.

        Args:
            name: of the lengths, one for each text.
            positions: the axis of the ids that the layer reads as positions.
            layer: its name.
        """
        lengths, length = self._constant(name), self._length(positions)
        is_whole = (
            set(self._measured_axes(name)) == {positions}
            if lengths is None
            else length is not None and bool((lengths == length).all())
        )
        if not is_whole:
            raise UnsupportedModel(
                f"{layer} has sequence_lens ({shown(name)}), so it may end before the last position: export the model "
                "without lengths and masks, for example without pack_padded_sequence"
            )

    def _measured_axes(self, name: str) -> list[str]:
        """Return the axes whose lengths a value consists of; none if it is computed in another way."""
        selections: list[_Node] = []
        node = self._producers.get(name)
        while node is not None and node.op != "Shape" and len(selections) < _MAX_STEPS:
            if node.op not in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity", "Expand", "Tile"):
                return []
            selections.append(node)
            node = self._producers.get(node.inputs[0]) if node.inputs else None
        if node is None or node.op != "Shape" or not node.inputs:
            return []
        way = self._way(node.inputs[0])
        rank = len(self._shapes.get(way.name, [])) if way.source is None else 3
        axes = self._moved(way, self._axes_of(way) if rank > 2 else ["batch", "time"][2 - rank :], 0, is_sequence=True)
        for node in reversed(selections):
            values = [self._constant(one) if one else None for one in node.inputs[1:5]] + [None] * 4
            if node.op == "Gather":
                places = [] if values[0] is None else [int(place) for place in values[0].reshape(-1)[:_MAX_RANK]]
                axes = [axes[place] for place in places]
            elif node.op == "Slice":
                starts, ends = _ints(node, "starts", values[0]), _ints(node, "ends", values[1])
                is_plain = len(starts) == len(ends) == 1 and _ints(node, "steps", values[3]) in ([], [1])
                axes = axes[starts[0] : ends[0]] if is_plain else []
        return axes

    def _axes_of(self, way: _Way) -> list[str]:
        """Return what the axes of a value are before it is moved."""
        if way.source is None or way.source.op != "GRU":
            return [*(["batch", "time"] if self._rank_of_ids(way) != 1 else ["time"]), "units"]
        whole = ["time", "one", "batch", "units"]
        return whole if way.source.outputs[0] == way.name else whole[1:]

    def _rank_of_ids(self, way: _Way) -> int | None:
        if way.source is None or len(way.source.inputs) < 2:
            return None
        return len(self._shapes[way.source.inputs[1]]) if way.source.inputs[1] in self._shapes else None

    def _moved(self, way: _Way, axes: list[str], num_units: int, is_sequence: bool) -> list[str]:
        """Return what the axes of a value are after it is moved. Raises UnsupportedModel if numbers are mixed.

        is_sequence: a GRU reads it, so that no position may be left out. Otherwise each row counts alone.
        """
        for node in way.moves:
            problem = UnsupportedModel(
                f"the graph has a node of the kind {shown(node.op)} "
                f"({shown(node.outputs[0] if node.outputs else '')}) that mixes or leaves out numbers between the "
                f"layers; {NEEDED} is needed"
            )
            constant = self._constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
            if node.op == "Transpose":
                order = _ints(node, "perm", None) or list(range(len(axes)))[::-1]
                if sorted(order) != list(range(len(axes))):
                    raise problem
                axes = [axes[index] for index in order]
            elif node.op in ("Squeeze", "Unsqueeze"):
                listed = _ints(node, "axes", constant)
                rank = len(axes) + (len(listed) if node.op == "Unsqueeze" else 0)
                places = sorted(index % rank for index in listed) if rank else []
                if node.op == "Unsqueeze":
                    for place in places:
                        axes = [*axes[:place], "one", *axes[place:]]
                else:
                    if any(axes[place] == "units" for place in places):
                        raise problem
                    axes = [
                        axis for index, axis in enumerate(axes) if index not in places and (places or axis != "one")
                    ]
            elif node.op in ("Reshape", "Flatten"):
                axes = self._reshaped(constant, axes, num_units, is_sequence, problem)
            elif node.op == "Slice":
                self._check_slice(node, axes, is_sequence, problem)
            elif node.op == "Gather":
                place = _int(node, "axis") % len(axes)
                if is_sequence or axes[place] == "units":
                    raise problem
                axes = axes[:place] + axes[place + 1 :]
        return axes

    def _check_slice(self, node: _Node, axes: list[str], is_sequence: bool, problem: UnsupportedModel) -> None:
        """Raise `problem` if a Slice turns an axis around, or leaves out numbers that count."""
        values = [None, *(self._constant(one) if one else None for one in node.inputs[1:5]), None, None, None, None]
        starts, ends = _ints(node, "starts", values[1]), _ints(node, "ends", values[2])
        places = [index % len(axes) for index in _ints(node, "axes", values[3]) or range(len(starts))]
        steps = _ints(node, "steps", values[4]) or [1] * len(starts)
        is_whole = all(start == 0 for start in starts) and all(end >= 1 << 30 for end in ends)
        if any(one < 1 for one in steps) or not starts:
            raise problem
        if not (is_whole and set(steps) == {1}) and (is_sequence or any(axes[place] == "units" for place in places)):
            raise problem

    def _reshaped(
        self,
        shape: Array | None,
        axes: list[str],
        num_units: int,
        is_sequence: bool,
        problem: UnsupportedModel,
    ) -> list[str]:
        """Return the axes after a Reshape, which may merge rows or leave out axes of length one."""
        if axes[-1] != "units":
            raise problem
        lengths = None if shape is None else [int(one) for one in shape.reshape(-1)[:8]]
        if lengths is not None and (not lengths or lengths[-1] not in (-1, 0, num_units)):
            raise problem
        kept = [axis for axis in axes if axis != "one"]
        if is_sequence:
            known = {"batch": self._length("batch"), "time": self._length("time")}
            if len(kept) != 3 or (lengths is not None and len(lengths) != 3) or (lengths is None and len(axes) != 4):
                raise problem
            for axis, length in zip(kept[:2], lengths or [], strict=False):
                if length > 0 and known[axis] not in (None, length):
                    raise problem
            return kept
        if lengths is not None and len(lengths) == len(kept):
            return kept
        return ["row"] * (1 if lengths is None else len(lengths) - 1) + ["units"]

    def _length(self, axis: str) -> int | None:
        """Return the length of an axis of the ids, None if it is free."""
        shape = next((shape for shape in self._shapes.values() if len(shape) == 2), None)
        return None if shape is None else shape[("batch", "time").index(axis)]

    def _takes_last(self, node: _Node) -> bool:
        """Return whether a node selects the last of something that the graph computes, such as the last position."""
        if node.op != "Gather" or len(node.inputs) != 2 or self._constant(node.inputs[0]) is not None:
            return False
        index = self._constant(node.inputs[1])
        return index is not None and index.dtype.kind == "i" and index.tolist() in (-1, [-1])

    def _output_layer(self, name: str) -> tuple[Array, Array | None, str] | None:
        """Return weight (V, H), bias (V,) and the name of the input of the dense layer that makes an output.

        Returns None for another output, such as the state.
        """
        ways = [self._way(name)]  # from the output backwards
        node = ways[-1].source
        softmax: _Node | None = None
        if node is not None and node.op in _PROBABILITIES:
            softmax = node
            ways.append(self._way(node.inputs[0]))
            node = ways[-1].source
        bias: Array | None = None
        if node is not None and node.op == "Add":
            constants = [self._constant(one) for one in node.inputs]
            if (constants[0] is None) == (constants[1] is None):
                raise UnsupportedModel(f"the graph adds two layers to each other; {NEEDED} is needed")
            bias = constants[0] if constants[1] is None else constants[1]
            ways.append(self._way(node.inputs[0 if constants[0] is None else 1]))
            node = ways[-1].source
        if node is None or node.op in ("GRU", "Concat", "Shape", "Constant"):
            return None
        weight, bias = self._dense(node, bias)
        way = self._way(node.inputs[0])
        before = way.source
        if before is None or before.op != "GRU":
            what = shown(before.op) if before is not None else "no node"
            raise UnsupportedModel(f"{what} precedes the output layer, where a GRU must; {NEEDED} is needed")
        axes = self._moved(way, self._axes_of(way), weight.shape[1], is_sequence=False)
        if axes[-1] != "units":
            raise UnsupportedModel(f"the output layer reads another axis than that of the units; {NEEDED} is needed")
        for between in reversed(ways):
            axes = self._moved(between, axes, weight.shape[0], is_sequence=False)
            if softmax is not None and between is ways[1]:  # what the softmax reads
                place = softmax.attribute("axis")
                if place is not None and axes[place.integer(3) % len(axes)] != "units":
                    raise UnsupportedModel(
                        f"a softmax is over another axis than that of the characters; {NEEDED} is needed"
                    )
        return weight, bias, node.inputs[0]

    def _dense(self, node: _Node, bias: Array | None) -> tuple[Array, Array | None]:
        """Return weight (V, H) and bias (V,) of a product. bias: what a node after it adds."""
        if node.op == "Gemm":
            if (
                bias is not None
                or _float(node, "alpha", 1) != 1
                or _float(node, "beta", 1) != 1
                or _int(node, "transA")
            ):
                raise UnsupportedModel(f"the output layer is a Gemm node of another kind; {NEEDED} is needed")
            weight = self._constant(node.inputs[1])
            bias = self._constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
            weight = weight if weight is None or _int(node, "transB") else weight.T
        elif node.op == "MatMul":
            weight = self._constant(node.inputs[1])
            weight = None if weight is None else weight.T
        else:
            raise UnsupportedModel(f"an output is made by a node of the kind {shown(node.op)}; {NEEDED} is needed")
        if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
            raise UnsupportedModel(f"the output layer has no constant weights; {NEEDED} is needed")
        if bias is not None:
            bias = bias.reshape(-1)
            if bias.shape != weight.shape[:1]:
                raise InvalidModelFile("the bias of the output layer has another shape than its weights")
        return weight, bias

    def _layer(self, node: _Node) -> ForeignLayer:
        """Return the layer of a GRU node. Raises UnsupportedModel, InvalidModelFile."""
        name = shown(node.outputs[0] if node.outputs else "GRU")
        if not _int(node, "linear_before_reset"):
            raise UnsupportedModel(
                f"{name} has linear_before_reset=0: its reset gate acts before the recurrent product, which is another "
                "function. Train it with a reset gate after it, as nn.GRU and Keras's GRU(reset_after=True) have"
            )
        if _int(node, "layout"):
            raise UnsupportedModel(f"{name} has layout=1: export it with positions as the first axis")
        direction = _text(node, "direction", "forward")
        if direction != "forward":
            raise UnsupportedModel(f"{name} is {shown(direction)}: a text is generated forwards, from its beginning")
        if (listed := node.attribute("activations")) is not None:
            activations = [text_of(one) for one, _ in zip(listed.all(9), range(8), strict=False)]
            if [one.lower() for one in activations] != ["sigmoid", "tanh"]:
                raise UnsupportedModel(
                    f"{name} has the activations {shown(', '.join(activations[:4]))}: train it with tanh"
                )
        if node.attribute("clip") is not None:
            raise UnsupportedModel(f"{name} clips its gates, which this service's models don't do")
        if len(node.inputs) > 5 and self._has_numbers(node.inputs[5]):
            raise UnsupportedModel(
                f"{name} has an initial state that was learnt, which this service's models don't have"
            )
        weights = [self._constant(one) if one else None for one in node.inputs[1:4]]
        inputs, recurrent = weights[0], weights[1]
        bias = weights[2] if len(weights) > 2 else None
        if inputs is None or recurrent is None or (len(node.inputs) > 3 and node.inputs[3] and bias is None):
            raise UnsupportedModel(f"{name} has weights that the graph computes from its inputs; {NEEDED} is needed")
        units = recurrent.shape[-1]
        if inputs.ndim != 3 or inputs.shape[:2] != (1, 3 * units) or recurrent.shape != (1, 3 * units, units):
            raise InvalidModelFile(f"{name} has weights of the shapes {list(inputs.shape)} and {list(recurrent.shape)}")
        if bias is not None and bias.shape != (1, 6 * units):
            raise InvalidModelFile(f"{name} has a bias of the shape {list(bias.shape)}")
        of_input, of_recurrent = (None, None) if bias is None else (bias[0, : 3 * units], bias[0, 3 * units :])
        return ForeignLayer(name, inputs[0], recurrent[0], of_input, of_recurrent, "zrn")

    def _has_numbers(self, name: str) -> bool:
        """Return whether constants other than zeros and shapes have a part in a value."""
        waiting, seen = [name], {name, ""}
        for _ in range(_MAX_STEPS):
            if not waiting:
                return False
            one = waiting.pop()
            value = self._constant(one) if one else None
            if value is not None:
                if value.dtype.kind == "f" and value.any():
                    return True
                continue
            node = self._producers.get(one)
            if node is None or node.op in ("Shape", "Size", "GRU"):
                continue
            if node.op == "ConstantOfShape" and (filling := node.attribute("value")) is not None:
                if self._tensor(filling.message(5)).any():
                    return True
                continue
            waiting += [source for source in node.inputs if source not in seen]
            seen.update(node.inputs)
        raise InvalidModelFile("an initial state is computed in too many steps")

    def _embedding(self, node: _Node | None) -> Array | None:
        """Return the table of the node that makes the first layer's input; None if that is one-hot."""
        if node is None:
            return None  # an input of the graph
        if node.op == "Gather" and _int(node, "axis") == 0:
            table = self._constant(node.inputs[0])
            if table is not None and table.ndim == 2 and table.dtype.kind == "f":
                self._check_ids(node.inputs[1])
                return table
        if node.op == "OneHot":
            values = self._constant(node.inputs[2])
            if values is not None and values.tolist() == [0, 1]:
                self._check_ids(node.inputs[0])
                return None
        if node.op == "Equal":  # one-hot, as newer exporters write it
            numbers = self._constant(node.inputs[1])
            if numbers is not None and np.array_equal(numbers.reshape(-1), np.arange(numbers.size)):
                self._check_ids(node.inputs[0])
                return None
        raise UnsupportedModel(
            f"the input of the first GRU is made by a node of the kind {shown(node.op)}, where an embedding must be; "
            f"{NEEDED} is needed"
        )

    def _check_ids(self, name: str) -> None:
        """Raise UnsupportedModel if ids are changed before the embedding."""
        node = self._producers.get(name)
        for _ in range(_MAX_STEPS):
            if node is None:
                return
            if node.op == "Where" and len(node.inputs) == 3:  # negative ids count from the end
                condition = self._producers.get(node.inputs[0])
                zero = self._constant(condition.inputs[1]) if condition is not None and condition.op == "Less" else None
                if condition is None or zero is None or zero.any() or condition.inputs[0] != node.inputs[2]:
                    break
                node = self._producers.get(node.inputs[2])
            elif node.op in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
                node = self._producers.get(node.inputs[0])
            else:
                break
        raise UnsupportedModel(
            f"the ids are changed by a node of the kind {shown(node.op if node else '')} before the embedding; "
            f"{NEEDED} is needed"
        )

    # Constants

    def _constant(self, name: str, depth: int = 0) -> Array | None:
        """Return the value of a name if it depends on no input of the graph, else None. Raises InvalidModelFile."""
        if name in self._constants:
            return self._constants[name]
        if depth > 32:
            raise InvalidModelFile("the weights of the graph are computed in too many steps")
        value: Array | None = None
        if name in self._tensors:
            value = self._tensor(self._tensors[name])
        elif (node := self._producers.get(name)) is not None:
            self._constants[name] = None  # until it is known: a circle ends here
            value = self._compute(node, depth)
        if value is not None and name not in self._tensors:
            self._take(value.nbytes)
        self._constants[name] = value
        return value

    def _compute(self, node: _Node, depth: int) -> Array | None:
        if node.op == "Constant":
            attribute = node.attribute("value")
            if attribute is not None:
                return self._tensor(attribute.message(5))
            for key in ("value_int", "value_ints"):
                if (found := node.attribute(key)) is not None:
                    return np.array([found.integer(3)] if key == "value_int" else found.integers(8, 4096), np.int64)
            return None
        operation = _OPERATIONS.get(node.op)
        if operation is None or len(node.inputs) > 64:
            return None
        values = [self._constant(one, depth + 1) if one else None for one in node.inputs]
        if any(value is None for value, one in zip(values, node.inputs, strict=True) if one):
            return None
        self._take(sum(value.nbytes for value in values if value is not None) if node.op == "Concat" else 0)
        return operation(node, values)

    def _take(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise InvalidModelFile("the weights of the graph take more memory than the file")

    def _tensor(self, tensor: Message) -> Array:
        """Return the value of a TensorProto. Raises InvalidModelFile."""
        shape = tuple(tensor.integers(1, 16))
        kind = tensor.integer(2)
        if any(length < 0 for length in shape):
            raise InvalidModelFile("a tensor of the file has a negative size")
        if kind not in _FLOATS and kind not in _INTS:
            raise UnsupportedModel(f"a tensor of the file has numbers of the kind {kind}, such as quantised ones")
        dtype, number = _FLOATS[kind] if kind in _FLOATS else _INTS[kind]
        size = math.prod(shape) * int(dtype[2:])
        if size > self._bytes_left:
            raise InvalidModelFile(_BEYOND)
        self._take(size)
        if _is_external(tensor):
            numbers = self._external(tensor, dtype, size)
        elif len(raw := tensor.bytes(9)):
            numbers = np.frombuffer(raw, dtype)
        elif kind in (1, 11):
            numbers = tensor.numbers(number, dtype)
        else:
            numbers = np.array(tensor.integers(number, math.prod(shape)), np.int64).astype(
                "<u2" if kind in (10, 16) else dtype
            )
            numbers = numbers.view("<f2") if kind == 10 else numbers
        if kind == 16:
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        if numbers.size != math.prod(shape):
            raise InvalidModelFile(f"a tensor of the shape {list(shape)[:8]} has {numbers.size:,} numbers")
        return numbers.reshape(shape)

    def _external(self, tensor: Message, dtype: str, size: int) -> Array:
        name, offset, length = _location(tensor)
        path = self._path.parent / name
        if not path.is_file() or offset < 0 or offset + size > path.stat().st_size or length not in (None, size):
            raise InvalidModelFile(f"weights of the file would be beyond the end of {shown(name)}")
        with path.open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(size), dtype)


def _node(message: Message) -> _Node:
    inputs, outputs = (
        tuple(text_of(one) for one, _ in zip(message.all(number), range(256), strict=False)) for number in (1, 2)
    )
    return _Node(message.text(4), inputs, outputs, message)


def _is_external(tensor: Message) -> bool:
    return tensor.integer(14) == _EXTERNAL


def _location(tensor: Message) -> tuple[str, int, int | None]:
    """Return file name, offset and length of a tensor's numbers. Raises InvalidModelFile."""
    entries = {entry.text(1): entry.text(2) for entry, _ in zip(tensor.messages(13), range(16), strict=False)}
    name = entries.get("location", "")
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise InvalidModelFile(f"the weights are in {shown(name)!r}; they are read only from beside the file")
    numbers = {key: entries[key] for key in ("offset", "length") if key in entries}
    if any(not value.isascii() or not value.isdecimal() or len(value) > 18 for value in numbers.values()):
        raise InvalidModelFile(f"the place of weights in {shown(name)} is no number")
    return name, int(numbers.get("offset", 0)), int(numbers["length"]) if "length" in numbers else None


def _int(node: _Node, name: str, default: int = 0) -> int:
    attribute = node.attribute(name)
    return attribute.integer(3, 0) if attribute is not None else default


def _float(node: _Node, name: str, default: float) -> float:
    attribute = node.attribute(name)
    if attribute is None:
        return default
    for number, wire, value in attribute.fields():
        if number == 2 and wire == FIXED32 and not isinstance(value, int):
            return float(np.frombuffer(value, "<f4")[0])
    return 0.0


def _text(node: _Node, name: str, default: str) -> str:
    attribute = node.attribute(name)
    return attribute.text(4) if attribute is not None else default


def _ints(node: _Node, name: str, value: Array | None) -> list[int]:
    """Return a list of integers, which older versions have as an attribute and newer ones as an input."""
    if value is not None:
        return [int(one) for one in value.reshape(-1)[:16]]
    attribute = node.attribute(name)
    return attribute.integers(8, 16) if attribute is not None else []


def _slice(node: _Node, values: list[Array | None]) -> Array:
    data = _needed(values[0])
    padded = values + [None] * 5
    starts, ends = _ints(node, "starts", padded[1]), _ints(node, "ends", padded[2])
    axes = _ints(node, "axes", padded[3]) or list(range(len(starts)))
    steps = _ints(node, "steps", padded[4]) or [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _squeeze(node: _Node, values: list[Array | None]) -> Array:
    axes = _ints(node, "axes", values[1] if len(values) > 1 else None)
    return np.squeeze(_needed(values[0]), tuple(axes) if axes else None)


def _unsqueeze(node: _Node, values: list[Array | None]) -> Array:
    return np.expand_dims(_needed(values[0]), tuple(_ints(node, "axes", values[1] if len(values) > 1 else None)))


def _transpose(node: _Node, values: list[Array | None]) -> Array:
    return np.transpose(_needed(values[0]), _ints(node, "perm", None) or None)


def _cast(node: _Node, values: list[Array | None]) -> Array:
    data, kind = _needed(values[0]), _int(node, "to")
    if kind not in _CASTS:
        raise UnsupportedModel(f"the graph casts constants to numbers of the kind {kind}")
    target = np.dtype(_CASTS[kind])
    # To widen a number doesn't change it, and would take memory.
    return data if data.dtype.kind == target.kind and data.itemsize <= target.itemsize else data.astype(target)


def _concat(node: _Node, values: list[Array | None]) -> Array:
    return np.concatenate([_needed(value) for value in values], _int(node, "axis"))


def _reshape(_: _Node, values: list[Array | None]) -> Array:
    data, shape = _needed(values[0]), [int(one) for one in _needed(values[1]).reshape(-1)[:16]]
    return data.reshape([data.shape[index] if length == 0 else length for index, length in enumerate(shape)])


def _same(_: _Node, values: list[Array | None]) -> Array:
    return _needed(values[0])


def _needed(value: Array | None) -> Array:
    if value is None:
        raise InvalidModelFile("a node of the graph lacks an input")
    return value


_OPERATIONS = {
    "Identity": _same, "Slice": _slice, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Transpose": _transpose,
    "Concat": _concat, "Reshape": _reshape, "Cast": _cast,
}  # fmt: skip

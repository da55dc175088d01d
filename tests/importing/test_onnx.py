"""ONNX files: what is imported computes what was written; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.detection import read_foreign
from service.importing.protobuf import field
from tests.harness.foreign_models import (
    CHARSET,
    UNITS,
    Array,
    KerasWeights,
    imported_log_probs,
    keras_log_probs,
    keras_weights,
)

IDS = np.random.default_rng(1).integers(0, len(CHARSET), 40)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | str | list[int]) -> bytes:
    """A node of a graph, as the field of the graph."""
    body = b"".join(field(1, name) for name in inputs) + b"".join(field(2, name) for name in outputs) + field(4, op)
    for name, value in attributes.items():
        if isinstance(value, int):
            content = field(3, value)
        elif isinstance(value, str):
            content = field(4, value)
        else:
            content = b"".join(field(8, one) for one in value)
        body += field(5, field(1, name) + content)
    return field(1, body)


def tensor(name: str, array: Array, *, external: tuple[str, int] | None = None, packed: bool = False) -> bytes:
    """A constant of a graph, as the field of the graph."""
    kind = {"f4": 1, "f8": 11, "f2": 10, "i8": 7}[array.dtype.str[1:]]
    body = b"".join(field(1, length) for length in array.shape) + field(2, kind) + field(8, name)
    if external is not None:
        for key, value in (("location", external[0]), ("offset", str(external[1])), ("length", str(array.nbytes))):
            body += field(13, field(1, key) + field(2, value))
        return field(5, body + field(14, 1))
    return field(5, body + field(4 if packed else 9, np.ascontiguousarray(array).tobytes()))


def graph(weights: KerasWeights, make: Callable[..., bytes] = tensor, **gru: int | str) -> list[bytes]:
    """The parts of a graph as the exporter of PyTorch writes them; the weights are those of a Keras model."""
    attributes = {"hidden_size": UNITS, "linear_before_reset": 1} | gru
    parts = [
        make("emb", weights.embedding),
        node("Gather", ["emb", "ids"], ["e"]),
        node("Transpose", ["e"], ["x0"], perm=[1, 0, 2]),
    ]
    for index, (kernel, recurrent, bias) in enumerate(weights.grus):
        arrays = {"W": kernel.T[None], "R": recurrent.T[None], "B": bias.reshape(1, -1)}
        parts += [make(f"{name}{index}", array) for name, array in arrays.items()]
        inputs = [f"x{index}", *(f"{name}{index}" for name in arrays), "", "state"]
        parts += [node("GRU", inputs, [f"y{index}", f"h{index}"], **attributes)]
        parts += [node("Squeeze", [f"y{index}"], [f"x{index + 1}"], axes=[1])]
    parts += [make("w", weights.dense), make("b", weights.bias)]
    parts += [node("MatMul", [f"x{len(weights.grus)}", "w"], ["product"]), node("Add", ["b", "product"], ["sum"])]
    return [*parts, node("Transpose", ["sum"], ["logits"], perm=[1, 0, 2])]


OUTPUTS = field(12, field(1, "logits")) + field(12, field(1, "h0"))


def write(path: Path, parts: Sequence[bytes], outputs: bytes = OUTPUTS, metadata: bytes = b"") -> Path:
    model = field(1, 9) + field(2, "pytorch") + field(3, "2.13.0") + field(7, b"".join(parts) + outputs)
    path.write_bytes(model + metadata)
    return path


def same(path: Path, weights: KerasWeights, charset: str | None = CHARSET) -> None:
    np.testing.assert_allclose(imported_log_probs(path, charset)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_onnx__gives_what_its_graph_computes(tmp_path: Path, num_layers: int) -> None:
    weights = keras_weights(num_layers)
    metadata = field(14, field(1, "chars") + field(2, CHARSET))
    same(write(tmp_path / "a.onnx", graph(weights), metadata=metadata), weights, None)
    packed = graph(weights, lambda name, array: tensor(name, array, packed=True))
    packed += [node("LogSoftmax", ["logits"], ["p"])]
    same(write(tmp_path / "b.onnx", packed, field(12, field(1, "p"))), weights)


def test_onnx__weights_that_the_graph_computes_from_constants(tmp_path: Path) -> None:
    weights = keras_weights()
    ((kernel, _, _),) = weights.grus
    z, r, h = np.split(kernel.T, 3)
    parts = [one for one in graph(weights) if b"W0" not in one or b"GRU" in one]
    parts = [one for one in parts if not one.endswith(tensor("w", weights.dense)[-20:])]
    names = {
        "starts": np.array([0]),
        "middle": np.array([UNITS]),
        "two": np.array([2 * UNITS]),
        "end": np.array([9999]),
    }
    parts += [tensor("rzn", np.concatenate((r, z, h))), tensor("axis", np.array([0]))]
    parts += [tensor(name, value) for name, value in names.items()]
    parts += [
        node("Slice", ["rzn", "starts", "middle", "axis"], ["r"]),
        node("Slice", ["rzn", "middle", "two", "axis"], ["z"]),
        node("Slice", ["rzn", "two", "end", "axis"], ["n"]),
        node("Concat", ["z", "r", "n"], ["zrn"], axis=0),
        node("Unsqueeze", ["zrn", "axis"], ["W0"]),
        tensor("wt", weights.dense.T),
        node("Transpose", ["wt"], ["w"], perm=[1, 0]),
    ]
    same(write(tmp_path / "a.onnx", parts), weights)


def test_onnx__gemm_one_hot_and_weights_beside_the_file(tmp_path: Path) -> None:
    weights = keras_weights(dim=len(CHARSET))
    weights.embedding = np.eye(len(CHARSET), dtype=np.float32)
    parts = [one for one in graph(weights) if b"MatMul" not in one and b"Add" not in one and b"Gather" not in one]
    parts += [node("Gemm", ["x1", "w", "b"], ["sum"]), tensor("values", np.array([0.0, 1.0]))]
    parts += [node("OneHot", ["ids", "depth", "values"], ["e"])]
    same(write(tmp_path / "a.onnx", parts), weights)
    data = bytearray()

    def beside(name: str, array: Array) -> bytes:
        offset = len(data)
        data.extend(np.ascontiguousarray(array).tobytes())
        return tensor(name, array, external=("b.onnx.data", offset))

    weights = keras_weights(2)
    path = write(tmp_path / "b.onnx", graph(weights, beside))
    with pytest.raises(InvalidModelFile, match="can't read"):
        read_foreign(path)
    (tmp_path / "b.onnx.data").write_bytes(data)
    same(path, weights)
    (tmp_path / "b.onnx.data").write_bytes(data[:-4])
    with pytest.raises(InvalidModelFile, match=r"beyond the end of b\.onnx\.data"):
        read_foreign(path)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_onnx__weights_elsewhere_are_never_opened(tmp_path: Path, place: str) -> None:
    parts = graph(keras_weights(), lambda name, array: tensor(name, array, external=(place, 0)))
    with pytest.raises(InvalidModelFile, match="only from beside the file"):
        read_foreign(write(tmp_path / "a.onnx", parts))


def replaced(parts: list[bytes], old: bytes, *new: bytes) -> list[bytes]:
    found = [one for one in parts if old in one]
    assert len(found) == 1
    return [*(one for one in parts if one is not found[0]), *new]


PARTS = graph(keras_weights())
GRU = ["x0", "W0", "R0", "B0", "", "state"]
REFUSED: dict[str, tuple[list[bytes], str]] = {
    "reset_before": (graph(keras_weights(), linear_before_reset=0), "linear_before_reset=0"),
    "reverse": (graph(keras_weights(), direction="reverse"), "is reverse"),
    "bidirectional": (graph(keras_weights(), direction="bidirectional"), "is bidirectional"),
    "lstm": (replaced(PARTS, b"GRU", node("LSTM", GRU, ["y0"])), "an LSTM node"),
    "no_gru": (replaced(PARTS, b"GRU"), "no GRU node"),
    "relu": (
        replaced(PARTS, b"MatMul", node("Relu", ["x1"], ["q"]), node("MatMul", ["q", "w"], ["product"])),
        "Relu precedes the output layer",
    ),
    "norm": (replaced(PARTS, b"Gather", node("LayerNormalization", ["emb", "ids"], ["e"])), "LayerNormalization"),
    "residual": (replaced(PARTS, b"Add", node("Add", ["x1", "product"], ["sum"])), "adds two layers"),
    "learnt": (
        [*replaced(PARTS, b"GRU", node("GRU", [*GRU[:5], "h"], ["y0", "h0"], linear_before_reset=1)),
         tensor("h", np.ones((1, 1, UNITS), np.float32))],
        "an initial state that was learnt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_onnx__another_function_is_refused_by_name(tmp_path: Path, name: str) -> None:
    parts, message = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write(tmp_path / "a.onnx", parts))


def test_onnx__learnt_initial_state_that_is_repeated_for_each_text_is_refused(tmp_path: Path) -> None:
    parts = graph(keras_weights())
    gru = node("GRU", ["x0", "W0", "R0", "B0", "", "h"], ["y0", "h0"], linear_before_reset=1, hidden_size=UNITS)
    for value, refused in ((np.ones((1, 1, UNITS), np.float32), True), (np.zeros((1, 1, UNITS), np.float32), False)):
        changed = [
            *replaced(parts, b"GRU", gru),
            tensor("learnt", value),
            node("Shape", ["ids"], ["shape"]),
            node("Expand", ["learnt", "shape"], ["h"]),
        ]
        path = write(tmp_path / "a.onnx", changed)
        if refused:
            with pytest.raises(UnsupportedModel, match="an initial state that was learnt"):
                read_foreign(path)
        else:
            same(path, keras_weights())


LENGTHS: dict[str, tuple[list[bytes], int | None, bool]] = {  # parts, positions of the ids, whether it is imported
    "constant": ([tensor("lens", np.array([40]))], 40, True),
    "constant and too short": ([tensor("lens", np.array([39]))], 40, False),
    "constant for any length": ([tensor("lens", np.array([40]))], None, False),
    "an input": ([], 40, False),
    "of the ids": (
        [node("Shape", ["ids"], ["s"]), tensor("i", np.array([1])), node("Gather", ["s", "i"], ["lens"])], None, True,
    ),
    "of the ids for each text": (
        [node("Shape", ["x0"], ["s"]), *(tensor(name, np.array([end])) for name, end in (("i", 0), ("j", 1))),
         node("Slice", ["s", "i", "j"], ["t"]), tensor("two", np.array([2])),
         node("Slice", ["s", "j", "two"], ["batch"]),
         node("Expand", ["t", "batch"], ["wide"]), node("Cast", ["wide"], ["lens"], to=6)], None, True,
    ),
    "of the texts": (
        [node("Shape", ["ids"], ["s"]), tensor("i", np.array([0])), node("Gather", ["s", "i"], ["lens"])], None, False,
    ),
    "computed": (
        [node("Shape", ["ids"], ["s"]), tensor("i", np.array([1])), node("Sub", ["s", "i"], ["lens"])], None, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_onnx__lengths_of_the_texts_are_refused_unless_they_are_the_whole(tmp_path: Path, name: str) -> None:
    parts, length, is_imported = LENGTHS[name]
    weights = keras_weights()
    inputs = ["x0", "W0", "R0", "B0", "lens", "state"]
    gru = node("GRU", inputs, ["y0", "h0"], hidden_size=UNITS, linear_before_reset=1)
    dims = b"".join(field(1, field(1, each) if each is not None else field(2, "free")) for each in (1, length))
    ids = field(11, field(1, "ids") + field(2, field(1, field(2, dims))))
    path = write(tmp_path / "a.onnx", [*replaced(graph(weights), b"GRU", gru), *parts, ids])
    if is_imported:
        same(path, weights)
    else:
        with pytest.raises(UnsupportedModel, match="sequence_lens"):
            read_foreign(path)


@pytest.mark.parametrize("index", [-1, 0])
def test_onnx__output_of_the_last_position_only(tmp_path: Path, index: int) -> None:
    last = [tensor("index", np.array(index)), node("Gather", ["x1", "index"], ["last"], axis=0)]
    parts = replaced(graph(keras_weights())[:-1], b"MatMul", *last, node("MatMul", ["last", "w"], ["product"]))
    parts.append(node("Identity", ["sum"], ["logits"]))
    path = write(tmp_path / "a.onnx", parts)
    if index == 0:
        with pytest.raises(UnsupportedModel, match="Gather precedes the output layer"):
            read_foreign(path)
    else:
        same(path, keras_weights())


def test_onnx__weights_that_are_cast(tmp_path: Path) -> None:
    weights = keras_weights()
    weights.dense = weights.dense.astype(np.float16).astype(np.float32)
    parts = [one for one in graph(weights) if not one.endswith(tensor("w", weights.dense)[-20:])]
    parts += [tensor("half", weights.dense.astype(np.float16)), node("Cast", ["half"], ["w"], to=1)]
    same(write(tmp_path / "a.onnx", parts), weights)
    parts = [one for one in graph(weights) if not one.endswith(tensor("w", weights.dense)[-20:])]
    parts += [tensor("int", weights.dense.astype(np.int64)), node("Cast", ["int"], ["w"], to=1)]
    weights.dense = weights.dense.astype(np.int64).astype(np.float32)
    same(write(tmp_path / "b.onnx", parts), weights)


def between(op: str, source: str, target: str, *constants: Array, **attributes: int | str | list[int]) -> list[bytes]:
    """The parts of a node with constants as further inputs."""
    names = [f"{op}_{index}" for index in range(len(constants))]
    parts = [tensor(name, np.asarray(array)) for name, array in zip(names, constants, strict=True)]
    return [*parts, node(op, [source, *names], [target], **attributes)]


def one(value: int) -> Array:
    return np.array([value])


BETWEEN: dict[str, tuple[str, list[bytes], str]] = {
    "every second": ("e", between("Slice", "e", "m", one(0), one(1 << 40), one(1), one(2)), "kind Slice"),
    "backwards": ("e", between("Slice", "e", "m", one(-1), one(-(1 << 40)), one(1), one(-1)), "kind Slice"),
    "axes": ("e", between("Transpose", "e", "m", perm=[0, 2, 1]), "its axes are exchanged"),
    "mixed": ("e", between("Reshape", "e", "m", np.array([0, -1, 7])), "kind Reshape"),
    "exchanged": ("x1", between("Transpose", "x1", "mm", perm=[1, 0, 2]), "its axes are exchanged"),
    "one position": ("x1", between("Gather", "x1", "mm", np.array(-1), axis=0), "kind Gather"),
    "units": ("x2", between("Slice", "x2", "mm", one(-1), one(-(1 << 40)), one(2), one(-1)), "kind Slice"),
    "few units": ("x2", between("Slice", "x2", "mm", one(0), one(3), one(2), one(1)), "kind Slice"),
    "other axis": ("x2", between("Transpose", "x2", "mm", perm=[0, 2, 1]), "another axis than that of the units"),
    "logits": ("sum", between("Slice", "sum", "mmm", one(-1), one(-(1 << 40)), one(2), one(-1)), "kind Slice"),
    "temperature": ("sum", between("Mul", "sum", "mmm", np.array([2], np.float32)), "kind Mul"),
    "positions": ("sum", between("Softmax", "sum", "mmm", axis=0), "softmax is over another axis"),
    "ids": ("ids", between("Add", "ids", "mmm", one(1)), "the ids are changed by a node of the kind Add"),
    "ids backwards": ("ids", between("Slice", "ids", "mmm", one(-1), one(-9), one(1), one(-1)), "the kind Slice"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_onnx__nodes_that_mix_or_leave_out_numbers_are_refused(tmp_path: Path, name: str) -> None:
    after, parts, message = BETWEEN[name]
    weights = keras_weights(2)
    target = "m" * len(after)  # equally long, so that the lengths in the messages stay right
    changed = [part.replace(field(1, after), field(1, target)) for part in graph(weights)]
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write(tmp_path / "a.onnx", [*changed, *parts]))


def test_onnx__exporters_ways_to_reshape_and_to_write_one_hot_inputs_are_read(tmp_path: Path) -> None:
    weights = keras_weights(dim=len(CHARSET))
    weights.embedding = np.eye(len(CHARSET), dtype=np.float32)
    parts = [part for part in graph(weights) if b"Gather" not in part and b"Squeeze" not in part]
    parts += [*between("Unsqueeze", "ids", "u", one(-1)), tensor("range", np.arange(len(CHARSET)))]
    parts += [node("Equal", ["u", "range"], ["same"]), node("Cast", ["same"], ["e"], to=1)]
    parts += [
        node("Transpose", ["y0"], ["t"], perm=[0, 2, 1, 3]),
        *between("Reshape", "t", "x1", np.array([0, -1, UNITS])),
    ]
    same(write(tmp_path / "a.onnx", parts), weights)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (0, 0)])
def test_onnx__axes_of_the_ids_that_are_exchanged_are_refused_where_their_lengths_show_it(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    weights = keras_weights()
    parts = [
        node("Identity", ["e"], ["x0"]) if field(1, "e") in part and b"Transpose" in part else part
        for part in graph(weights)
    ]
    lengths = b"".join(field(1, field(1, length)) for length in shape)
    parts.append(field(11, field(1, "ids") + field(2, field(1, field(2, lengths)))))
    path = write(tmp_path / "a.onnx", parts)
    if shape == (1, 9):
        with pytest.raises(UnsupportedModel, match="first axis of the ids as positions"):
            read_foreign(path)
    else:
        same(path, weights)

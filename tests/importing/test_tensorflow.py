"""TensorFlow checkpoints and SavedModels: what is imported computes what Keras computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.crc32c import crc32c
from service.importing.detection import read_foreign
from service.importing.protobuf import field
from tests.harness.foreign_models import (
    CHARSET,
    UNITS,
    checkpointed,
    imported_log_probs,
    keras_log_probs,
    keras_weights,
    write_bundle,
    write_saved_model,
)
from tests.harness.tensorflow_graphs import Change, Function, write_graph

IDS = np.random.default_rng(1).integers(0, len(CHARSET), 40)


def same(path: Path, weights: Any, charset: str | None = CHARSET) -> None:
    np.testing.assert_allclose(imported_log_probs(path, charset)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_checkpoint__is_found_by_every_name_that_means_it(tmp_path: Path, num_layers: int) -> None:
    weights = keras_weights(num_layers)
    prefix = write_bundle(tmp_path / "ckpt_7", checkpointed(weights, [f"rnn{index}" for index in range(num_layers)]))
    for name in ("ckpt_7", "ckpt_7.index", "ckpt_7.data-00000-of-00001"):
        same(tmp_path / name, weights)
    same(tmp_path, weights)
    write_bundle(tmp_path / "ckpt_8", checkpointed(keras_weights(seed=9)))
    with pytest.raises(InvalidModelFile, match="2 checkpoints"):
        read_foreign(tmp_path)
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "/elsewhere/{prefix.name}"\n')
    same(tmp_path, weights)


def test_checkpoint__lists_of_variables_as_keras_exports_them(tmp_path: Path) -> None:
    weights = keras_weights(2)
    arrays = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    named = {f"variables/{index * 2}/.ATTRIBUTES/VARIABLE_VALUE": array for index, array in enumerate(arrays)}
    named |= {f"_all_variables/{9 - index}/.ATTRIBUTES/VARIABLE_VALUE": array for index, array in enumerate(arrays)}
    same(write_bundle(tmp_path / "m", named), weights)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_saved_model__vocabulary_is_read_from_the_graph(tmp_path: Path, first: int, num_layers: int) -> None:
    weights = keras_weights(num_layers, vocab=len(CHARSET) + first)
    path = write_saved_model(tmp_path / "one_step", weights, CHARSET, range(first, first + len(CHARSET)))
    masked = keras_log_probs(weights, IDS + first)[:, first:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path)(IDS), masked, atol=2e-6)


def test_saved_model__words_are_refused(tmp_path: Path) -> None:
    words = ["the", "cat", "sat", "on", "mat"]
    path = write_saved_model(tmp_path / "words", keras_weights(vocab=5), words, range(5))
    with pytest.raises(UnsupportedModel, match="tokens of several characters"):
        imported_log_probs(path)


def test_checkpoint__reset_before_is_refused(tmp_path: Path) -> None:
    arrays = checkpointed(keras_weights())
    arrays["model/gru/cell/bias/.ATTRIBUTES/VARIABLE_VALUE"] = np.zeros(3 * UNITS, np.float32)
    with pytest.raises(UnsupportedModel, match="reset_after=False"):
        read_foreign(write_bundle(tmp_path / "m", arrays))


def test_checkpoint__a_changed_number_or_name_is_found_by_its_checksum(tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", checkpointed(keras_weights()))
    for name in ("m.data-00000-of-00001", "m.index"):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(InvalidModelFile, match="checksum"):
            read_foreign(prefix)
        path.write_bytes(data[:-9])
        with pytest.raises(InvalidModelFile):
            read_foreign(prefix)
        path.write_bytes(data)
    (tmp_path / "m.data-00000-of-00001").unlink()
    with pytest.raises(InvalidModelFile, match="can't read"):
        read_foreign(prefix)


@pytest.mark.parametrize("size", [0, 1, 9, 4096, 4097, 100_003])
def test_crc32c__is_the_same_in_stripes(size: int) -> None:
    data = b"123456789" * (size // 9) + os.urandom(size % 9)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("name", ["opt", "trainer/adam"])
def test_tensorflow__optimizer_of_any_name_is_left_out(tmp_path: Path, name: str) -> None:
    weights = keras_weights(2)
    arrays = checkpointed(weights, ("gru", "gru_1"))
    moments = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays |= {f"{name}/_variables/{2 + index}{ending}": one for index, one in enumerate([*moments, *moments])}
    arrays |= {f"{name}/_iterations{ending}": np.array(5), f"{name}/_learning_rate{ending}": np.array(1e-3, "f4")}
    path = write_bundle(tmp_path / "ckpt", arrays)
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


def test_tensorflow__variables_that_only_the_optimizer_names_are_read(tmp_path: Path) -> None:
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    for num_layers in (1, 2):
        weights = keras_weights(num_layers)
        grus = [array for gru in weights.grus for array in gru]
        ends = {
            "net/emb/_embeddings": weights.embedding,
            "net/head/_kernel": weights.dense,
            "net/head/bias": weights.bias,
        }
        some = ends | {f"opt/_trainable_variables/{index + 1}": array for index, array in enumerate(grus)}
        every = [weights.embedding, *grus, weights.dense, weights.bias]
        all_of_them = {f"optimizer/_trainable_variables/{index}": array for index, array in enumerate(every)}
        for name, arrays in (("some", some), ("all", all_of_them)):
            stem = "opt" if name == "some" else "optimizer"
            arrays |= {f"{stem}/_variables/{2 + index}": array for index, array in enumerate([*every, *every])}
            arrays |= {f"{stem}/_iterations": np.array(5), f"{stem}/_learning_rate": np.array(1e-3, "f4")}
            path = write_bundle(
                tmp_path / f"{name}{num_layers}", {f"{key}{ending}": one for key, one in arrays.items()}
            )
            np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


def test_graph__gives_what_it_computes_in_its_order(tmp_path: Path) -> None:
    for index, (count, stacked, served) in enumerate([(1, False, True), (3, False, False), (3, True, True)]):
        weights = keras_weights(count)
        order = list(range(count))[::-1] if count > 1 else None
        if order is not None:  # the numbers in the names contradict the graph
            weights.grus[-1], weights.grus[0] = weights.grus[0], weights.grus[-1]
        path = write_graph(
            tmp_path / f"m{index}", weights, order=order, stacked=stacked, is_served=served, tokens=CHARSET
        )
        if order is not None:
            weights.grus.reverse()
        same(path, weights, None)


def mul(function: Function, value: str) -> str:
    return function.add("Mul", value, function.constant(0.5), name="model/scale/mul")


def of(op: str, *more: Any) -> Change:
    """Return what adds an operation with these constants after a value."""
    return lambda function, value: function.add(
        op, value, *(function.constant(one) for one in more), name=f"model/layer/{op}"
    )


def backwards(function: Function, value: str) -> str:
    parts = [function.constant(one) for one in ([0, 0], [0, 0], [1, -1])]
    return function.add("StridedSlice", value, *parts, begin_mask=3, end_mask=3, name="model/layer/StridedSlice")


def twice(function: Function, value: str) -> str:
    return function.add("Softmax", function.add("Softmax", value, name="model/layer/Softmax"))


CHANGES: dict[str, tuple[str, Change]] = {
    "shifted ids": ("ids", of("AddV2", 1)),
    "ids backwards": ("ids", backwards),
    "masked ids": ("ids", of("Maximum", 1)),
    "scaled embedding": ("embedding", mul),
    "embedding backwards": ("embedding", of("ReverseV2", [1])),
    "reshape": ("embedding", of("Reshape", [1, -1, 5])),
    "residual": ("gru_0", lambda function, value: function.add("AddV2", value, value, name="model/layer/AddV2")),
    "activation": ("gru_0", of("Tanh")),
    "softmax between": ("gru_0", of("Softmax")),
    "concatenation": (
        "gru_0",
        lambda function, value: function.add("ConcatV2", value, value, name="model/layer/ConcatV2"),
    ),
    "units exchanged": ("gru_1", of("Transpose", [0, 2, 1])),
    "units backwards": ("gru_1", of("ReverseV2", [2])),
    "activation before the output": ("gru_1", of("Relu")),
    "temperature": ("logits", mul),
    "activation of the output": ("logits", of("Tanh")),
    "two softmaxes": ("logits", twice),
}


@pytest.mark.parametrize("name", CHANGES)
def test_graph__operation_between_ids_and_logits_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    place, change = CHANGES[name]
    path = write_graph(tmp_path / "m", keras_weights(2), changes={place: change}, tokens=CHARSET)
    with pytest.raises(UnsupportedModel, match=r"operation \w+ \(model/(layer|scale)/") as caught:
        read_foreign(path)
    assert "after the output layer" in str(caught.value) or place != "logits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "Relu"}, "operation Relu .* in the step of a GRU layer"),
        ({"activation": "Sigmoid"}, "the step of the layer model/gru_1/2 in the graph isn't that of a GRU"),
        ({"activation": "Identity"}, "the step of the layer model/gru_1"),
        ({"candidate": mul}, "the step of the layer model/gru_1"),
        ({"changes": {"embedding": of("Transpose", [1, 0, 2])}}, "the first axis of the ids as positions"),
        ({"initial": 0.5}, "initial state that isn't zero"),
        ({"order": [0, 0, 1]}, "the layer model/gru_0/cell several times"),
        ({"order": [0]}, "doesn't apply model/gru_1/cell"),
        ({"unrolled": 3}, "steps of the layer model/gru_1/cell .* make the model with unroll=False"),
    ],
)
def test_graph__loop_that_is_no_gru_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    weights = keras_weights(2, dim=UNITS)
    same(write_graph(tmp_path / "good", weights, tokens=CHARSET), weights, None)
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write_graph(tmp_path / "m", weights, tokens=CHARSET, **options))


def crossed(operation: str) -> Change:
    """Return a change that makes billions of numbers of two constants."""

    def change(function: Function, _: str) -> str:
        column, row = (function.constant(np.zeros(shape, np.float32)) for shape in ((60_000, 1), (1, 60_000)))
        return function.add(operation, column, row)

    return change


def doubled(function: Function, value: str) -> str:
    for _ in range(40):
        value = function.add("ConcatV2", value, value, function.constant(0))
    return value


def tiled(function: Function, value: str) -> str:
    return function.add("Tile", value, function.constant([60_000, 60_000]))


@pytest.mark.parametrize("candidate", [crossed("AddV2"), crossed("MatMul"), doubled, tiled])
def test_graph__small_file_makes_no_more_numbers_than_it_has_weights(tmp_path: Path, candidate: Change) -> None:
    path = write_graph(tmp_path / "m", keras_weights(2, dim=UNITS), tokens=CHARSET, candidate=candidate)
    with pytest.raises(UnsupportedModel, match="with more numbers than a GRU's step has"):
        read_foreign(path)


def test_graph__operations_on_texts_are_refused(tmp_path: Path) -> None:
    def change(function: Function, value: str) -> str:
        return function.add("AddV2", value, function.constant(["text"]))

    path = write_graph(tmp_path / "m", keras_weights(2, dim=UNITS), tokens=CHARSET, candidate=change)
    with pytest.raises(UnsupportedModel, match=r"AddV2 .* with numbers that don't fit"):
        read_foreign(path)


@pytest.mark.parametrize(
    "change",
    [
        of("Softmax"),
        of("LogSoftmax"),
        of("StopGradient"),
        lambda function, value: function.add(
            "LookupTableFindV2", function.add("Multinomial", function.add("RealDiv", value, function.constant(0.7)))
        ),
    ],
)
def test_graph__probabilities_and_draws_after_the_logits_are_no_part_of_the_model(
    tmp_path: Path, change: Change
) -> None:
    weights = keras_weights()
    same(write_graph(tmp_path / "m", weights, changes={"logits": change}, tokens=CHARSET), weights, None)


def test_graph__layers_that_run_on_a_gpu_are_read(tmp_path: Path) -> None:
    weights = keras_weights(2)
    same(write_graph(tmp_path / "m", weights, cudnn=[1, 0, 2], tokens=CHARSET), weights, None)
    with pytest.raises(UnsupportedModel, match=r"CudnnRNNV3 .* with weights that are not those of a GRU"):
        read_foreign(write_graph(tmp_path / "gates", weights, cudnn=[0, 1, 2]))
    with pytest.raises(UnsupportedModel, match="initial state that isn't zero"):
        read_foreign(write_graph(tmp_path / "state", weights, cudnn=[1, 0, 2], initial=0.5))
    with pytest.raises(UnsupportedModel, match="operation Tanh"):
        read_foreign(write_graph(tmp_path / "tanh", weights, cudnn=[1, 0, 2], changes={"gru_0": of("Tanh")}))


def test_graph__temperature_of_the_model_is_refused_before_a_draw_too(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "m",
        keras_weights(),
        changes={"logits": lambda function, value: of("Multinomial")(function, mul(function, value))},
    )
    with pytest.raises(UnsupportedModel, match="model/scale/mul"):
        read_foreign(path)


def test_graph__functions_without_a_way_from_ids_to_logits_are_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "m", keras_weights(), changes={"logits": lambda function, _: function.args[0]})
    with pytest.raises(UnsupportedModel, match="no function of the graph leads from ids to logits"):
        read_foreign(path)


def test_graph__that_masks_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="mask_zero=True"):
        imported_log_probs(write_graph(tmp_path / "a", keras_weights(2), tokens=CHARSET, masked=True))
    weights = keras_weights(2, vocab=len(CHARSET) + 1)
    path = write_graph(tmp_path / "b", weights, masked=True)
    masked = keras_log_probs(weights, IDS + 1)[:, 1:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), masked, atol=2e-6)


def test_saved_model__without_functions_says_that_nothing_shows_what_it_computes(tmp_path: Path) -> None:
    folder = write_saved_model(tmp_path / "m", keras_weights(), CHARSET, range(len(CHARSET)))
    assert "holds weights and not what" in read_foreign(folder)[0].notes[0]


def test_tensorflow__states_between_calls_are_no_layers(tmp_path: Path) -> None:
    weights = keras_weights(2)
    arrays = checkpointed(weights, ("a1", "a2"))
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays |= {f"model/{name}/states/0{ending}": np.ones((1, UNITS), np.float32) for name in ("a1", "a2")}
    same(write_bundle(tmp_path / "m", arrays), weights)


def test_tensorflow__cells_of_one_layer_are_layers(tmp_path: Path) -> None:
    weights = keras_weights(2)
    arrays = {
        key.replace("/0/cell/", "/cell/cells/0/").replace("/1/cell/", "/cell/cells/1/"): array
        for key, array in checkpointed(weights, ("rnn/0", "rnn/1")).items()
    }
    same(write_bundle(tmp_path / "m", arrays), weights)


def test_tensorflow__bidirectional_checkpoint_whose_names_are_lost_is_refused(tmp_path: Path) -> None:
    weights = keras_weights(2)
    every = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays = {f"opt/_trainable_variables/{index}{ending}": one for index, one in enumerate(every)}
    children = field(1, field(1, 1) + field(2, "forward_layer")) + field(1, field(1, 2) + field(2, "backward_layer"))
    objects = np.frombuffer(field(1, children), np.uint8)
    padded = np.concatenate([objects, np.zeros(-len(objects) % 8, np.uint8)]).view("<i8")
    path = write_bundle(tmp_path / "m", arrays | {"_CHECKPOINTABLE_OBJECT_GRAPH": padded})
    with pytest.raises(UnsupportedModel, match="is bidirectional"):
        read_foreign(path)

"""Keras files: what is imported computes what Keras computes; everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.detection import read_foreign
from tests.harness.foreign_models import (
    CHARSET,
    UNITS,
    Array,
    imported_log_probs,
    keras_config,
    keras_log_probs,
    keras_weights,
    legacy,
    sequential,
    subclassed,
    write_hdf5,
    write_keras,
)

IDS = np.random.default_rng(1).integers(0, len(CHARSET), 40)


def same(path: Path, weights: Any, order: tuple[str, ...] = ()) -> None:
    np.testing.assert_allclose(imported_log_probs(path, CHARSET, order)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_keras__every_kind_of_file_gives_what_keras_computes(tmp_path: Path, num_layers: int) -> None:
    weights = keras_weights(num_layers)
    same(write_hdf5(tmp_path / "a.weights.h5", sequential(weights)), weights)
    names = tuple(f"rnn{index}" for index in range(1, num_layers + 1))
    same(write_hdf5(tmp_path / "b.weights.h5", subclassed(weights, names)), weights)
    # The names of the layers contradict their order, which only the config tells.
    config = keras_config(num_layers)
    attributes = {"model_config": json.dumps(config), "keras_version": "2.15.0"}
    same(write_hdf5(tmp_path / "c.h5", legacy(weights), attributes), weights)
    same(write_hdf5(tmp_path / "d.h5", legacy(weights), {"model_config": json.dumps(config).encode()}), weights)
    same(write_keras(tmp_path / "e.keras", sequential(weights), config), weights)


def test_keras__a_list_of_all_variables_is_divided_into_layers(tmp_path: Path) -> None:
    weights = keras_weights(2)
    arrays = [weights.embedding, *weights.grus[0], *weights.grus[1], weights.dense, weights.bias]
    same(write_hdf5(tmp_path / "m.h5", {f"vars/{index}": array for index, array in enumerate(arrays)}), weights)


def test_keras__order_of_equal_layers_is_asked_for_where_names_have_no_numbers(tmp_path: Path) -> None:
    weights = keras_weights(2, dim=UNITS)
    path = write_hdf5(tmp_path / "m.weights.h5", subclassed(weights, ("upper", "lower")))
    with pytest.raises(UnsupportedModel, match="--layers-from lower/cell/vars,upper/cell/vars"):
        read_foreign(path)
    same(path, weights, ("upper", "lower"))
    with pytest.raises(UnsupportedModel, match="doesn't name each GRU layer once"):
        read_foreign(path, ("upper", "middle"))


def test_keras__cudnn_gru_is_the_same_function(tmp_path: Path) -> None:
    weights = keras_weights()
    ((kernel, recurrent, bias),) = weights.grus
    # As Keras converts between the two: each gate's kernel keeps its numbers and its shape, and changes its layout.
    parts = [gate.T.reshape(gate.shape) for gate in np.hsplit(kernel, 3)]
    arrays = legacy(weights)
    stem = "model_weights/layer_b/layer_b/gru_cell/"
    arrays[stem + "kernel:0"] = np.hstack(parts)
    arrays[stem + "recurrent_kernel:0"] = np.hstack([gate.T for gate in np.hsplit(recurrent, 3)])
    arrays[stem + "bias:0"] = bias.reshape(-1)
    same(write_hdf5(tmp_path / "m.h5", arrays), weights)


def test_keras__tied_embedding_and_output_without_bias(tmp_path: Path) -> None:
    weights = keras_weights(dim=UNITS)
    weights.dense, weights.bias = weights.embedding.T, np.zeros_like(weights.bias)
    arrays = {path: array for path, array in subclassed(weights).items() if not path.startswith("head")}
    same(write_hdf5(tmp_path / "m.weights.h5", arrays), weights)


def test_keras__unknown_and_padding_rows_are_left_out_as_if_masked(tmp_path: Path) -> None:
    weights = keras_weights(vocab=len(CHARSET) + 1)
    path = write_hdf5(tmp_path / "m.weights.h5", subclassed(weights))
    masked = keras_log_probs(weights, IDS + 1)[:, 1:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), masked, atol=2e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "reset_before": ({"reset_after": False}, "reset_after=False.*reset_after=True"),
    "backwards": ({"go_backwards": True}, "reads backwards"),
    "relu": ({"activation": "relu"}, "activation=relu: train it with activation='tanh'"),
    "hard_sigmoid": ({"recurrent_activation": "hard_sigmoid"}, "recurrent_activation=hard_sigmoid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keras__another_function_is_refused_by_its_config(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    path = write_keras(tmp_path / "m.keras", sequential(keras_weights()), keras_config(**changes))
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(path)


OTHER_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "LSTM": ({"class_name": "LSTM", "config": {"name": "l"}}, "the layer l is an LSTM"),
    "Bidirectional": (
        {"class_name": "Bidirectional", "config": {"name": "b", "layer": {"class_name": "GRU", "config": {}}}},
        "Bidirectional",
    ),
    "LayerNormalization": ({"class_name": "LayerNormalization", "config": {"name": "n"}}, "LayerNormalization"),
    "MultiHeadAttention": ({"class_name": "MultiHeadAttention", "config": {"name": "a"}}, "MultiHeadAttention"),
    "Dense": ({"class_name": "Dense", "config": {"name": "d", "activation": "relu"}}, "activation relu"),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_keras__other_layers_are_refused_by_the_config(tmp_path: Path, name: str) -> None:
    layer, message = OTHER_LAYERS[name]
    config = keras_config()
    config["config"]["layers"].insert(2, layer)
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write_keras(tmp_path / "m.keras", sequential(keras_weights()), config))


def normal(*shape: int) -> Array:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


WEIGHTS_ONLY: dict[str, tuple[dict[str, Array | None], str]] = {
    "reset_before": ({"gru/cell/vars/2": normal(3 * UNITS)}, "reset_after=False"),
    "lstm": ({"gru/cell/vars/0": normal(5, 4 * UNITS), "gru/cell/vars/1": normal(UNITS, 4 * UNITS)}, "an LSTM"),
    "rnn": ({"gru/cell/vars/0": normal(5, UNITS), "gru/cell/vars/1": normal(UNITS, UNITS)}, "a SimpleRNN"),
    "norm": ({"norm/gamma": normal(UNITS), "norm/beta": normal(UNITS)}, "norm is normalisation"),
    "attention": ({"mha/query_dense/vars/0": normal(UNITS, 2, 3)}, "attention|another kind"),
    "dense": ({"extra/vars/0": normal(UNITS, UNITS), "extra/vars/1": normal(UNITS)}, "2 dense layers"),
    "no_bias": ({"gru/cell/vars/2": None}, "use_bias=True"),
    "no_output": ({"head/vars/0": None, "head/vars/1": None}, "no output layer"),
    "sizes": ({"gru/cell/vars/0": normal(9, 3 * UNITS)}, "don't fit together"),
    "rows": ({"table/vars/0": normal(20, 5)}, "embedding has 20 rows"),
}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_keras__another_function_is_refused_by_its_weights(tmp_path: Path, name: str) -> None:
    changes, message = WEIGHTS_ONLY[name]
    arrays = {key: array for key, array in (subclassed(keras_weights()) | changes).items() if array is not None}
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write_hdf5(tmp_path / "m.weights.h5", arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["table/vars/0", "gru/cell/vars/1", "gru/cell/vars/2", "head/vars/0", "head/vars/1"])
def test_keras__numbers_that_are_not_finite_are_refused(tmp_path: Path, path: str, value: float) -> None:
    arrays = subclassed(keras_weights())
    arrays[path].flat[-1] = value
    with pytest.raises(InvalidModelFile, match="not finite"):
        imported_log_probs(write_hdf5(tmp_path / "m.weights.h5", arrays), CHARSET)


def test_keras__masked_inputs_are_refused_where_a_character_is_masked(tmp_path: Path) -> None:
    config = keras_config()
    config["config"]["layers"][0]["config"]["mask_zero"] = True
    weights = keras_weights()
    path = write_keras(tmp_path / "a.keras", sequential(weights), config)
    with pytest.raises(UnsupportedModel, match="mask_zero=True"):
        imported_log_probs(path, CHARSET)
    weights = keras_weights(vocab=len(CHARSET) + 1)
    path = write_keras(tmp_path / "b.keras", sequential(weights), config)
    masked = keras_log_probs(weights, IDS + 1)[:, 1:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), masked, atol=2e-6)


@pytest.mark.parametrize("dim", [5, UNITS, len(CHARSET)])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("names", [("embedding", "dense"), ("dense", "embedding"), ("zeichen", "ausgabe")])
def test_keras__output_without_bias_is_told_from_the_embedding(
    tmp_path: Path, dim: int, num_layers: int, names: tuple[str, str]
) -> None:
    for vocab in (len(CHARSET), UNITS):
        weights = keras_weights(num_layers, vocab=vocab, dim=dim)
        weights.bias = np.zeros_like(weights.bias)
        arrays = {
            path.replace("table", names[0]).replace("head", names[1]): one
            for path, one in sequential(weights).items()
            if not path.endswith("head/vars/1")
        }
        path = write_hdf5(tmp_path / f"{vocab}.weights.h5", arrays)
        ids = IDS % vocab
        if vocab == dim == UNITS and names[0] != "embedding":
            if names[0] == "zeichen":
                with pytest.raises(UnsupportedModel, match="which of the weights"):
                    read_foreign(path)
            continue
        found = imported_log_probs(path, CHARSET[:vocab])(ids)
        np.testing.assert_allclose(found, keras_log_probs(weights, ids), atol=2e-6)


def test_keras__one_hot_inputs_with_and_without_a_bias_of_the_output(tmp_path: Path) -> None:
    for bias in (True, False):
        weights = keras_weights(2, dim=len(CHARSET))
        weights.embedding = np.eye(len(CHARSET), dtype=np.float32)
        arrays = sequential(weights)
        del arrays["layers/table/vars/0"]
        if not bias:
            weights.bias = np.zeros_like(weights.bias)
            del arrays["layers/head/vars/1"]
        path = write_hdf5(tmp_path / f"{bias}.weights.h5", arrays)
        np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


def test_keras__layer_that_is_applied_twice_is_refused(tmp_path: Path) -> None:
    config = keras_config()
    config["config"]["layers"][1]["inbound_nodes"] = [{"args": []}, {"args": []}]
    with pytest.raises(UnsupportedModel, match="layer_b is applied 2 times"):
        read_foreign(write_keras(tmp_path / "a.keras", sequential(keras_weights()), config))


@pytest.mark.parametrize("layer", ["Softmax", "Activation"])
def test_keras__probabilities_before_the_output_layer_are_refused(tmp_path: Path, layer: str) -> None:
    config = keras_config()
    softmax = {"class_name": layer, "config": {"name": "early", "activation": "softmax"}}
    config["config"]["layers"].append(softmax)
    weights = keras_weights()
    path = write_keras(tmp_path / "a.keras", sequential(weights), config)
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)
    config["config"]["layers"].insert(2, config["config"]["layers"].pop())
    with pytest.raises(UnsupportedModel, match="early makes probabilities"):
        read_foreign(write_keras(tmp_path / "b.keras", sequential(keras_weights()), config))


def test_keras__layers_without_weights_are_refused_by_their_names(tmp_path: Path) -> None:
    for name in ("re_lu", "add_3", "rescaling", "masking"):
        path = write_hdf5(tmp_path / "m.weights.h5", sequential(keras_weights()))
        read_foreign(path)
        with h5py.File(path, "a") as file:
            file.create_group(f"layers/{name}/vars")
        with pytest.raises(UnsupportedModel, match=f"the layer {name}"):
            read_foreign(path)


def functional(*layers: tuple[str, str, Any, list[tuple[str, int]]], outputs: list[str], is_keras_2: bool) -> Any:
    """Return the config of a functional model. Layers: class, name, config, what they read as (layer, output)."""

    def node(sources: list[tuple[str, int]]) -> Any:
        if is_keras_2:
            return [[name, 0, index, {}] for name, index in sources]
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, index]}} for name, index in sources
        ]
        return {"args": tensors if len(tensors) < 2 else [tensors], "kwargs": {"training": False}}

    listed = [
        {
            "class_name": kind,
            "name": name,
            "config": {"name": name, **config},
            "inbound_nodes": [node(sources)] if sources else [],
        }
        for kind, name, config, sources in layers
    ]
    return {
        "class_name": "Functional",
        "config": {"layers": listed, "output_layers": [[name, 0, 0] for name in outputs]},
    }


IDS_IN: tuple[str, str, Any, list[tuple[str, int]]] = ("InputLayer", "ids", {}, [])
TABLE: tuple[str, str, Any, list[tuple[str, int]]] = ("Embedding", "table", {}, [("ids", 0)])
BRANCHES: dict[str, tuple[list[Any], str]] = {
    "residual": (
        [("Add", "add", {}, [("gru", 0), ("table", 0)]), ("GRU", "gru_1", {}, [("add", 0)])],
        "the layer add .Add. reads several values .gru, table.",
    ),
    "initial state": (
        [("GRU", "gru_1", {}, [("gru", 0), ("gru", 1)])],
        "the layer gru_1 has its initial state from gru: it must be zero",
    ),
    "state": ([("GRU", "gru_1", {}, [("gru", 1)])], "the layer gru_1 reads the state of gru"),
    "branch": ([("GRU", "gru_1", {}, [("table", 0)])], "the layer gru isn't on the way"),
}


@pytest.mark.parametrize("is_keras_2", [True, False])
@pytest.mark.parametrize("name", BRANCHES)
def test_keras__functional_models_that_branch_are_refused(tmp_path: Path, name: str, is_keras_2: bool) -> None:
    layers, message = BRANCHES[name]
    first = ("GRU", "gru", {"reset_after": True}, [("table", 0)])
    config = functional(
        IDS_IN, TABLE, first, *layers, ("Dense", "head", {}, [("gru_1", 0)]), outputs=["head"], is_keras_2=is_keras_2
    )
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write_keras(tmp_path / "m.keras", sequential(keras_weights(2)), config))


@pytest.mark.parametrize("is_keras_2", [True, False])
def test_keras__functional_models_compute_in_the_order_of_their_nodes(tmp_path: Path, is_keras_2: bool) -> None:
    weights = keras_weights(2, dim=UNITS)
    config = functional(
        IDS_IN, ("InputLayer", "before", {}, []),
        ("GRU", "first", {}, [("second", 0), ("before", 0)]), ("GRU", "second", {}, [("table", 0)]), TABLE,
        ("Softmax", "chances", {"axis": -1}, [("head", 0)]), ("Dense", "head", {}, [("first", 0)]),
        outputs=["chances", "first"], is_keras_2=is_keras_2,
    )  # fmt: skip
    arrays = {
        f"model_weights/{name}/{name}/gru_cell/{part}": array
        for name, gru in zip(("second", "first"), weights.grus, strict=True)
        for part, array in zip(("kernel", "recurrent_kernel", "bias"), gru, strict=True)
    } | {path: array for path, array in legacy(weights).items() if "/table/" in path or "/head/" in path}
    same(write_hdf5(tmp_path / "m.h5", arrays, {"model_config": json.dumps(config)}), weights)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("Reshape", {"target_shape": [-1, 5]}, 1)], "changes the shape before the layer"),
        ([("Softmax", {"axis": 1}, 3)], "softmax over another axis"),
        ([("Softmax", {}, 3), ("Activation", {"activation": "softmax"}, 4)], "is a softmax after that of"),
        (
            [("TimeDistributed", {"layer": {"class_name": "GRU", "config": {}}}, 1)],
            "applies GRU to each position alone",
        ),
        ([("Masking", {}, 1)], "Masking"),
        ([("Lambda", {}, 1)], "Lambda"),
    ],
)
def test_keras__layers_without_weights_are_refused_by_the_config(tmp_path: Path, layers: Any, message: str) -> None:
    config = keras_config()
    for kind, values, place in layers:
        config["config"]["layers"].insert(place, {"class_name": kind, "config": {"name": f"own_{place}", **values}})
    with pytest.raises(UnsupportedModel, match=message):
        read_foreign(write_keras(tmp_path / "m.keras", sequential(keras_weights()), config))


def test_keras__layers_without_biases_are_read_where_the_config_says_what_they_are(tmp_path: Path) -> None:
    weights = keras_weights(2)
    weights.grus = [(kernel, recurrent, np.zeros_like(bias)) for kernel, recurrent, bias in weights.grus]
    arrays = {path: array for path, array in sequential(weights).items() if not path.endswith("cell/vars/2")}
    same(write_keras(tmp_path / "m.keras", arrays, keras_config(2, use_bias=False)), weights, ("gru", "gru_1"))
    with pytest.raises(UnsupportedModel, match="use_bias=True"):
        read_foreign(write_hdf5(tmp_path / "m.weights.h5", arrays))
    with pytest.raises(UnsupportedModel, match="reset_after=False"):
        read_foreign(write_keras(tmp_path / "b.keras", arrays, keras_config(2, reset_after=False)))


@pytest.mark.parametrize("count", [1, 2])
def test_keras__cells_of_an_rnn_layer_are_layers(tmp_path: Path, count: int) -> None:
    weights = keras_weights(count)
    names = ["gru_cell", "gru_cell_1"][:count]
    config = keras_config()
    cells = [{"class_name": "GRUCell", "config": {"name": name, "reset_after": True}} for name in names]
    stacked = {"class_name": "StackedRNNCells", "config": {"name": "cells", "cells": cells}}
    rnn: dict[str, Any] = {"name": "rnn", "go_backwards": False, "cell": stacked if count > 1 else cells[0]}
    config["config"]["layers"][1] = {"class_name": "RNN", "config": rnn}
    arrays = sequential(weights)
    for layer, name in enumerate(names):
        for index in range(3):
            array = arrays.pop(f"layers/{'gru_1' if layer else 'gru'}/cell/vars/{index}")
            arrays[f"layers/rnn/cell/{f'cells/{name}/' if count > 1 else ''}vars/{index}"] = array
    same(write_keras(tmp_path / "m.keras", arrays, config), weights)
    rnn["go_backwards"] = True
    with pytest.raises(UnsupportedModel, match="reads backwards"):
        read_foreign(write_keras(tmp_path / "b.keras", arrays, config))
    rnn |= {"go_backwards": False, "cell": {"class_name": "LSTMCell", "config": {"name": "c"}}}
    with pytest.raises(UnsupportedModel, match="LSTMCell"):
        read_foreign(write_keras(tmp_path / "c.keras", arrays, config))

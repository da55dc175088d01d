"""Finds embedding, GRU layers and output layer among the weights of a Keras model, by shape and kind.

    GRU, reset_after=True   kernel (I, 3H), recurrent kernel (H, 3H), bias (2, 3H); gates z, r, h
    CuDNNGRU                the same with a bias (6H,), and each gate's part transposed in memory
    embedding               (V, E)
    dense                   kernel (H, V), bias (V,)

The names in a file depend on how the model was built and saved; only their last parts are fixed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import (
    NEEDED,
    Array,
    ForeignLayer,
    ForeignModel,
    NamedArrays,
    Tokens,
    order_layers,
    shown,
)

RESET_BEFORE = (
    "{} has reset_after=False: its reset gate acts before the recurrent product, which is another function. Train it "
    "again with reset_after=True, the default of Keras since TensorFlow 2"
)
_PROBABILITIES = ("linear", "softmax", "log_softmax", None)
_SNAKE = {"GRU": "gru", "CuDNNGRU": "cu_dnngru", "GRUCell": "gru_cell"}
_HARMLESS = {  # layers without an effect on a prediction
    "InputLayer", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "ActivityRegularization",
    "Softmax", "Reshape", "Identity", "AlphaDropout",
}  # fmt: skip
_WRAPPERS = {"TimeDistributed", "Sequential", "Functional", "Model"}
_OTHER_KINDS = (
    (re.compile(r"attention|query_dense|key_dense|multi_head", re.I), "attention"),
    (re.compile(r"batch_?norm|layer_?norm|gamma$|moving_mean", re.I), "normalisation"),
    (re.compile(r"conv", re.I), "a convolution"),
)
_EMBEDDING = re.compile(r"emb|enc|lookup|input", re.I)
_OUTPUT = re.compile(r"dec|dense|fc|lin|out|head|proj|logit|predict", re.I)
_BACKWARD = re.compile(r"backward|bidirectional", re.I)
# Keras 3 calls the layers of a container in `.weights.h5` by their classes, whatever their names are.
_WITHOUT_WEIGHTS = re.compile(
    r"(re_lu|leaky_re_lu|elu|add|subtract|multiply|average|maximum|minimum|concatenate|dot|rescaling|unit_normalization|"
    r"lambda|masking|repeat_vector|permute|flatten|cropping1d|zero_padding1d|up_sampling1d|"
    r"(global_)?(max|average)_pooling1d|attention|additive_attention|bidirectional)(_\d+)?"
)
_MAX_LAYERS = 64


@dataclass
class _Group:
    """The arrays of one layer."""

    path: str
    arrays: dict[str, Array] = field(default_factory=dict)  # last part of the name, without `:0` -> array


def find_keras_roles(
    arrays: NamedArrays,
    kind: str,
    library: str,
    *,
    config: Any = None,
    names: Mapping[str, str] | None = None,
    order: Sequence[str] = (),
    tokens: Tokens | None = None,
    resets_after: bool = False,
) -> ForeignModel:
    """Return the model whose weights these are.

    Args:
        arrays: path -> array. Optimizer slots and counters must be left out.
        kind: of the file, for messages.
        library: that made it.
        config: what Keras wrote about the layers, as parsed JSON; None if the file has none.
        names: path of a group -> the name of its layer, as Keras 3 writes it.
        order: names of the GRU layers in their order, as the user gives them.
        tokens: the vocabulary, if the file has it.
        resets_after: the reset gates are known to act after the recurrent product, which biases show otherwise.

    Raises UnsupportedModel if it is another function, InvalidModelFile.
    """
    described = list(_layers_of(config)) if config is not None else []
    _check_config(described)
    grus = [config for kind, config in described if kind in ("GRU", "GRUCell")]
    resets_after = resets_after or (bool(grus) and all(config.get("reset_after") is True for config in grus))
    roles = sort_weights(arrays)
    for layer in roles.layers:
        if layer.input_bias is None and not resets_after:
            raise UnsupportedModel(
                f"{layer.name} has no bias, so the file doesn't say where its reset gate acts: save the whole model "
                "as .keras, which says it, or train it with use_bias=True"
            )
    embedding, dense = roles.embedding, roles.dense
    order = order or _order_of_config(described, roles.layers, names or {})
    num_inputs = embedding.shape[1] if embedding is not None else dense.shape[1]
    ordered = order_layers(roles.layers, num_inputs, int(dense.shape[0]), order)
    skips = any(layer == "Embedding" and config.get("mask_zero") for layer, config in described)
    return ForeignModel(kind, library, embedding, ordered, dense.T, roles.dense_bias, tokens, skips_row_0=skips)


@dataclass(frozen=True)
class KerasRoles:
    """The weights of a model by their roles; the order of its layers isn't known yet."""

    embedding: Array | None  # (V, E)
    layers: list[ForeignLayer]
    dense: Array  # (H, V)
    dense_bias: Array | None


def sort_weights(arrays: NamedArrays) -> KerasRoles:
    """Return what each array is, by shape and kind. Raises UnsupportedModel, InvalidModelFile."""
    layers: list[ForeignLayer] = []
    embeddings: list[tuple[str, Array]] = []
    denses: list[tuple[str, Array, Array | None]] = []
    bare: list[tuple[str, Array]] = []
    for group in _groups(arrays):
        _sort_in(group, layers, embeddings, denses, bare)
    embedding, dense, bias = _ends(embeddings, denses, bare, layers)
    return KerasRoles(embedding, layers, dense, bias)


def _groups(arrays: NamedArrays) -> Iterator[_Group]:
    """Yield the arrays of each layer, in the order of the file."""
    groups: dict[str, _Group] = {}
    for path, array in arrays.items():
        parent, _, leaf = re.sub(r":\d+$", "", path).rpartition("/")
        groups.setdefault(parent, _Group(parent)).arrays[leaf.lstrip("_")] = array
    for group in groups.values():
        is_list = len(group.arrays) > 3 or group.path.endswith("_trainable_variables")
        if is_list and all(leaf.isdecimal() for leaf in group.arrays):
            yield from _split(group)  # a list of all variables
        else:
            yield group


def _split(group: _Group) -> Iterator[_Group]:
    """Yield the layers whose variables follow one another in a list."""
    leaves = sorted(group.arrays, key=int)
    position = 0
    while position < len(leaves):
        here = [group.arrays[leaf] for leaf in leaves[position : position + 3]]
        size = 1
        if len(here) > 2 and _is_recurrent(here[0], here[1]):
            size = 3 if here[2].ndim == 1 or here[2].shape[0] == 2 else 2
        elif len(here) > 1 and here[0].ndim == 2 and here[1].shape == here[0].shape[1:]:
            size = 2
        yield _Group(f"{group.path}/{leaves[position]}", {str(i): array for i, array in enumerate(here[:size])})
        position += size


def _is_recurrent(kernel: Array, recurrent: Array) -> bool:
    """Return whether these can be the kernels of a recurrent layer with 1, 3 or 4 gates."""
    return (
        kernel.ndim == 2
        and recurrent.ndim == 2
        and kernel.shape[1] == recurrent.shape[1]
        and recurrent.shape[1] in (recurrent.shape[0], 3 * recurrent.shape[0], 4 * recurrent.shape[0])
    )


def _sort_in(
    group: _Group,
    layers: list[ForeignLayer],
    embeddings: list[tuple[str, Array]],
    denses: list[tuple[str, Array, Array | None]],
    bare: list[tuple[str, Array]],
) -> None:
    """Add a layer's arrays to those of its kind. Raises UnsupportedModel."""
    arrays, path = group.arrays, shown(group.path) or "the file"
    get = arrays.get
    kernel, recurrent, bias = get("kernel"), get("recurrent_kernel"), get("bias")
    table = get("embeddings")
    if all(leaf.isdecimal() for leaf in arrays):
        listed = [arrays[leaf] for leaf in sorted(arrays, key=int)]
        if len(listed) >= 2 and _is_recurrent(listed[0], listed[1]):
            kernel, recurrent = listed[:2]
            bias = listed[2] if len(listed) > 2 else None
        elif len(listed) == 2 and listed[0].ndim == 2 and listed[1].ndim == 1:
            kernel, bias = listed
        elif len(listed) == 1:
            bare.append((path, listed[0]))
            return
    if recurrent is not None and kernel is not None:
        if _BACKWARD.search(path):
            raise UnsupportedModel(
                f"{path} is bidirectional: a text is generated forwards. Train it without Bidirectional"
            )
        layers.append(_gru(path, kernel, recurrent, bias))
    elif table is not None and len(arrays) == 1 and table.ndim == 2:
        embeddings.append((path, table))
    elif kernel is not None and kernel.ndim == 2 and (bias is None or bias.shape == kernel.shape[1:]):
        if len(arrays) > 1 + (bias is not None):
            raise UnsupportedModel(f"{path} has weights that are not those of a dense layer; {NEEDED} is needed")
        denses.append((path, kernel, bias))
    else:
        shapes = ", ".join(f"{shown(leaf)} {list(array.shape)}" for leaf, array in list(arrays.items())[:4])
        name = " ".join([group.path, *arrays])
        what = next((what for pattern, what in _OTHER_KINDS if pattern.search(name)), "a layer of another kind")
        raise UnsupportedModel(
            f"{path} is {what} ({shapes}), which this service's models don't have; {NEEDED} is needed"
        )


def _gru(path: str, kernel: Array, recurrent: Array, bias: Array | None) -> ForeignLayer:
    """Return a GRU layer. Raises UnsupportedModel for another recurrent layer, InvalidModelFile."""
    if kernel.ndim != 2 or recurrent.ndim != 2 or recurrent.shape[1] != kernel.shape[1]:
        raise InvalidModelFile(f"{path}: kernels of the shapes {list(kernel.shape)} and {list(recurrent.shape)}")
    units = recurrent.shape[0]
    if recurrent.shape[1] != 3 * units:
        gates = {units: "a SimpleRNN", 4 * units: "an LSTM"}.get(recurrent.shape[1], "no GRU")
        raise UnsupportedModel(f"{path} is {gates}; {NEEDED} is needed: train it with GRU layers")
    if bias is None:
        return ForeignLayer(path, kernel.T, recurrent.T, None, None, "zrn")
    if bias.shape == (3 * units,):
        raise UnsupportedModel(RESET_BEFORE.format(path))
    if bias.shape == (6 * units,):  # CuDNNGRU
        parts = [gate.reshape(units, -1) for gate in np.hsplit(kernel, 3)]
        recurrent_parts = np.hsplit(recurrent, 3)
        both = bias.reshape(2, 3 * units)
        return ForeignLayer(path, np.concatenate(parts), np.concatenate(recurrent_parts), both[0], both[1], "zrn")
    if bias.shape != (2, 3 * units):
        raise InvalidModelFile(f"{path}: a bias of the shape {list(bias.shape)}, and {units} units")
    return ForeignLayer(path, kernel.T, recurrent.T, bias[0], bias[1], "zrn")


def _ends(
    embeddings: list[tuple[str, Array]],
    denses: list[tuple[str, Array, Array | None]],
    bare: list[tuple[str, Array]],
    layers: list[ForeignLayer],
) -> tuple[Array | None, Array, Array | None]:
    """Return the embedding (V, E) or None, and kernel (H, V) and bias of the output layer. Raises UnsupportedModel."""
    # A layer whose only variable is a matrix is an embedding, or a dense layer without a bias.
    for path, array in bare:
        if array.ndim != 2:
            raise UnsupportedModel(f"{path} is a layer of another kind ({list(array.shape)}); {NEEDED} is needed")
    if not embeddings and not denses and bare:
        table, output = _which(bare, layers)
        embeddings, denses = table, [(*one, None) for one in output]
    elif embeddings:
        denses += [(*one, None) for one in bare]
    else:
        embeddings = bare
    if len(embeddings) > 1 or len(denses) > 1:
        extra = [path for path, *_ in (embeddings if len(embeddings) > 1 else denses)]
        what = "embeddings" if len(embeddings) > 1 else "dense layers"
        raise UnsupportedModel(f"the file has {len(extra)} {what} ({', '.join(extra[:4])}); {NEEDED} is needed")
    embedding = embeddings[0][1] if embeddings else None
    if denses:
        _, dense, bias = denses[0]
    elif embedding is not None and layers and embedding.shape[1] == layers[-1].num_units:
        dense, bias = embedding.T, None  # tied
    else:
        raise UnsupportedModel(f"the file has no output layer; {NEEDED} is needed")
    if embedding is not None and embedding.shape[0] != dense.shape[1]:
        raise UnsupportedModel(
            f"the embedding has {embedding.shape[0]} rows and the output layer {dense.shape[1]}: both must "
            "know the same characters"
        )
    return embedding, dense, bias


def _which(
    bare: list[tuple[str, Array]], layers: list[ForeignLayer]
) -> tuple[list[tuple[str, Array]], list[tuple[str, Array]]]:
    """Return which of one or two matrices is the embedding (V, E), and which is the kernel (H, V) of the output layer.

    A single one is an embedding that the output layer shares, or an output layer after one-hot inputs.
    Raises UnsupportedModel.
    """
    inputs, units = {layer.num_inputs for layer in layers}, {layer.num_units for layer in layers}
    choices = [(bare[:1], bare[1:]), (bare[1:], bare[:1])]
    fitting = [
        (tables, outputs)
        for tables, outputs in choices
        if all(table.shape[1] in (inputs if outputs else inputs & units) for _, table in tables)
        and all(output.shape[0] in units and (tables or output.shape[1] in inputs) for _, output in outputs)
        and all(table.shape[0] == output.shape[1] for _, table in tables for _, output in outputs)
    ]
    named = [
        (tables, outputs)
        for tables, outputs in fitting or choices
        if all(_EMBEDDING.search(path) for path, _ in tables) and all(_OUTPUT.search(path) for path, _ in outputs)
    ]
    if len(bare) > 2 or (len(fitting) != 1 and len(named) == 1):
        return named[0] if len(named) == 1 else choices[0]
    if len(fitting) > 1:
        raise UnsupportedModel(
            f"nothing in the file says which of the weights ({', '.join(path for path, _ in bare)}) are the embedding "
            "and which are the output layer: call one of them embedding and the other one output"
        )
    return fitting[0] if fitting else choices[0]


def check_layer_names(names: Sequence[str]) -> None:
    """Raise UnsupportedModel if a layer without weights computes something, by the names that Keras 3 gives layers."""
    for name in names:
        if _WITHOUT_WEIGHTS.fullmatch(name):
            raise UnsupportedModel(f"the model has the layer {shown(name)}; {NEEDED} is needed")


# The config


def _layers_of(config: Any, depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield class and config of each layer, in the order in which they compute. Layers inside wrappers follow these.

    Raises UnsupportedModel.
    """
    if depth > 8 or not isinstance(config, dict):
        return
    kind, inner = config.get("class_name"), config.get("config")
    layers = inner if isinstance(inner, list) else inner.get("layers") if isinstance(inner, dict) else None
    if isinstance(layers, list):
        if len(layers) > _MAX_LAYERS:
            raise UnsupportedModel(f"the model has {len(layers)} layers; {NEEDED} is needed")
        if isinstance(inner, dict) and "output_layers" in inner:
            layers = _chain(layers, inner["output_layers"])
        for layer in layers:
            yield from _layers_of(layer, depth + 1)
    elif isinstance(kind, str) and isinstance(inner, dict):
        if depth == 0:
            return  # a class of the user's own: its layers are known by their weights only
        nodes = config.get("inbound_nodes")
        if isinstance(nodes, list) and len(nodes) > 1 and kind not in _HARMLESS:
            raise UnsupportedModel(
                f"{shown(str(inner.get('name', kind)))} is applied {len(nodes)} times; {NEEDED} is needed"
            )
        if kind == "RNN" and isinstance(inner.get("cell"), dict):
            yield from _cells_of(inner, inner["cell"])
            return
        yield kind, inner
        wrapped = inner.get("layer")
        if isinstance(wrapped, dict):
            if kind == "TimeDistributed" and wrapped.get("class_name") not in ("Dense", "Dropout", "Activation"):
                raise UnsupportedModel(
                    f"{shown(str(inner.get('name', kind)))} applies {shown(str(wrapped.get('class_name')))} to each "
                    f"position alone; {NEEDED} is needed"
                )
            yield from _layers_of(wrapped, depth + 1)


def _cells_of(rnn: Mapping[str, Any], cell: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield class and config of the cells of an RNN layer: a GRUCell is a GRU layer."""
    inner = cell.get("config")
    if cell.get("class_name") == "StackedRNNCells" and isinstance(inner, dict) and isinstance(inner.get("cells"), list):
        if inner.get("reverse_state_order"):
            raise UnsupportedModel(
                f"the layer {shown(str(rnn.get('name')))} has reverse_state_order; {NEEDED} is needed"
            )
        for one in inner["cells"][:_MAX_LAYERS]:
            if isinstance(one, dict):
                yield from _cells_of(rnn, one)
        return
    kind = str(cell.get("class_name"))
    config = dict(inner) if isinstance(inner, dict) else {}
    config |= {key: rnn[key] for key in ("go_backwards", "time_major") if key in rnn}
    yield kind, config


def _chain(layers: list[Any], outputs: Any) -> list[Any]:
    """Return the layers of a functional model from its input to its logits. Raises UnsupportedModel if they branch."""
    named = {str(layer.get("name") or _of(layer, "name")): layer for layer in layers if isinstance(layer, dict)}
    ends = [name for name, index in _references(outputs) if name in named and not (_is_recurrent_layer(named[name]))]
    if len(set(ends)) != 1:
        raise UnsupportedModel(f"the model has {len(set(ends))} outputs that are no states; {NEEDED} is needed")
    found: list[Any] = []
    name = ends[0]
    while True:
        layer = named[name]
        if layer in found:
            raise UnsupportedModel(f"the layers of the model go in circles; {NEEDED} is needed")
        found.append(layer)
        nodes = layer.get("inbound_nodes")
        inputs = list(_references(nodes[0])) if isinstance(nodes, list) and nodes else []
        if _is_recurrent_layer(layer):
            states = [one for one, _ in inputs[1:] if one not in named or named[one].get("class_name") != "InputLayer"]
            if states:
                raise UnsupportedModel(
                    f"the layer {shown(name)} has its initial state from {shown(states[0])}: it must be zero; "
                    f"{NEEDED} is needed"
                )
            inputs = inputs[:1]
        if not inputs:
            break
        if len(inputs) != 1 or inputs[0][0] not in named:
            sources = ", ".join(shown(one) for one, _ in inputs[:4])
            raise UnsupportedModel(
                f"the layer {shown(name)} ({shown(str(layer.get('class_name')))}) reads several values ({sources}); "
                f"{NEEDED} is needed"
            )
        source, index = inputs[0]
        if index != 0:
            raise UnsupportedModel(f"the layer {shown(name)} reads the state of {shown(source)}; {NEEDED} is needed")
        name = source
    skipped = [one for one, layer in named.items() if layer not in found and layer.get("class_name") != "InputLayer"]
    if skipped:
        raise UnsupportedModel(
            f"the layer {shown(skipped[0])} isn't on the way from the input to the output; {NEEDED} is needed"
        )
    return found[::-1]


def _is_recurrent_layer(layer: Any) -> bool:
    return isinstance(layer, dict) and layer.get("class_name") in ("GRU", "CuDNNGRU", "RNN", "LSTM", "SimpleRNN")


def _of(layer: Mapping[str, Any], key: str) -> Any:
    config = layer.get("config")
    return config.get(key) if isinstance(config, dict) else None


def _references(value: Any, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield layer and index of output of each value that is named in a list of Keras 2 or 3."""
    if depth > 8:
        return
    if isinstance(value, list):
        if len(value) >= 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
            yield value[0], value[2]
            value = value[3:]  # named arguments
        for one in value[:64]:
            yield from _references(one, depth + 1)
    elif isinstance(value, dict):
        for one in list(value.values())[:64]:
            yield from _references(one, depth + 1)


def _check_config(described: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise UnsupportedModel if a layer computes what our models don't."""
    changed = ""  # the layer after which there may be none that reads more than rows
    probabilities = ""  # the layer after which there may be none with weights, nor another softmax
    for kind, config in described:
        name = shown(str(config.get("name", kind)))
        is_gru = kind in ("GRU", "CuDNNGRU", "GRUCell")
        if probabilities and (is_gru or kind in ("Embedding", "Dense")):
            raise UnsupportedModel(f"{probabilities} makes probabilities before the layer {name}; {NEEDED} is needed")
        if changed and is_gru:
            raise UnsupportedModel(f"{changed} changes the shape before the layer {name}; {NEEDED} is needed")
        activation = "softmax" if kind == "Softmax" else _activation(config.get("activation"))
        if kind in ("Softmax", "Dense", "Activation") and "softmax" in str(activation):
            if probabilities:
                raise UnsupportedModel(f"{name} is a softmax after that of {probabilities}; {NEEDED} is needed")
            probabilities = name
        if kind == "Softmax" and config.get("axis", -1) not in (-1, 2, [-1], [2]):
            raise UnsupportedModel(f"{name} is a softmax over another axis than that of the characters")
        if kind == "Reshape":
            changed = name
        if kind in _HARMLESS or kind in _WRAPPERS:
            continue
        if is_gru:
            _check_gru(name, kind, config)
        elif kind == "Embedding":
            continue
        elif kind in ("Dense", "Activation"):
            if activation not in _PROBABILITIES:
                raise UnsupportedModel(
                    f"{name} has the activation {shown(str(activation))}: "
                    "the output layer must be linear, or end in softmax"
                )
        else:
            what = {"LSTM": "an LSTM", "SimpleRNN": "a SimpleRNN", "CuDNNLSTM": "an LSTM"}.get(
                kind, f"of the kind {shown(kind)}"
            )
            raise UnsupportedModel(f"the layer {name} is {what}; {NEEDED} is needed: train it with such layers")


def _check_gru(name: str, kind: str, config: Mapping[str, Any]) -> None:
    if kind != "CuDNNGRU" and config.get("reset_after") is False:
        raise UnsupportedModel(RESET_BEFORE.format(name))
    if config.get("go_backwards"):
        raise UnsupportedModel(
            f"{name} reads backwards: a text is generated forwards. Train it with go_backwards=False"
        )
    if config.get("time_major"):
        raise UnsupportedModel(f"{name} has time_major=True: save it with time_major=False")
    expected = {"activation": "tanh", "recurrent_activation": "sigmoid"}
    for key, value in expected.items():
        found = _activation(config[key]) if key in config else value
        if found != value:
            raise UnsupportedModel(f"{name} has {key}={shown(str(found))}: train it with {key}={value!r}")


def _activation(value: Any) -> str | None:
    """Return the name of an activation, which newer versions write as an object."""
    if isinstance(value, dict):
        inner = value.get("config")
        value = inner if isinstance(inner, str) else value.get("class_name")
    return None if value is None else str(value).lower()


def _order_of_config(
    described: list[tuple[str, dict[str, Any]]], layers: Sequence[ForeignLayer], names: Mapping[str, str]
) -> list[str]:
    """Return the names of the GRU layers in the order of the config, as the file has them; none if it isn't known."""
    if len(layers) < 2:
        return []
    order: list[str] = []
    counts: dict[str, int] = defaultdict(int)
    for kind, config in described:
        if kind not in _SNAKE:
            continue
        snake = _SNAKE[kind]  # how Keras 3 numbers the groups of a container
        numbered = f"{snake}_{counts[snake]}" if counts[snake] else snake
        counts[snake] += 1
        name = str(config.get("name"))
        matching = [
            layer.name
            for layer in layers
            if name in (names.get(layer.name), names.get(layer.name.removesuffix("/cell/vars") + "/vars"))
        ]
        matching = matching or [layer.name for layer in layers if name in layer.name.split("/")]
        matching = matching or [layer.name for layer in layers if numbered in layer.name.split("/")]
        if len(matching) != 1:
            return []
        order.append(matching[0])
    return order if len(set(order)) == len(layers) else []

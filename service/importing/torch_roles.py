"""Finds embedding, GRU layers and output layer among the tensors of a PyTorch model, by shape and kind.

    nn.GRU      weight_ih_l0 (3H, I), weight_hh_l0 (3H, H), bias_ih_l0 (3H,), bias_hh_l0 (3H,), ...; gates r, z, n
    nn.GRUCell  the same without `_l0`
    embedding   weight (V, E); absent where the input is one-hot
    linear      weight (V, H), bias (V,); the weight may be the embedding's

What a program calls these modules is its own affair: only the last part of a name is given by PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import NEEDED, WEIGHTS_ONLY, Array, ForeignLayer, ForeignModel, order_layers, shown

RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(?:_l(\d{1,3}))?(_reverse)?")
_EMBEDDING = re.compile(r"emb|enc|wte|lookup|input", re.I)
_OUTPUT = re.compile(r"dec|dense|fc|lin|out|head|proj|logit|predict", re.I)
_OTHER_KINDS = (
    (re.compile(r"att(n|ention)|in_proj|query|self_", re.I), "attention"),
    (re.compile(r"norm|(^|\.)(ln|bn)\w*\.|running_mean", re.I), "normalisation"),
    (re.compile(r"conv", re.I), "a convolution"),
    (re.compile(r"(^|[._])h(idden)?_?0$|init\w*(state|hidden)", re.I), "an initial state that was learnt"),
)
# Modules that have no effect on a prediction, or the ones that are needed.
_MODULES = re.compile(
    r"torch\.nn\.modules\.(rnn\.GRU(Cell)?|sparse\.Embedding|linear\.(Linear|Identity)|dropout\.\w+|container\.\w+|"
    r"activation\.(Log)?Softmax|loss\.\w+|flatten\.\w+)|"
    r"torch\.nn\.parallel\.\w+\.(Distributed)?DataParallel"
)


class Shaped(Protocol):
    """A tensor whose shape is known, and whose numbers are not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        ...


S = TypeVar("S", bound=Shaped)


@dataclass(frozen=True)
class Found:
    """A model whose vocabulary isn't known yet."""

    embedding: Array | None
    layers: tuple[ForeignLayer, ...]
    dense: Array
    dense_bias: Array | None

    def model(self, kind: str, library: str, tokens: tuple[str | None, ...] | None) -> ForeignModel:
        """Return the foreign model with a vocabulary, if there is one."""
        return ForeignModel(
            kind, library, self.embedding, self.layers, self.dense, self.dense_bias, tokens, notes=(WEIGHTS_ONLY,)
        )


def is_model(names: Sequence[str]) -> bool:
    """Return whether tensors of these names have a recurrent layer among them."""
    return any(RECURRENT.fullmatch(name.rpartition(".")[2]) for name in names)


def check_classes(classes: Mapping[str, str]) -> None:
    """Raise UnsupportedModel if a module of PyTorch, by its path, computes what our models don't."""
    for path, name in classes.items():
        if name.startswith("torch.nn.") and not _MODULES.fullmatch(name):
            raise UnsupportedModel(
                f"the module {shown(path) or 'itself'} is of the kind "
                f"{shown(name.rpartition('.')[2])}, which this service's "
                f"models don't have; {NEEDED} is needed"
            )


def find_torch_roles(
    tensors: Mapping[str, S], load: Callable[[S], Array], order: Sequence[str], classes: Mapping[str, str]
) -> Found:
    """Return the model whose state dict this is.

    Args:
        tensors: name -> tensor of floating-point numbers, in the order of the file.
        load: reads one.
        order: names of the GRU layers in their order, as the user gives them.
        classes: path of a module -> its class, if the file says so.

    Raises UnsupportedModel, InvalidModelFile.
    """
    check_classes(classes)
    recurrent: dict[tuple[str, int], dict[str, S]] = {}
    others: dict[str, dict[str, S]] = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        match = RECURRENT.fullmatch(leaf)
        if match is None:
            where, what = (
                (prefix, leaf) if leaf in ("weight", "bias") else (name, "weight" if len(tensor.shape) == 2 else leaf)
            )
            others.setdefault(where, {})[what] = tensor
            continue
        if match[4]:
            raise UnsupportedModel(
                f"{shown(prefix or name)} is bidirectional: a text is generated forwards. Train it "
                "with bidirectional=False"
            )
        recurrent.setdefault((prefix, int(match[3] or 0)), {})[f"{match[1]}_{match[2]}"] = tensor
    layers = [
        _layer(shown(f"{prefix}.l{index}".lstrip(".")), parts, load) for (prefix, index), parts in recurrent.items()
    ]
    if not layers:
        raise UnsupportedModel(f"the file has no GRU layer; {NEEDED} is needed")
    embedding, dense, bias = _ends(others, layers, classes, load)
    vocab_size = dense.shape[0]
    ordered = order_layers(layers, embedding.shape[1] if embedding is not None else vocab_size, dense.shape[1], order)
    if embedding is not None and embedding.shape[0] != vocab_size:
        raise UnsupportedModel(
            f"the embedding has {embedding.shape[0]} rows and the output layer {vocab_size}: both "
            "must know the same characters"
        )
    table = load(embedding) if embedding is not None else None
    weight = table if table is not None and dense is embedding else load(dense)
    return Found(table, ordered, weight, load(bias) if bias is not None else None)


def _layer(name: str, parts: Mapping[str, S], load: Callable[[S], Array]) -> ForeignLayer:
    """Return a GRU layer. Raises UnsupportedModel for another recurrent layer, InvalidModelFile."""
    inputs, recurrent = parts.get("weight_ih"), parts.get("weight_hh")
    if inputs is None or recurrent is None or len(inputs.shape) != 2 or len(recurrent.shape) != 2:
        raise InvalidModelFile(f"{name} lacks its weights")
    rows, units = recurrent.shape
    if rows != 3 * units or "weight_hr" in parts:
        what = {units: "a plain RNN", 4 * units: "an LSTM"}.get(rows, "an LSTM" if "weight_hr" in parts else "no GRU")
        raise UnsupportedModel(f"{name} is {what}; {NEEDED} is needed: train it with nn.GRU")
    biases = [parts.get("bias_ih"), parts.get("bias_hh")]
    if inputs.shape[0] != rows or any(bias is not None and bias.shape != (rows,) for bias in biases):
        raise InvalidModelFile(f"{name}: its weights and biases have shapes that don't fit")
    input_bias, recurrent_bias = (load(bias) if bias is not None else None for bias in biases)
    return ForeignLayer(name, load(inputs), load(recurrent), input_bias, recurrent_bias, "rzn")


def _ends(
    others: Mapping[str, Mapping[str, S]],
    layers: Sequence[ForeignLayer],
    classes: Mapping[str, str],
    load: Callable[[S], Array],
) -> tuple[S | None, S, S | None]:
    """Return the embedding (V, E) or None, weight and bias of the output layer. Raises UnsupportedModel."""
    linear: dict[str, Mapping[str, S]] = {}
    bare: dict[str, S] = {}  # matrices without a bias: an embedding, or an output layer without a bias
    bias: S | None = None  # without a matrix: that of an output layer whose weight is the embedding's
    for path, parts in others.items():
        weight, own = parts.get("weight"), parts.get("bias")
        if weight is not None and len(weight.shape) == 2 and set(parts) <= {"weight", "bias"}:
            if own is not None:
                if own.shape != weight.shape[:1]:
                    raise InvalidModelFile(f"{shown(path)}: its weights and biases have shapes that don't fit")
                linear[path] = parts
            else:
                bare[path] = weight
        elif weight is None and own is not None and len(own.shape) == 1 and bias is None:
            bias = own
        else:
            _refuse(path, parts)
    if len(linear) > 1:
        raise UnsupportedModel(
            f"the model has {len(linear)} linear layers ({', '.join(map(shown, list(linear)[:4]))}); {NEEDED} is needed"
        )
    for path, parts in linear.items():
        if len(bare) > 1:
            extra = [path for path in bare if not _EMBEDDING.search(path)] or list(bare)
            _refuse(extra[0], {"weight": bare[extra[0]]})
        embedding = next(iter(bare.values()), None)
        if bias is not None:
            _refuse(path, parts)
        return embedding, parts["weight"], parts["bias"]
    if len(bare) == 2:
        table, weight = _which(bare, layers, classes, load)
        return table, weight, bias
    if len(bare) == 1:
        ((path, only),) = bare.items()
        if any(layer.num_inputs == only.shape[1] for layer in layers):
            return only, only, bias  # tied
        if any(layer.num_inputs == only.shape[0] for layer in layers):
            return None, only, bias  # one-hot inputs
    if len(bare) > 2:
        path = next((path for path in bare if not _EMBEDDING.search(path) and not _OUTPUT.search(path)), list(bare)[-1])
        _refuse(path, {"weight": bare[path]})
    raise UnsupportedModel(f"the file has no output layer; {NEEDED} is needed")


def _which(
    bare: Mapping[str, S], layers: Sequence[ForeignLayer], classes: Mapping[str, str], load: Callable[[S], Array]
) -> tuple[S, S]:
    """Return which of two matrices is the embedding, and which is the output layer. Raises UnsupportedModel."""
    (first, one), (second, other) = bare.items()
    choices = [(first, second, one, other), (second, first, other, one)]
    inputs, units = {layer.num_inputs for layer in layers}, {layer.num_units for layer in layers}
    fitting = [choice for choice in choices if choice[2].shape[1] in inputs and choice[3].shape[1] in units]
    if len(fitting) == 2:
        if np.array_equal(load(one), load(other)):
            return one, one  # tied
        fitting = [
            choice
            for choice in choices
            if classes.get(choice[0], "").endswith(".Embedding") or classes.get(choice[1], "").endswith(".Linear")
        ] or [choice for choice in choices if _EMBEDDING.search(choice[0]) and _OUTPUT.search(choice[1])]
    if len(fitting) != 1:
        raise UnsupportedModel(
            f"nothing in the file says which of {shown(first)} and {shown(second)} is the embedding "
            "and which is the output layer: call one of them embedding and the other one output"
        )
    return fitting[0][2], fitting[0][3]


def _refuse(path: str, parts: Mapping[str, S]) -> None:
    """Raise UnsupportedModel for a layer that our models don't have."""
    name = " ".join(f"{path}.{leaf}" for leaf in parts)
    what = next((what for pattern, what in _OTHER_KINDS if pattern.search(path) or pattern.search(name)), None)
    shapes = ", ".join(f"{shown(leaf)} {list(tensor.shape)}" for leaf, tensor in list(parts.items())[:4])
    raise UnsupportedModel(
        f"{shown(path)} is {what or 'a layer of another kind'} ({shapes}), which this service's "
        f"models don't have; {NEEDED} "
        "is needed"
    )

"""What every reader returns: the weights of a foreign model by their roles, and the order of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import UnsupportedModel

Array = NDArray[Any]  # floating-point numbers or BFLOAT16, as the file has them; often a read-only view of its bytes
NamedArrays = Mapping[str, Array]  # path or name in the file -> array
Tokens = tuple[str | None, ...]  # by index: a character, a word, or None for a row that is no character

# numpy lacks bfloat16. Its numbers are the upper halves of those of float32, and only `convert` widens them: a second
# array of twice the file's size would be more than an import may take.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
MAX_LAYERS = 8  # ModelConfig accepts no more
NEEDED = "a stack of GRU layers (reset gate after the recurrent product) between an embedding and one output layer"
WEIGHTS_ONLY = "the file holds weights and not what a program computes between them: it is taken to be nothing else"
_MAX_NAMED = 6
_NUMBERS = re.compile(r"_?\d+")


@dataclass(frozen=True, eq=False)
class ForeignLayer:
    """One GRU layer. Rows are gates, stacked in the order that `gates` says."""

    name: str  # in the file
    inputs: Array  # (3H, I)
    recurrent: Array  # (3H, H)
    input_bias: Array | None  # (3H,); None for zeros
    recurrent_bias: Array | None  # (3H,); None for zeros
    gates: str  # `rzn` as in torch, or `zrn` as in Keras and ONNX

    @property
    def num_units(self) -> int:
        """H."""
        return int(self.recurrent.shape[1])

    @property
    def num_inputs(self) -> int:
        """I."""
        return int(self.inputs.shape[1])


@dataclass(frozen=True)
class ForeignModel:
    """A model of another library with the same function as ours."""

    kind: str  # of the file, for messages and the card, such as `Keras weights`
    library: str  # that made it, with its version as far as the file says so, such as `keras 3.15.1`
    embedding: Array | None  # (V, E); None: the first layer reads one-hot vectors
    layers: tuple[ForeignLayer, ...]  # in the order in which they compute
    dense: Array  # (V, H)
    dense_bias: Array | None  # (V,); None for zeros
    tokens: Tokens | None = None  # the vocabulary, if the file has it
    notes: tuple[str, ...] = ()  # a line each for the user
    skips_row_0: bool = False  # a layer leaves inputs of the id 0 out, so that it can't be a character

    @property
    def vocab_size(self) -> int:
        """V: the number of rows, also of those that are no character."""
        return int(self.dense.shape[0])

    def with_tokens(self, tokens: Tokens | None) -> ForeignModel:
        """Return the model with a vocabulary."""
        return replace(self, tokens=tokens)

    def without_weights(self) -> ForeignModel:
        """Return what describes the model, so that the memory of its weights can be freed."""
        return replace(self, embedding=None, layers=(), dense=np.empty((0, 0)), dense_bias=None)


def order_layers(
    layers: Sequence[ForeignLayer], num_inputs: int | None, num_outputs: int, names: Sequence[str] = ()
) -> tuple[ForeignLayer, ...]:
    """Return GRU layers in the order in which they compute.

    Args:
        layers: in the order of the file.
        num_inputs: I of the first layer, None if that is not known.
        num_outputs: H of the last one.
        names: of the layers, in order, as the user or the file gives them; empty if nobody does.

    Raises UnsupportedModel if their sizes don't fit, or if several orders fit and nothing says which one is right.
    """
    if not layers:
        raise UnsupportedModel(f"the file has no GRU layer; {NEEDED} is needed")
    if len(layers) > MAX_LAYERS:
        raise UnsupportedModel(f"the file has {len(layers)} GRU layers; at most {MAX_LAYERS} are accepted")
    found = [order for order in _orders(list(layers), num_inputs) if order[-1].num_units == num_outputs]
    if not found:
        sizes = ", ".join(f"{layer.name}: {layer.num_inputs} -> {layer.num_units}" for layer in layers[:_MAX_NAMED])
        first = "unknown" if num_inputs is None else str(num_inputs)
        raise UnsupportedModel(
            f"the GRU layers don't fit together: input {first}, {sizes}, output layer {num_outputs}. {NEEDED} is needed"
        )
    if names:
        found = [order for order in found if _matches(order, names)]
        if len(found) != 1:
            raise UnsupportedModel(
                f"--layers-from {','.join(names)[:200]} doesn't name each GRU layer once, in an order that fits; "
                f"they are {', '.join(layer.name for layer in layers)}"
            )
    if len(found) > 1:
        by_number = sorted(layers, key=lambda layer: _numbered(layer.name))
        if len({tuple(stem for stem, _ in _numbered(layer.name)) for layer in layers}) > 1:
            raise UnsupportedModel(
                "nothing in the file says in which order its GRU layers compute: give --layers-from with their names, "
                f"first to last, such as --layers-from {','.join(layer.name for layer in by_number)}"
            )
        found = [order for order in found if order == by_number]
        if not found:
            raise UnsupportedModel("the numbers in the names of the GRU layers contradict their sizes")
    return tuple(found[0])


def _orders(layers: list[ForeignLayer], num_inputs: int | None) -> Iterator[list[ForeignLayer]]:
    """Yield the orders in which each layer reads what the one before it writes."""
    if not layers:
        yield []
    for index, layer in enumerate(layers):
        if num_inputs is None or layer.num_inputs == num_inputs:
            for rest in _orders(layers[:index] + layers[index + 1 :], layer.num_units):
                yield [layer, *rest]


def _matches(order: Sequence[ForeignLayer], names: Sequence[str]) -> bool:
    """Return whether each layer's name is, or has as a part, the name that was given for it."""
    return len(order) == len(names) and all(
        name == layer.name or name in re.split(r"[/\\.]", layer.name) for layer, name in zip(order, names, strict=True)
    )


def _numbered(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return a key that sorts gru, gru_1, gru_2, gru_10 in this order: each part of a path, and the numbers in it."""
    parts = re.split(r"[/\\.]", name)
    return [(_NUMBERS.sub("", part), tuple(map(int, re.findall(r"\d{1,9}", part)))) for part in parts]


def max_json_bytes(num_bytes: int) -> int:
    """Return how much JSON a file of this size may have: parsed, it takes up to 20 times as much memory."""
    return min(1 << 20, max(64 << 10, num_bytes // 8))


def shown(name: str) -> str:
    """Return a name of a foreign file in a form that is safe in every terminal and file."""
    text = name if len(name) <= 300 else name[:297] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text)

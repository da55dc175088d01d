"""TensorFlow checkpoints and SavedModels.

Of a SavedModel's graph the constants are read, for the vocabulary, and what its functions compute (`tensorflow_graph`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from service.errors import InvalidModelFile, UnsupportedModel
from service.importing.foreign import WEIGHTS_ONLY, Array, ForeignModel, Tokens, shown
from service.importing.keras_roles import find_keras_roles, sort_weights
from service.importing.protobuf import Message, text_of
from service.importing.tensor_bundle import INDEX, data_files, read_bundle, read_object_graph
from service.importing.tensorflow_graph import find_way
from service.importing.vocabulary import is_plausible

GRAPH, VARIABLES = "saved_model.pb", "variables/variables"
_LATEST = "checkpoint"  # a file that names the newest checkpoint of a folder
_MAX_GRAPH_BYTES = 256 << 20
_MAX_CANDIDATES = 16
_MAX_TOKEN_BYTES = 64
_MAX_LISTED = 70_000  # integers of a constant, in the rare form that lists them one by one
_NOT_THE_MODEL = (".OPTIMIZER_SLOT", "optimizer/", "_CHECKPOINTABLE", "keras_api/", "save_counter", "metrics/")
# Counters that an optimizer has, by Keras 3 and 2: everything at the same place is the optimizer, whatever its name.
_OF_OPTIMIZER = re.compile(r"(.+/)(?:_?iterations|iter|_?learning_rate)/\.ATTRIBUTES/VARIABLE_VALUE")
_STATE = re.compile(r"/states/\d+/\.ATTRIBUTES/VARIABLE_VALUE$")  # of a stateful layer, between two calls
_LISTED_BY_OPTIMIZER = "/_trainable_variables/"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_VALUE_BYTES = _VALUE.encode()
_BACKWARD = b"backward_layer"  # what Keras calls a layer of Bidirectional
_STRING, _INT64 = 7, 9  # DataType


def find_checkpoint(path: Path) -> Path | None:
    """Return the path without `.index` of the checkpoint that a path means; None if it means none.

    A path means a checkpoint by its name without an ending, by one of its files, or by the folder that has it.
    """
    name = path.name
    for stem in (name, name.removesuffix(INDEX), re.sub(r"\.data-\d{5}-of-\d{5}$", "", name)):
        if stem and path.with_name(stem + INDEX).is_file():
            return path.with_name(stem)
    if not path.is_dir() or (path / GRAPH).exists():
        return None
    latest = path / _LATEST
    if latest.is_file():
        with latest.open("rb") as file:
            match = re.search(rb'^model_checkpoint_path: "([^"\n]{1,400})"', file.read(4096), re.MULTILINE)
        # The path is where it was written; the file is here now.
        stem = match[1].decode("utf-8", "replace").rpartition("/")[2] if match else ""
        if stem and (path / (stem + INDEX)).is_file():
            return path / stem
    found = sorted(path.glob("*" + INDEX))
    if len(found) > 1:
        raise InvalidModelFile(
            f"{shown(name)} has {len(found)} checkpoints: name one of them, such as {shown(found[-1].name)}"
        )
    return found[0].with_name(found[0].name.removesuffix(INDEX)) if found else None


def checkpoint_files(prefix: Path) -> list[Path]:
    """Return the files of a checkpoint. Raises InvalidModelFile, OSError."""
    return [prefix.with_name(prefix.name + INDEX), *data_files(prefix)]


def read_checkpoint(prefix: Path, order: Sequence[str]) -> ForeignModel:
    """Read a checkpoint by its path without `.index`. Raises InvalidModelFile, UnsupportedModel."""
    model = find_keras_roles(_weights_of(prefix)[1], "TensorFlow checkpoint", "tensorflow", order=order)
    return replace(model, notes=(*model.notes, WEIGHTS_ONLY))


def read_saved_model(folder: Path, order: Sequence[str]) -> ForeignModel:
    """Read a SavedModel. Raises InvalidModelFile, UnsupportedModel."""
    path = folder / GRAPH
    if path.stat().st_size > _MAX_GRAPH_BYTES:
        raise InvalidModelFile(f"{shown(path.name)} is larger than the graph of any model")
    graph = Message(memoryview(path.read_bytes()))
    objects, arrays = _weights_of(folder / VARIABLES)
    way = find_way(graph, objects, arrays, sort_weights(arrays))
    order = way.layers if way is not None else order
    model = find_keras_roles(arrays, "TensorFlow SavedModel", "tensorflow", order=order, resets_after=way is not None)
    if way is None:
        model = replace(model, notes=(*model.notes, WEIGHTS_ONLY))
    return replace(model, tokens=_vocabulary(graph, model.vocab_size), skips_row_0=way is not None and way.skips_row_0)


def _weights_of(prefix: Path) -> tuple[bytes, dict[str, Array]]:
    """Return what a checkpoint says about its objects, and the arrays of its model by name."""
    objects = read_object_graph(prefix)
    if _BACKWARD in objects:
        raise UnsupportedModel(
            "the model is bidirectional: a text is generated forwards. Train it without Bidirectional"
        )
    named = {key.removesuffix(_VALUE): array for key, array in read_bundle(prefix, _not_the_model).items()}
    if any(key.startswith("variables/") for key in named):  # model.export lists the same variables several times
        named = {key: array for key, array in named.items() if not key.startswith("_all_variables/")}
    return objects, named


def _not_the_model(names: list[str]) -> set[str]:
    """Return the names of the variables of optimizers and of counters."""
    optimizers = tuple({match[1] for name in names if (match := _OF_OPTIMIZER.fullmatch(name))})
    # TensorFlow stores a variable under its shortest name, which may be its name in an optimizer's list.
    return {
        name
        for name in names
        if _LISTED_BY_OPTIMIZER not in name
        and (name.startswith(optimizers) or any(part in name for part in _NOT_THE_MODEL) or _STATE.search(name))
    }


def _vocabulary(graph: Message, num_rows: int) -> Tokens | None:
    """Return the vocabulary of the StringLookup layers of a graph, with None for the rows that it doesn't number.

    A table's keys and values are two constants of one length: characters, and the ids from 1, or from 2 after padding.
    """
    texts: list[Tokens] = []
    firsts: dict[int, set[int]] = {}  # how many ids follow one another -> the first of them
    for constant in _constants(graph, num_rows):
        if isinstance(constant, tuple):
            if len(texts) < _MAX_CANDIDATES and len(constant) >= num_rows - 2:
                texts.append(constant)
        elif len(constant) > 1 and (np.diff(constant) == 1).all():
            firsts.setdefault(len(constant), set()).add(int(constant[0]))
    for tokens in texts:
        first = firsts.get(len(tokens), set())
        if len(first) == 1 and 0 <= min(first) <= num_rows - len(tokens):
            before = min(first)
            tokens = (None,) * before + tokens + (None,) * (num_rows - len(tokens) - before)
        if is_plausible(tokens, num_rows):
            return tokens
    return None


def _constants(graph: Message, max_length: int) -> Iterator[Tokens | np.ndarray]:
    """Yield the constants of a graph and its functions that are lists of at most `max_length` texts or integers."""
    for node in _nodes(graph):
        yield from _constant(node, max_length)


def _nodes(graph: Message) -> Iterator[Message]:
    """Yield the nodes of a graph and of its functions."""
    for meta in graph.messages(2):
        definition = meta.message(2)
        yield from definition.messages(1)
        for function in definition.message(2).messages(1):
            yield from function.messages(3)


def _constant(node: Message, max_length: int) -> Iterator[Tokens | np.ndarray]:
    if bytes(node.bytes(2)[:8]) != b"Const":
        return
    for attribute in node.messages(5):
        if bytes(attribute.bytes(1)[:8]) != b"value":
            continue
        tensor = attribute.message(2).message(8)
        dtype = tensor.integer(1)
        if dtype == _STRING:
            tokens: list[str | None] = []
            for item in tensor.all(8):
                if len(item) > _MAX_TOKEN_BYTES or len(tokens) >= max_length or bytes(item).endswith(_VALUE_BYTES):
                    return  # too long, too many, or the names in a checkpoint
                tokens.append(text_of(item))
            if len(tokens) > 1:
                yield tuple(tokens)
        elif dtype == _INT64:
            content = tensor.bytes(4)
            if len(content) % 8 == 0 and 8 < len(content) <= 8 * max_length:
                yield np.frombuffer(content, "<i8")
            elif not len(content):
                yield np.array(tensor.integers(10, _MAX_LISTED), np.int64)

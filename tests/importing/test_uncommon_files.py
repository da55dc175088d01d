"""Files as people have them beside the usual ones: they are read right, or refused by name, and take bounded memory."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from service.errors import UnsupportedModel
from service.importing.detection import read_foreign
from service.importing.protobuf import field
from service.importing.vocabulary import fit, tokens_of_option
from tests.harness.foreign_models import (
    CHARSET,
    UNITS,
    checkpointed,
    imported_log_probs,
    keras_config,
    keras_log_probs,
    keras_weights,
    sequential,
    write_bundle,
    write_hdf5,
    write_keras,
    write_saved_model,
)
from tests.importing.test_hostile import bounded
from tests.importing.test_onnx import graph, node, replaced, tensor, write
from tests.importing.test_onnx import same as same_onnx
from tests.importing.test_torch import IDS, Net, V, same, saved

# PyTorch


def test_torch__checkpoint_with_the_losses_of_every_step(tmp_path: Path) -> None:
    net = Net()
    checkpoint = {
        "model_state_dict": net.state_dict(),
        "losses": [4.2 / step for step in range(1, 40_000)],
        "steps": list(range(20_000)),
        "text": "“Now is the winter of our discontent” — " * 10_000,
    }
    same(saved(tmp_path / "a.pt", checkpoint), net)
    same(saved(tmp_path / "b.pt", checkpoint, _use_new_zipfile_serialization=False), net)
    assert bounded(tmp_path / "a.pt") == ""
    assert bounded(tmp_path / "b.pt") == ""


def test_torch__checkpoint_with_a_whole_optimizer(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.from_numpy(IDS)).sum().backward()
    optimizer.step()
    same(saved(tmp_path / "a.pt", {"model": net, "optimizer": optimizer}), net)


def test_torch__module_in_data_parallel(tmp_path: Path) -> None:
    net = Net()
    same(saved(tmp_path / "a.pt", nn.DataParallel(net)), net)


def test_torch__embedding_that_limits_the_norm_of_its_rows_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.lookup.max_norm = 0.1
    with pytest.raises(UnsupportedModel, match="lookup has max_norm=0.1"):
        read_foreign(saved(tmp_path / "a.pt", net))


def flattened(net: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return a state dict whose tensors are parts of one array, as CUDA arranges the weights of a GRU."""
    state = net.state_dict()
    flat = torch.cat([one.reshape(-1) for one in state.values()]).to(dtype)
    parts = flat.split([one.numel() for one in state.values()])
    return {name: part.view(one.shape) for (name, one), part in zip(state.items(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False])
def test_torch__weights_in_one_array_are_read_once(tmp_path: Path, dtype: torch.dtype, is_zip: bool) -> None:
    net = nn.Module()
    net.emb, net.gru, net.out = nn.Embedding(V, 8), nn.GRU(8, 320, 4), nn.Linear(320, V)
    path = saved(tmp_path / "a.pt", flattened(net, dtype), _use_new_zipfile_serialization=is_zip)
    assert bounded(path) == ""
    small = Net(2)
    if dtype is torch.float32:
        same(saved(tmp_path / "b.pt", flattened(small), _use_new_zipfile_serialization=is_zip), small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_import__half_precision_takes_bounded_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    net = nn.Module()
    net.emb, net.gru, net.out = nn.Embedding(V, 8), nn.GRU(8, 1024, 1), nn.Linear(1024, V)
    state = {name: one.to(dtype) for name, one in net.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert bounded(tmp_path / "a.safetensors") == ""
    assert bounded(saved(tmp_path / "a.pt", state)) == ""


def test_torch__tensors_that_overlap_are_not_multiplied(tmp_path: Path) -> None:
    units = 300
    flat = torch.ones(3 * units * units)
    state = {"emb.weight": torch.ones(V, units), "out.weight": torch.ones(V, units), "out.bias": torch.ones(V)}
    for index in range(8):
        for part in ("ih", "hh"):
            state[f"gru.weight_{part}_l{index}"] = flat.view(3 * units, units)
    assert "overlap" in bounded(saved(tmp_path / "a.pt", state))


def test_archive__members_that_expand_to_more_than_the_archive_together_are_refused(tmp_path: Path) -> None:
    units = 512
    net = nn.Module()
    net.emb, net.gru, net.out = nn.Embedding(V, units), nn.GRU(units, units, 8), nn.Linear(units, V)
    state = {name: torch.zeros_like(one) for name, one in net.state_dict().items()}
    whole = saved(tmp_path / "whole.pt", state)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("padding", np.random.default_rng(0).bytes(4 << 20))
    assert "expand" in bounded(tmp_path / "a.pt")


# Vocabularies


def probabilities(path: Path, ids: np.ndarray) -> np.ndarray:
    return imported_log_probs(path)(ids)


@pytest.mark.parametrize("kind", ["char2idx", "idx2char"])
def test_vocabulary__rows_after_the_numbered_characters_are_left_out(tmp_path: Path, kind: str) -> None:
    net = Net(vocab=V + 1)
    net.eval()
    numbered: dict[Any, Any] = {char: index for index, char in enumerate(CHARSET)}
    if kind == "idx2char":
        numbered = {index: char for char, index in numbered.items()}
    with torch.no_grad():
        expected = net(torch.from_numpy(IDS)).numpy()[:, :V]
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    path = saved(tmp_path / "a.pt", {"model": net.state_dict(), kind: numbered})
    np.testing.assert_allclose(probabilities(path, IDS), expected, atol=3e-6)


def test_vocabulary__numbers_in_a_charset_file_are_those_of_the_rows(tmp_path: Path) -> None:
    import json

    file = tmp_path / "chars.json"
    file.write_text(json.dumps({char: index for index, char in enumerate(CHARSET)}))
    tokens, _ = fit(tokens_of_option(str(file), V + 2), V + 2, "x")
    assert tokens == (*CHARSET, None, None)


def test_vocabulary__array_of_characters(tmp_path: Path) -> None:
    net = Net()
    path = saved(tmp_path / "a.pt", {"model": net.state_dict(), "idx2char": np.array(list(CHARSET))})
    same(path, net, None)
    same(saved(tmp_path / "b.pt", {"m": net.state_dict(), "chars": np.array(list(CHARSET), object)}), net, None)


# Keras


def test_keras__masked_inputs_are_refused_where_a_character_is_masked(tmp_path: Path) -> None:
    config = keras_config()
    config["config"]["layers"][0]["config"]["mask_zero"] = True
    weights = keras_weights()
    path = write_keras(tmp_path / "a.keras", sequential(weights), config)
    with pytest.raises(UnsupportedModel, match="mask_zero=True"):
        imported_log_probs(path, CHARSET)
    weights = keras_weights(vocab=V + 1)
    path = write_keras(tmp_path / "b.keras", sequential(weights), config)
    masked = keras_log_probs(weights, IDS + 1)[:, 1:]
    masked -= np.log(np.exp(masked).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), masked, atol=2e-6)


@pytest.mark.parametrize("dim", [5, UNITS, V])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("names", [("embedding", "dense"), ("dense", "embedding"), ("zeichen", "ausgabe")])
def test_keras__output_without_bias_is_told_from_the_embedding(
    tmp_path: Path, dim: int, num_layers: int, names: tuple[str, str]
) -> None:
    for vocab in (V, UNITS):
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
        weights = keras_weights(2, dim=V)
        weights.embedding = np.eye(V, dtype=np.float32)
        arrays = sequential(weights)
        del arrays["layers/table/vars/0"]
        if not bias:
            weights.bias = np.zeros_like(weights.bias)
            del arrays["layers/head/vars/1"]
        path = write_hdf5(tmp_path / f"{bias}.weights.h5", arrays)
        np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


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
            stem = (name == "some" and "opt") or "optimizer"
            arrays |= {f"{stem}/_variables/{2 + index}": array for index, array in enumerate([*every, *every])}
            arrays |= {f"{stem}/_iterations": np.array(5), f"{stem}/_learning_rate": np.array(1e-3, "f4")}
            path = write_bundle(
                tmp_path / f"{name}{num_layers}", {f"{key}{ending}": one for key, one in arrays.items()}
            )
            np.testing.assert_allclose(imported_log_probs(path, CHARSET)(IDS), keras_log_probs(weights, IDS), atol=2e-6)


@pytest.mark.parametrize(("operation", "refused"), [("Relu", True), ("ReverseV2", True), ("Tanh", False)])
def test_tensorflow__graph_with_other_operations_is_refused(tmp_path: Path, operation: str, refused: bool) -> None:
    folder = write_saved_model(tmp_path / "m", keras_weights(vocab=V + 1), CHARSET, range(1, V + 1))
    path = folder / "saved_model.pb"
    function = field(1, field(3, field(1, "name") + field(2, operation)))
    path.write_bytes(path.read_bytes() + field(2, field(2, field(2, function))))
    if refused:
        with pytest.raises(UnsupportedModel, match=f"operation {operation}"):
            read_foreign(folder)
    else:
        assert read_foreign(folder)[0].tokens == (None, *CHARSET)


def test_tensorflow__graph_that_masks_a_character_is_refused(tmp_path: Path) -> None:
    folder = write_saved_model(tmp_path / "m", keras_weights(), CHARSET, range(V))
    path = folder / "saved_model.pb"
    imported_log_probs(folder)
    path.write_bytes(path.read_bytes() + field(2, field(2, field(1, field(2, "NotEqual")))))
    with pytest.raises(UnsupportedModel, match="mask_zero=True"):
        imported_log_probs(folder)


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
    import h5py

    for name in ("re_lu", "add_3", "rescaling", "masking"):
        path = write_hdf5(tmp_path / "m.weights.h5", sequential(keras_weights()))
        read_foreign(path)
        with h5py.File(path, "a") as file:
            file.create_group(f"layers/{name}/vars")
        with pytest.raises(UnsupportedModel, match=f"the layer {name}"):
            read_foreign(path)


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


# ONNX


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
            same_onnx(path, keras_weights())


def test_onnx__weights_that_are_cast(tmp_path: Path) -> None:
    weights = keras_weights()
    weights.dense = weights.dense.astype(np.float16).astype(np.float32)
    parts = [one for one in graph(weights) if not one.endswith(tensor("w", weights.dense)[-20:])]
    parts += [tensor("half", weights.dense.astype(np.float16)), node("Cast", ["half"], ["w"], to=1)]
    same_onnx(write(tmp_path / "a.onnx", parts), weights)
    parts = [one for one in graph(weights) if not one.endswith(tensor("w", weights.dense)[-20:])]
    parts += [tensor("int", weights.dense.astype(np.int64)), node("Cast", ["int"], ["w"], to=1)]
    weights.dense = weights.dense.astype(np.int64).astype(np.float32)
    same_onnx(write(tmp_path / "b.onnx", parts), weights)

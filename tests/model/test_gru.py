"""The network: the reference equals its formula, and the folded network equals the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from tests.harness.models import random_tensors, tiny_config


@pytest.fixture(params=[1, 2, 3])
def model(request: pytest.FixtureRequest) -> GRUCharModel:
    config = tiny_config(num_layers=request.param)
    tensors = random_tensors(config)
    noise = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if "bias" in name:
            tensor += noise.normal(size=tensor.shape).astype(np.float32)
    return GRUCharModel.from_tensors(config, tensors)


def step_by_formula(model: GRUCharModel, index: int, hidden: np.ndarray) -> np.ndarray:
    """Return the (L, H) state after one character, in float64, by the formula in the docstring of GRUCharModel."""

    def sigmoid(a: Any) -> Any:
        return 1 / (1 + np.exp(-a))

    after = []
    x = model.embedding.weight.detach().numpy()[index].astype(np.float64)
    for layer, weights in enumerate(model.gru.all_weights):
        w_i, w_h, b_i, b_h = (weight.detach().numpy().astype(np.float64) for weight in weights)
        (i_r, i_z, i_n), (h_r, h_z, h_n) = np.split(w_i @ x + b_i, 3), np.split(w_h @ hidden[layer] + b_h, 3)
        r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
        n = np.tanh(i_n + r * h_n)
        x = (1 - z) * n + z * hidden[layer]
        after.append(x)
    stacked: np.ndarray = np.stack(after)
    return stacked


def test_gru__follows_the_formula_in_its_docstring(model: GRUCharModel) -> None:
    ids = torch.randint(0, model.config.vocab_size, (20,))
    hidden = np.zeros((model.config.num_layers, model.config.num_units))
    for index in ids.tolist():
        hidden = step_by_formula(model, index, hidden)
    _, final = model(ids[None], model.initial_hidden(1))
    np.testing.assert_allclose(final[:, 0].detach().numpy(), hidden, atol=1e-6)


def test_folded_gru__equals_the_reference(model: GRUCharModel) -> None:
    folded, ids = FoldedGRU(model), torch.randint(0, model.config.vocab_size, (50,))
    states, hidden = folded.scan(ids, folded.initial_hidden())
    logits, reference_hidden = model(ids[None], model.initial_hidden(1))
    torch.testing.assert_close(folded.logits(states), logits[0].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, reference_hidden[:, 0].detach(), atol=1e-6, rtol=0)


def test_folded_gru__scanning_in_parts_gives_the_same_bits_as_one_scan(model: GRUCharModel) -> None:
    folded, ids = FoldedGRU(model), torch.randint(0, model.config.vocab_size, (30,))
    _, whole = folded.scan(ids, folded.initial_hidden())
    hidden = folded.initial_hidden()
    for part in ids.split([1, 7, 0, 22]):
        _, hidden = folded.scan(part, hidden)
    assert torch.equal(hidden, whole)


def test_folded_gru__does_not_change_the_weights_it_is_made_from(model: GRUCharModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FoldedGRU(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_config__lists_every_weight_with_its_shape(model: GRUCharModel) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == model.config.tensor_shapes()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == model.config.num_parameters

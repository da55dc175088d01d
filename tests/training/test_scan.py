"""The fast scan and the loss over it: gradients against autograd's in float64, for every way it can be used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.gru import GRUCharModel
from service.training.dropout import drop, keep_mask
from service.training.network import DropoutRates, WindowLoss, initialise, product_dtype
from service.training.scan import ScanBuffers, gru_scan
from tests.harness.models import tiny_config

STEPS, BATCH, UNITS, VOCAB = 7, 3, 5, 6


def reference(gates: Tensor, index: Tensor | None, hidden: Tensor, weight: Tensor, bias_hn: Tensor) -> Tensor:
    """The same scan left to autograd, (T, B, H)."""
    states = []
    for t in range(STEPS):
        x_n, x_r, x_z = (gates[t] if index is None else gates[index[t]]).chunk(3, dim=1)
        h_r, h_z, h_n = (hidden @ weight.t()).chunk(3, dim=1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * (h_n + bias_hn))
        hidden = (1 - z) * n + z * hidden
        states.append(hidden)
    return torch.stack(states)


@pytest.mark.parametrize("with_index", [True, False])
def test_states_and_gradients_agree_with_autograd(with_index: bool) -> None:
    draws = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draws)

    index = torch.randint(0, VOCAB, (STEPS, BATCH), generator=draws) if with_index else None
    gates = normal(VOCAB, 3 * UNITS) if with_index else normal(STEPS, BATCH, 3 * UNITS)
    inputs = [tensor.requires_grad_() for tensor in (gates, normal(3 * UNITS, UNITS), normal(UNITS))]
    hidden, grad = normal(BATCH, UNITS), normal(STEPS, BATCH, UNITS)
    expected = reference(inputs[0], index, hidden, inputs[1], inputs[2])
    buffers = ScanBuffers(STEPS, BATCH, UNITS, torch.float64, torch.float64)
    for _ in range(2):  # the second time over used buffers
        states, last = gru_scan(inputs[0], index, hidden, inputs[1], inputs[2], buffers)
        torch.testing.assert_close(states, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(last, expected[-1], atol=1e-12, rtol=0)
        mine = torch.autograd.grad(states, inputs, grad)
        theirs = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_whole_gradient_agrees_with_the_reference_network(num_layers: int) -> None:
    model = GRUCharModel(tiny_config(num_layers=num_layers)).double()
    initialise(model, 1)
    window = torch.randint(0, model.config.vocab_size, (STEPS + 1, BATCH), generator=torch.Generator().manual_seed(4))
    hidden = torch.rand(num_layers, BATCH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) - 0.5
    losses, last = WindowLoss(model, torch.float64)(window, hidden)
    losses.mean().backward()
    mine = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    logits, reference_last = model(window[:-1].t(), hidden)
    loss = F.cross_entropy(logits.transpose(1, 2), window[1:].t())
    loss.backward()
    torch.testing.assert_close(losses.mean(), loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(last, reference_last, atol=1e-12, rtol=0)
    assert set(mine) == set(dict(model.named_parameters()))
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(mine[name], weight.grad, atol=1e-6, rtol=0, msg=name)
        assert weight.grad.abs().max() > 0


def test_bfloat16_products_stay_close_to_float32() -> None:
    model = GRUCharModel(tiny_config(num_units=128))
    initialise(model, 1)
    window = torch.randint(0, model.config.vocab_size, (33, 8))
    hidden = model.initial_hidden(8)
    exact, _ = WindowLoss(model, torch.float32)(window, hidden)
    rough, _ = WindowLoss(model, torch.bfloat16)(window, hidden)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_dropout_is_a_function_of_the_generator() -> None:
    model = GRUCharModel(tiny_config(num_layers=2))
    initialise(model, 1)
    window, rates = torch.randint(0, model.config.vocab_size, (9, 4)), DropoutRates(0.2, 0.3, 0.4)
    loss = WindowLoss(model, torch.float32)
    one, other, another = (
        loss(window, model.initial_hidden(4), rates, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, another)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.5, 0.9])
def test_masks_drop_at_their_rate_and_keep_the_mean(rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = keep_mask((1000, 1003), rate, generator)
    assert abs(mask.float().mean().item() - (1 - rate)) < 0.002
    assert abs(mask[:, ::4].float().mean().item() - (1 - rate)) < 0.004  # every lane of the drawn words is fair
    assert abs(mask[:, 3::4].float().mean().item() - (1 - rate)) < 0.004
    kept = drop(torch.ones(1000, 1000), rate, generator)
    assert abs(kept.mean().item() - 1) < 0.01


def test_precisions() -> None:
    assert product_dtype("float32") == torch.float32
    assert product_dtype("bfloat16") == torch.bfloat16
    assert product_dtype("auto") in (torch.float32, torch.bfloat16)

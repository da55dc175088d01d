"""The fast scan and the window loss: states and gradients are compared with autograd in float64; dropout masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.gru import GRUCharModel
from service.training import devices
from service.training.devices import CPU, product_dtype
from service.training.network import DropoutRates, WindowLoss, initialise
from service.training.randomness import drop, keep_mask
from service.training.scan import ScanBuffers, gru_scan, rows_by_step
from tests.harness.models import tiny_config

STEPS, BATCH, UNITS, VOCAB = 7, 3, 5, 6


def reference(
    gates: Tensor, index: Tensor | None, hidden: Tensor, weight: Tensor, bias_hn: Tensor, resets: Tensor
) -> Tensor:
    """Return the states of the same scan, (T, B, H), with a graph for autograd."""
    states = []
    for t in range(STEPS):
        x_n, x_r, x_z = (gates[t] if index is None else gates[index[t]]).chunk(3, dim=1)
        h_r, h_z, h_n = (hidden @ weight.t()).chunk(3, dim=1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * (h_n + bias_hn))
        hidden = ((1 - z) * n + z * hidden) * ~resets[t][:, None]
        states.append(hidden)
    return torch.stack(states)


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
def test_gru_scan__states_and_gradients_agree_with_autograd(with_index: bool, with_resets: bool) -> None:
    draws = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draws)

    index = torch.randint(0, VOCAB, (STEPS, BATCH), generator=draws) if with_index else None
    gates = normal(VOCAB, 3 * UNITS) if with_index else normal(STEPS, BATCH, 3 * UNITS)
    inputs = [tensor.requires_grad_() for tensor in (gates, normal(3 * UNITS, UNITS), normal(UNITS))]
    hidden, grad = normal(BATCH, UNITS), normal(STEPS, BATCH, UNITS)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    if with_resets:
        resets[[0, 3, 3, STEPS - 1], [1, 0, 2, 2]] = True  # the first and the last step, and one stream twice
    expected = reference(inputs[0], index, hidden, inputs[1], inputs[2], resets)
    buffers = ScanBuffers(STEPS, BATCH, UNITS, torch.float64, torch.float64)
    for _ in range(2):  # the second time with used buffers
        states, last = gru_scan(
            inputs[0], index, hidden, inputs[1], inputs[2], buffers, rows_by_step(resets, CPU) if with_resets else None
        )
        torch.testing.assert_close(states, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(last, expected[-1], atol=1e-12, rtol=0)
        gradients = torch.autograd.grad(states, inputs, grad)
        expected_gradients = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-11, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_window_loss__gradients_agree_with_those_of_the_reference_network(num_layers: int) -> None:
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


def test_window_loss__with_bfloat16_products_stays_close_to_float32() -> None:
    model = GRUCharModel(tiny_config(num_units=128))
    initialise(model, 1)
    window = torch.randint(0, model.config.vocab_size, (33, 8))
    hidden = model.initial_hidden(8)
    exact, _ = WindowLoss(model, torch.float32)(window, hidden)
    rough, _ = WindowLoss(model, torch.bfloat16)(window, hidden)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_window_loss__dropout_depends_only_on_the_generator() -> None:
    model = GRUCharModel(tiny_config(num_layers=2))
    initialise(model, 1)
    window, rates = torch.randint(0, model.config.vocab_size, (9, 4)), DropoutRates(0.2, 0.3, 0.4)
    loss = WindowLoss(model, torch.float32)
    first, again, other_seed = (
        loss(window, model.initial_hidden(4), rates, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.5, 0.9])
def test_dropout__drops_at_its_rate_and_preserves_the_mean(rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = keep_mask((1000, 1003), rate, generator)
    assert abs(mask.float().mean().item() - (1 - rate)) < 0.002
    assert (
        abs(mask[:, ::4].float().mean().item() - (1 - rate)) < 0.004
    )  # each of the four parts of a 64-bit draw has the same rate
    assert abs(mask[:, 3::4].float().mean().item() - (1 - rate)) < 0.004
    dropped = drop(torch.ones(1000, 1000), rate, generator)
    assert abs(dropped.mean().item() - 1) < 0.01


@pytest.mark.parametrize(("speedup", "expected"), [(0.6, torch.float32), (1.1, torch.float32), (1.9, torch.bfloat16)])
def test_product_dtype__auto_is_bfloat16_if_that_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: True
    )  # it may have the instructions and be slow
    monkeypatch.setattr(devices, "bfloat16_speedup", lambda: speedup)
    assert product_dtype("float32") == torch.float32
    assert product_dtype("bfloat16") == torch.bfloat16
    assert product_dtype("auto") == expected


@pytest.mark.parametrize(("bfloat16_s", "speedup", "num_products"), [(0.002, 2, 12), (0.008, 0.5, 12), (1, 0.004, 4)])
def test_bfloat16_speedup__compares_the_shortest_times(
    monkeypatch: pytest.MonkeyPatch, bfloat16_s: float, speedup: float, num_products: int
) -> None:
    """One that is hopelessly slow is measured only once after the warm-up."""
    now, delays = [0.0], iter([9.0, 9.0, 0.0, 0.0, 5.0, 0.0, 0.0, 7.0, 0.0, 0.0, 1.0, 1.0])
    threads: list[int] = []

    def multiply(left: torch.Tensor, _: torch.Tensor) -> None:
        threads.append(torch.get_num_threads())
        now[0] += next(delays) + (bfloat16_s if left.dtype == torch.bfloat16 else 0.004)

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr("service.training.devices.time.thread_time", lambda: now[0])
    before = torch.get_num_threads()
    assert devices.bfloat16_speedup.__wrapped__() == pytest.approx(speedup)
    assert (threads, torch.get_num_threads()) == ([1] * num_products, before)

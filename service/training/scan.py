"""One GRU layer over a window of B streams and T steps, forward and backward, faster on a CPU than `nn.GRU` + autograd.

Why it is fast:

- Products use `product_dtype`; state and gates are float32. On some CPUs bfloat16 doubles the rate of float32.
- The input gates are computed beforehand. For the first layer they are rows of a (V, 3H) table that is computed once a
  window, because an embedding and its product with the input weights depend only on the character.
- The backward loop computes only the gradient of the gates, which the recurrence needs. The gradient of the recurrent
  weights is one product over all T * B rows after the loop.
- Every buffer is allocated once and reused: page faults of new memory of this size cost more than the gates do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from service.training.devices import CPU

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class ScanBuffers:
    """Working memory of one layer: what the backward pass needs from the forward pass, and scratch space.

    Each forward pass overwrites it, so the backward pass of a window must run before the next forward pass.
    """

    def __init__(
        self,
        steps: int,
        batch: int,
        units: int,
        dtype: torch.dtype,
        product_dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.key = (steps, batch, units, dtype, product_dtype, device)
        self.product_dtype = product_dtype

        def real(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def product(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=product_dtype, device=device)

        self.hidden = real(steps + 1, batch, units)  # [t] is the state before step t
        self.hidden_product = product(steps + 1, batch, units)  # the same in the products' dtype
        self.reset_update = real(steps, batch, 2 * units)  # r | z
        self.candidate = real(steps, batch, units)  # n
        self.candidate_hidden = real(steps, batch, units)  # W_hn h + b_hn
        self.input_gates = real(batch, 3 * units)
        self.hidden_gates = product(batch, 3 * units)
        # Gradients, in this order, of n before its tanh, of r and z before their sigmoids, and of W_hn h + b_hn. The
        # first three belong to the input gates, the last three to the hidden gates.
        self.gate_grads = product(steps, batch, 4 * units)
        self.grad_candidate = real(batch, units)
        self.grad_reset_update = real(batch, 2 * units)
        self.grad_hidden = real(batch, units)
        self.grad_carried = real(batch, units)
        self.grad_product = product(batch, units)


def gru_scan(
    gates: Tensor,
    index: Tensor | None,
    hidden: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor,
    buffers: ScanBuffers,
    reset_rows: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the states of one layer after every step, (T, B, H), and its last hidden state, (B, H).

    The states are in the products' dtype, and a view of `buffers` that the next forward pass overwrites. The last
    hidden state is a copy and carries no gradient.

    Args:
        gates: the input gates in the order n, r, z, with all biases except `bias_hn`. Either (V, 3H), a row for each
            character, with `index`; or (T, B, 3H) in the products' dtype, without.
        index: (T, B) int64, the row of `gates` for every step; None if `gates` already has a row for every step.
        hidden: (B, H), the state before the first step. It gets no gradient (truncated backpropagation).
        weight_hh: (3H, H), the recurrent weights in the order r, z, n.
        bias_hn: (H,), the bias inside the reset gate.
        buffers: the layer's working memory.
        reset_rows: the streams whose state is set to zero after a step, see `rows_by_step`; None for no step. Such a
            state is a constant: no gradient passes through it.
    """
    result: tuple[Tensor, Tensor] = _GRUScan.apply(  # type: ignore[no-untyped-call]
        gates, index, hidden, weight_hh, bias_hn, buffers, reset_rows or {}
    )
    return result


def rows_by_step(resets: Tensor | None, device: torch.device) -> dict[int, Tensor]:
    """Return the indices of the streams that are reset after a step, (n,) int64 on `device`, by step.

    resets: (T, B) bool on the CPU, the steps after which a stream's state is set to zero; None for no step.
    """
    if resets is None:
        return {}
    return {int(t): resets[t].nonzero()[:, 0].to(device) for t in resets.any(1).nonzero()[:, 0]}


class _GRUScan(torch.autograd.Function):
    """`gru_scan` as an operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        index: Tensor | None,
        hidden: Tensor,
        weight_hh: Tensor,
        bias_hn: Tensor,
        buffers: ScanBuffers,
        reset_rows: Mapping[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        steps, units = buffers.candidate.shape[0], hidden.shape[1]
        weight = weight_hh.to(buffers.product_dtype)
        weight_t = weight.t()
        b = buffers
        b.hidden[0] = hidden
        b.hidden_product[0] = hidden
        for t in range(steps):
            x = b.input_gates  # (B, 3H)
            if index is None:
                x.copy_(gates[t])
            else:
                torch.index_select(gates, 0, index[t], out=x)
            h = torch.mm(b.hidden_product[t], weight_t, out=b.hidden_gates)  # (B, 3H)
            rz, n, hn = b.reset_update[t], b.candidate[t], b.candidate_hidden[t]
            rz.copy_(h[:, : 2 * units]).add_(x[:, units:]).sigmoid_()
            hn.copy_(h[:, 2 * units :]).add_(bias_hn)
            torch.addcmul(x[:, :units], rz[:, :units], hn, out=n)
            # tanh(a) = 2 sigmoid(2a) - 1: torch's float32 sigmoid takes a sixth of the time of its tanh on x86.
            n.mul_(2).sigmoid_().mul_(2).sub_(1)
            torch.lerp(n, b.hidden[t], rz[:, units:], out=b.hidden[t + 1])  # n + z (h - n)
            if t in reset_rows:
                b.hidden[t + 1].index_fill_(0, reset_rows[t], 0)
            b.hidden_product[t + 1].copy_(b.hidden[t + 1])
        ctx.save_for_backward(weight)
        ctx.buffers, ctx.index, ctx.num_rows, ctx.reset_rows = buffers, index, gates.shape[0], reset_rows
        last = b.hidden[steps].clone()
        ctx.mark_non_differentiable(last)
        return b.hidden_product[1:], last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_states = grads[0]
        (weight,) = ctx.saved_tensors
        b: ScanBuffers = ctx.buffers
        steps, batch, units = b.candidate.shape
        grad_n, grad_rz, carried = b.grad_candidate, b.grad_reset_update, b.grad_carried
        grad_h = b.grad_hidden.copy_(grad_states[steps - 1])
        for t in range(steps - 1, -1, -1):
            rz, n, grads_t = b.reset_update[t], b.candidate[t], b.gate_grads[t]
            r, z = rz[:, :units], rz[:, units:]
            if t in ctx.reset_rows:
                grad_h.index_fill_(0, ctx.reset_rows[t], 0)
            torch.mul(grad_h, z, out=carried)
            torch.sub(grad_h, carried, out=grad_n)  # (1 - z) dh
            _tanh_backward(grad_n, n, grad_input=grad_n)
            torch.mul(grad_n, b.candidate_hidden[t], out=grad_rz[:, :units])
            torch.sub(b.hidden[t], n, out=grad_rz[:, units:]).mul_(grad_h)
            _sigmoid_backward(grad_rz, rz, grad_input=grad_rz)
            grads_t[:, :units].copy_(grad_n)
            grads_t[:, units : 3 * units].copy_(grad_rz)
            grads_t[:, 3 * units :].copy_(grad_n.mul_(r))
            if t > 0:
                torch.mm(grads_t[:, units:], weight, out=b.grad_product)
                torch.add(carried, b.grad_product, out=grad_h).add_(grad_states[t - 1])
        gate_grads = b.gate_grads.view(steps * batch, 4 * units)
        before = b.hidden_product[:steps].view(steps * batch, units)
        grad_weight = torch.mm(gate_grads[:, units:].t(), before)  # (3H, H), one product over all steps
        grad_bias = torch.mm(gate_grads.new_ones(1, steps * batch), gate_grads[:, 3 * units :])[0]
        dtype = b.hidden.dtype
        return _input_grads(gate_grads, ctx), None, None, grad_weight.to(dtype), grad_bias.to(dtype), None, None


def _input_grads(gate_grads: Tensor, ctx: Any) -> Tensor:
    """Return the gradient of `gates`.

    The gradient of a table is a product with the one-hot ids. The product sums in float32, while `index_add` in
    bfloat16 would round after every row.
    """
    num_gates = gate_grads.shape[1] // 4 * 3
    if ctx.index is None:
        steps, batch = ctx.buffers.gate_grads.shape[:2]
        return gate_grads[:, :num_gates].view(steps, batch, num_gates)
    one_hot = gate_grads.new_zeros(ctx.index.numel(), ctx.num_rows)
    one_hot.scatter_(1, ctx.index.reshape(-1, 1), 1.0)
    return torch.mm(one_hot.t(), gate_grads[:, :num_gates]).to(ctx.buffers.hidden.dtype)  # (V, 3H)

"""One GRU layer over a whole window of characters, forwards and backwards, faster on a CPU than `nn.GRU` + autograd.

What makes it fast, B rows and T steps at a time:

- products in `product_dtype` (bfloat16 doubles float32's rate where the CPU has it), state and gates in float32;
- the input side of the gates arrives ready made, for the first layer as rows of a (V, 3H) table that is folded once a
  window: an embedding and its product depend on the character only;
- the backward loop forms only what the recurrence needs, the gradient of the gates; the gradient of the recurrent
  weights is one product over all T * B rows afterwards;
- every buffer is allocated once and used again: fresh memory of this size costs more in page faults than the gates do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class ScanBuffers:
    """Working memory of one layer: what the forward pass leaves for the backward pass, and its scratch space.

    One forward pass may be under way at a time: its backward pass has to come before the next forward pass.
    """

    def __init__(self, steps: int, batch: int, units: int, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
        self.key = (steps, batch, units, dtype, product_dtype)
        self.product_dtype = product_dtype

        def real(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        def product(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=product_dtype)

        self.hidden = real(steps + 1, batch, units)  # state before step t at [t]
        self.hidden_product = product(steps + 1, batch, units)  # the same, as it enters products
        self.reset_update = real(steps, batch, 2 * units)  # r | z
        self.candidate = real(steps, batch, units)  # n
        self.candidate_hidden = real(steps, batch, units)  # W_hn h + b_hn
        self.input_gates = real(batch, 3 * units)
        self.hidden_gates = product(batch, 3 * units)
        self.gate_grads = product(steps, batch, 4 * units)  # of r, z, W_hn h + b_hn, and n before its tanh
        self.grad_left = real(batch, 2 * units)
        self.grad_right = real(batch, 2 * units)
        self.grad_hidden = real(batch, units)
        self.grad_carried = real(batch, units)
        self.grad_product = product(batch, units)


def gru_scan(
    gates: Tensor, index: Tensor | None, hidden: Tensor, weight_hh: Tensor, bias_hn: Tensor, buffers: ScanBuffers
) -> tuple[Tensor, Tensor]:
    """States (T, B, H) after every step, and the last hidden state (B, H), of one layer.

    gates: what the input adds to the gates, biases of r and z included: (V, 3H) with `index` (T, B) int64 choosing the
        row of every step, or (T, B, 3H) with `index` None.
    hidden: (B, H), the state before the first step; no gradient flows into it (truncated backpropagation).
    weight_hh: (3H, H) recurrent weights; bias_hn: (H,), the bias inside the reset gate.

    The states are in the products' dtype, a view of `buffers` that the next forward pass overwrites. The last hidden
    state is a copy and carries no gradient.
    """
    result: tuple[Tensor, Tensor] = _GRUScan.apply(  # type: ignore[no-untyped-call]
        gates, index, hidden, weight_hh, bias_hn, buffers
    )
    return result


class _GRUScan(torch.autograd.Function):
    """`gru_scan`, forwards and backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        index: Tensor | None,
        hidden: Tensor,
        weight_hh: Tensor,
        bias_hn: Tensor,
        buffers: ScanBuffers,
    ) -> tuple[Tensor, Tensor]:
        steps, units = buffers.candidate.shape[0], hidden.shape[1]
        weight = weight_hh.to(buffers.product_dtype)
        weight_t = weight.t()
        b = buffers
        b.hidden[0] = hidden
        b.hidden_product[0] = hidden
        for t in range(steps):
            x = gates[t] if index is None else torch.index_select(gates, 0, index[t], out=b.input_gates)  # (B, 3H)
            h = torch.mm(b.hidden_product[t], weight_t, out=b.hidden_gates)  # (B, 3H)
            rz, n, hn = b.reset_update[t], b.candidate[t], b.candidate_hidden[t]
            rz.copy_(h[:, : 2 * units]).add_(x[:, : 2 * units]).sigmoid_()
            hn.copy_(h[:, 2 * units :]).add_(bias_hn)
            torch.addcmul(x[:, 2 * units :], rz[:, :units], hn, out=n)
            # tanh(a) = 2 sigmoid(2a) - 1: torch's float32 sigmoid takes a sixth of the time of its tanh on x86.
            n.mul_(2).sigmoid_().mul_(2).sub_(1)
            torch.lerp(n, b.hidden[t], rz[:, units:], out=b.hidden[t + 1])  # n + z (h - n)
            b.hidden_product[t + 1].copy_(b.hidden[t + 1])
        ctx.save_for_backward(weight)
        ctx.buffers, ctx.index, ctx.num_rows = buffers, index, gates.shape[0]
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
        left, right, carried = b.grad_left, b.grad_right, b.grad_carried
        grad_h = b.grad_hidden.copy_(grad_states[steps - 1])
        for t in range(steps - 1, -1, -1):
            rz, n = b.reset_update[t], b.candidate[t]
            r, z = rz[:, :units], rz[:, units:]
            torch.mul(grad_h, z, out=carried)
            grad_n = torch.sub(grad_h, carried, out=right[:, units:])  # (1 - z) dh
            _tanh_backward(grad_n, n, grad_input=grad_n)
            torch.mul(grad_n, r, out=right[:, :units])  # of W_hn h + b_hn
            torch.mul(grad_n, b.candidate_hidden[t], out=left[:, :units])
            torch.sub(b.hidden[t], n, out=left[:, units:]).mul_(grad_h)
            _sigmoid_backward(left, rz, grad_input=left)
            out = b.gate_grads[t]  # (B, 4H)
            out[:, : 2 * units].copy_(left)
            out[:, 2 * units :].copy_(right)
            if t == 0:
                break
            torch.mm(out[:, : 3 * units], weight, out=b.grad_product)
            torch.add(carried, b.grad_product, out=grad_h).add_(grad_states[t - 1])
        gate_grads = b.gate_grads.view(steps * batch, 4 * units)
        before = b.hidden_product[:steps].reshape(steps * batch, units)
        grad_weight = torch.mm(gate_grads[:, : 3 * units].t(), before)  # (3H, H), one product over all steps
        ones = gate_grads.new_ones(1, steps * batch)
        grad_bias = torch.mm(ones, gate_grads[:, 2 * units : 3 * units])[0]
        dtype = b.hidden.dtype
        return (
            _input_grads(gate_grads, ctx.index, ctx.num_rows, units, (steps, batch), dtype),
            None,
            None,
            grad_weight.to(dtype),
            grad_bias.to(dtype),
            None,
        )


def _input_grads(
    gate_grads: Tensor, index: Tensor | None, num_rows: int, units: int, window: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Gradient of `gates`. Rows of a table gather theirs by a product with the one-hot ids: exact sums in float32
    inside the product, where index_add in bfloat16 would round after every row.
    """
    if index is not None:
        one_hot = torch.zeros(index.numel(), num_rows, dtype=gate_grads.dtype)
        one_hot.scatter_(1, index.reshape(-1, 1), 1.0)
        gate_grads = torch.mm(one_hot.t(), gate_grads)  # (V, 4H)
    grads = torch.cat((gate_grads[:, : 2 * units], gate_grads[:, 3 * units :]), dim=1).to(dtype)
    return grads if index is not None else grads.view(*window, 3 * units)

"""The network folded for reading one text, float32: what every character adds to the gates is looked up, not computed.

The embedding and the product with the input weights depend on the character only, so both become one table
`T[v] = E[v] @ W_ih.T + b_ih`, (V, 3H). What is left of a step is one product of the state with the recurrent weights, a
few elementwise operations, and a new state. (A bias that is only ever added to another one goes into the table too.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.gru import GRUCharModel


@dataclass(frozen=True)
class _Layer:
    input_table: Tensor | None  # (V, 3H), first layer only
    weight_ih: Tensor  # (3H, inputs)
    bias: Tensor  # (3H,): b_ih, and b_hh of r and z
    weight_hh: Tensor  # (3H, H)
    bias_hn: Tensor  # (H,): inside the reset gate


class FoldedGRU:
    """A GRUCharModel for inference on one text at a time. Its weights are copies; it has no state of its own."""

    def __init__(self, model: GRUCharModel) -> None:
        self.config = model.config
        self.dense_weight = model.dense.weight.detach().clone()
        self.dense_bias = model.dense.bias.detach().clone()
        self._layers = []
        for index, weights in enumerate(model.gru.all_weights):
            weight_ih, weight_hh, bias_ih, bias_hh = (weight.detach().clone() for weight in weights)
            units = self.config.num_units
            bias = bias_ih
            bias[: 2 * units] += bias_hh[: 2 * units]
            table = torch.addmm(bias, model.embedding.weight.detach(), weight_ih.t()) if index == 0 else None
            self._layers.append(_Layer(table, weight_ih, bias, weight_hh, bias_hh[2 * units :]))

    def initial_hidden(self) -> Tensor:
        """(L, H) float32 zeros: the state before the first character."""
        return torch.zeros(self.config.num_layers, self.config.num_units)

    @torch.inference_mode()
    def scan(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) int64 ids and (L, H) hidden -> (n, H) state of the last layer after each character, (L, H) hidden after.

        Character after character; between layers the input products of all n characters are one.
        """
        after = torch.empty_like(hidden)
        states = hidden  # of no meaning before the first layer
        for index, layer in enumerate(self._layers):
            if layer.input_table is not None:
                gates = layer.input_table[ids]  # (n, 3H)
            else:
                gates = torch.addmm(layer.bias, states, layer.weight_ih.t())  # (n, 3H)
            states = _scan_layer(gates, hidden[index], layer.weight_hh, layer.bias_hn)
            after[index] = states[-1] if len(states) else hidden[index]
        return states, after

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """(n, H) states of the last layer -> (n, V) logits of the character after each."""
        return torch.addmm(self.dense_bias, states, self.dense_weight.t())


def _scan_layer(gates: Tensor, hidden: Tensor, weight_hh: Tensor, bias_hn: Tensor) -> Tensor:
    """One layer over n characters: (n, 3H) input side of the gates, (H,) hidden -> (n, H) states."""
    units = hidden.shape[0]
    states = torch.empty(len(gates), units)
    gates_rz, gates_n = gates[:, : 2 * units], gates[:, 2 * units :]
    # The bias inside the reset gate joins the recurrent product.
    bias = torch.cat((torch.zeros(2 * units), bias_hn))
    product = torch.empty(3 * units)
    product_rz, product_n = product[: 2 * units], product[2 * units :]
    reset, update = product[:units], product[units : 2 * units]
    for t in range(len(gates)):
        torch.addmv(bias, weight_hh, hidden, out=product)  # (3H,)
        product_rz.add_(gates_rz[t]).sigmoid_()
        candidate = torch.addcmul(gates_n[t], reset, product_n).tanh_()
        hidden = torch.lerp(candidate, hidden, update, out=states[t])  # n + z (h - n)
    return states

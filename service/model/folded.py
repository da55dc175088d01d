"""The network folded for reading one text, float32: what every character adds to the gates is looked up, not computed.

The embedding and the product with the input weights depend on the character only, so both become one table
`T[v] = E[v] @ W_ih.T + b_ih`, (V, 3H). What is left of a step is one product of the state with the recurrent weights, a
few elementwise operations, and a new state. (A bias that is only ever added to another one goes into the table too.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.gru import GRUCharModel


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer, one of the first two set: the table of the first layer, the input weights of the others.

    input_table (V, 3H), weight_ih (3H, H), bias (3H,): b_ih, and b_hh of r and z; weight_hh (3H, H); bias_hh (3H,):
    zeros, and b_hn, which belongs inside the reset gate.
    """

    input_table: Tensor | None
    weight_ih: Tensor | None
    bias: Tensor
    weight_hh: Tensor
    bias_hh: Tensor


class FoldedGRU:
    """A GRUCharModel for inference on one text at a time. Its weights are copies; it has no state of its own.

    A step always does the same products with the same operands, so a text gives the same bits in whatever parts it is
    scanned (on one kind of processor, with one number of threads).
    """

    def __init__(self, model: GRUCharModel) -> None:
        self.config = model.config
        self.dense_weight = model.dense.weight.detach().clone()
        self.dense_bias = model.dense.bias.detach().clone()
        self._layers = []
        units = self.config.num_units
        for index, weights in enumerate(model.gru.all_weights):
            weight_ih, weight_hh, bias, bias_hh = (weight.detach().clone() for weight in weights)
            bias[: 2 * units] += bias_hh[: 2 * units]
            bias_hh[: 2 * units] = 0
            if index == 0:
                table = torch.addmm(bias, model.embedding.weight.detach(), weight_ih.t())
                self._layers.append(_Layer(table, None, bias, weight_hh, bias_hh))
            else:
                self._layers.append(_Layer(None, weight_ih, bias, weight_hh, bias_hh))

    def initial_hidden(self) -> Tensor:
        """(L, H) float32 zeros: the state before the first character."""
        return torch.zeros(self.config.num_layers, self.config.num_units)

    @torch.inference_mode()
    def scan(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) int64 ids and (L, H) hidden -> (n, H) state of the last layer after each character, (L, H) hidden after.

        Layer after layer, and in each of them character after character.
        """
        after = torch.empty_like(hidden)
        states = ids  # what the next layer reads: characters, then the states of the layer below
        for index, layer in enumerate(self._layers):
            states = _scan_layer(layer, states, hidden[index])
            after[index] = states[-1] if len(states) else hidden[index]
        return states, after

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """(n, H) states of the last layer -> (n, V) logits of the character after each."""
        return torch.addmm(self.dense_bias, states, self.dense_weight.t())


def _input_gates(layer: _Layer, inputs: Tensor) -> Iterator[Tensor]:
    """What each input adds to the gates, (3H,) at a time."""
    if layer.input_table is not None:
        for index in inputs.tolist():
            yield layer.input_table[index]
    elif layer.weight_ih is not None:
        for state in inputs:
            yield torch.addmv(layer.bias, layer.weight_ih, state)


def _scan_layer(layer: _Layer, inputs: Tensor, hidden: Tensor) -> Tensor:
    """One layer over n steps: (n,) ids or (n, H) states of the layer below, (H,) hidden -> (n, H) states."""
    units = hidden.shape[0]
    states = torch.empty(len(inputs), units)
    product = torch.empty(3 * units)
    product_rz, product_n = product[: 2 * units], product[2 * units :]
    reset, update = product[:units], product[units : 2 * units]
    for t, gates in enumerate(_input_gates(layer, inputs)):
        torch.addmv(layer.bias_hh, layer.weight_hh, hidden, out=product)  # (3H,)
        product_rz.add_(gates[: 2 * units]).sigmoid_()
        candidate = torch.addcmul(gates[2 * units :], reset, product_n).tanh_()
        hidden = torch.lerp(candidate, hidden, update, out=states[t])  # n + z (h - n)
    return states

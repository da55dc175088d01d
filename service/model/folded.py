"""The network in float32 for reading one text: the first layer's input gates are looked up instead of computed.

The embedding and the product with the input weights depend on the character only, so both become one table
`T[v] = E[v] @ W_ih.T + b_ih`, (V, 3H). A step is then one product of the state with the recurrent weights and a few
elementwise operations. The table also contains the recurrent biases of r and z, which are only added to b_ih.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.gru import GRUCharModel


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. Gates are stacked r, z, n."""

    input_table: Tensor | None  # (V, 3H) in the first layer, None in the others
    weight_ih: Tensor | None  # (3H, H) in the other layers, None in the first
    bias: Tensor  # (3H,): b_ih, plus b_hh of r and z
    weight_hh: Tensor  # (3H, H)
    bias_hh: Tensor  # (3H,): zeros for r and z; b_hn, which the reset gate multiplies


class FoldedGRU:
    """A GRUCharModel for inference on one text at a time. It copies the weights, and stores no hidden state.

    Every step computes the same products with the same operands, so the states of a text are the same to the bit,
    however it is split into scans. This holds for one processor type and one number of threads.
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
        """Return the state before the first character: (L, H) float32 zeros."""
        return torch.zeros(self.config.num_layers, self.config.num_units)

    @torch.inference_mode()
    def scan(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Read characters.

        Args:
            ids: (n,) int64 character ids.
            hidden: (L, H) float32 state before them. It is not changed.

        Returns:
            (n, H) states of the last layer after each character, and the (L, H) state after all of them.
        """
        after = torch.empty_like(hidden)
        states = ids  # the input of the next layer: characters at first, then the states of the layer below
        for index, layer in enumerate(self._layers):
            states = _scan_layer(layer, states, hidden[index])
            after[index] = states[-1] if len(states) else hidden[index]
        return states, after

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Return the (n, V) logits of the next character after each of (n, H) last-layer states."""
        return torch.addmm(self.dense_bias, states, self.dense_weight.t())


def _input_gates(layer: _Layer, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the (3H,) input gates of each input."""
    if layer.input_table is not None:
        for index in inputs.tolist():
            yield layer.input_table[index]
    elif layer.weight_ih is not None:
        for state in inputs:
            yield torch.addmv(layer.bias, layer.weight_ih, state)


def _scan_layer(layer: _Layer, inputs: Tensor, hidden: Tensor) -> Tensor:
    """Run one layer: (n,) ids or (n, H) states of the layer below, and (H,) hidden -> (n, H) states."""
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

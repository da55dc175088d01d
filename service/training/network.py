"""The network in training: the loss of a window of text, computed with the fast scan, and the initial weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.gru import GRUCharModel
from service.training.randomness import drop, seeded_generator
from service.training.scan import ScanBuffers, gru_scan, rows_by_step


@dataclass(frozen=True)
class DropoutRates:
    """The probabilities of dropout."""

    input: float = 0.0  # of an element of a character's embedding
    recurrent: float = 0.0  # of a recurrent weight, for the whole window
    output: float = 0.0  # of an element of a layer's output


class WindowLoss:
    """Computes the losses of windows of text with the weights of one `GRUCharModel`, and owns the scans' buffers.

    Large products are computed in `product_dtype`. With the weights' own dtype nothing is rounded in between.
    """

    def __init__(self, model: GRUCharModel, product_dtype: torch.dtype) -> None:
        self.model = model
        self.product_dtype = product_dtype
        self._buffers: dict[int, ScanBuffers] = {}

    def __call__(
        self,
        window: Tensor,
        hidden: Tensor,
        rates: DropoutRates = DropoutRates(),
        draws: torch.Generator | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each target, (T * B,) in nats, and the hidden state after the window, (L, B, H).

        Args:
            window: (T + 1, B) int64, the characters. Each row holds the targets of the row before it.
            hidden: (L, B, H), the state before the window.
            rates: the rates of dropout.
            draws: the generator of the dropout masks, which are drawn in a fixed order. Needed for rates above 0.
            resets: (T, B) bool, the characters after which a stream's state is set to zero, in every layer, because
                the next character begins a text; None for none. That character is predicted from the zero state.
        """
        model, gru = self.model, self.model.gru
        reset_rows = rows_by_step(resets, hidden.device)
        window = window.to(hidden.device)
        ids, targets = window[:-1], window[1:]
        steps, batch = ids.shape
        final_states: list[Tensor] = []
        states = hidden  # a placeholder: the first layer reads the embeddings
        for layer in range(gru.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = gru.all_weights[layer]
            units = weight_hh.shape[1]
            # The hidden biases of r and z are added to the input gates; that of n belongs inside the reset gate.
            bias = bias_ih + torch.cat((bias_hh[: 2 * units], bias_hh.new_zeros(units)))
            weight_in, bias = weight_ih.roll(units, 0), bias.roll(units, 0)  # r, z, n -> n, r, z
            index = None
            if layer == 0 and rates.input == 0:
                gates, index = (
                    F.linear(model.embedding.weight, weight_in, bias),
                    ids,
                )  # (V, 3H), one row for each character
            else:
                inputs = drop(states, rates.output, draws) if layer else drop(model.embedding(ids), rates.input, draws)
                gates = self._linear(inputs, weight_in, bias)  # (T, B, 3H)
            states, final = gru_scan(
                gates,
                index,
                hidden[layer],
                drop(weight_hh, rates.recurrent, draws),
                bias_hh[2 * units :],
                self._buffer(layer, steps, batch, weight_hh),
                reset_rows,
            )  # (T, B, H), (B, H)
            final_states.append(final)
        outputs = drop(states, rates.output, draws)
        logits = self._linear(outputs, model.dense.weight, model.dense.bias).to(model.dense.weight.dtype)
        loss = F.cross_entropy(logits.view(steps * batch, -1), targets.reshape(-1), reduction="none")
        return loss, torch.stack(final_states)

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = self.product_dtype
        return F.linear(rows.to(dtype), weight.to(dtype), bias.to(dtype))

    def _buffer(self, layer: int, steps: int, batch: int, weight_hh: Tensor) -> ScanBuffers:
        key = (steps, batch, weight_hh.shape[1], weight_hh.dtype, self.product_dtype, weight_hh.device)
        buffer = self._buffers.get(layer)
        if buffer is None or buffer.key != key:
            buffer = self._buffers[layer] = ScanBuffers(*key)
        return buffer


def initialise(model: GRUCharModel, seed: int, frequencies: Tensor | None = None) -> None:
    """Set the initial weights, which depend only on the sizes, the seed and the frequencies.

    Orthogonal recurrent weights keep the scale of the state over many steps. A bias of +1 makes the update gate carry
    most of the old state at first, which lets gradients pass through many steps.

    Args:
        model: the model whose weights are set.
        seed: determines the random weights.
        frequencies: (V,) float32 above 0, how often each character is expected from the zero state, where the logits
            are the dense layer's bias alone. Training would find it only slowly, because texts begin rarely. None for
            equal ones.
    """
    draws = seeded_generator(seed, "weights")
    with torch.no_grad():
        nn.init.normal_(model.embedding.weight, generator=draws)
        for weight_ih, weight_hh, bias_ih, bias_hh in model.gru.all_weights:
            units = weight_hh.shape[1]
            nn.init.xavier_uniform_(weight_ih, generator=draws)
            for gate in weight_hh.split(units):
                nn.init.orthogonal_(gate, generator=draws)
            nn.init.zeros_(bias_ih)
            nn.init.zeros_(bias_hh)
            bias_ih[units : 2 * units] = 1.0
        nn.init.xavier_uniform_(model.dense.weight, generator=draws)
        nn.init.zeros_(model.dense.bias)
        if frequencies is not None:
            model.dense.bias.copy_(frequencies.log())

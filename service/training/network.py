"""The loss of one window of text, through the fast scan, with dropout. The weights are those of `GRUCharModel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.gru import GRUCharModel
from service.training.dropout import drop
from service.training.scan import ScanBuffers, gru_scan
from service.training.seeding import generator


@dataclass(frozen=True)
class DropoutRates:
    """Probabilities of dropping on the way in, inside the recurrence and on the way out."""

    input: float = 0.0
    recurrent: float = 0.0
    output: float = 0.0


class WindowLoss:
    """Computes losses of windows of one model; owns the buffers that its scans work in.

    product_dtype: of the large products; the weights' own dtype gives exact arithmetic in that dtype.
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
    ) -> tuple[Tensor, Tensor]:
        """(T + 1, B) int64 characters and (L, B, H) hidden -> loss of each target (T * B,), nats; (L, B, H) hidden.

        draws: makes the dropout masks, in a fixed order; needed for rates above 0.
        """
        model, gru = self.model, self.model.gru
        ids, targets = window[:-1], window[1:]
        steps, batch = ids.shape
        last: list[Tensor] = []
        states = hidden  # of no meaning before the first layer
        for layer in range(gru.num_layers):
            weight_ih, weight_hh, bias_ih, bias_hh = gru.all_weights[layer]
            units = weight_hh.shape[1]
            # The biases of r and z go with the input; that of n belongs inside the reset gate.
            bias = bias_ih + torch.cat((bias_hh[: 2 * units], bias_hh.new_zeros(units)))
            weight_in, bias = weight_ih.roll(units, 0), bias.roll(units, 0)  # r, z, n -> n, r, z
            index = None
            if layer == 0 and rates.input == 0:
                gates, index = F.linear(model.embedding.weight, weight_in, bias), ids  # (V, 3H), folded
            else:
                below = drop(states, rates.output, draws) if layer else drop(model.embedding(ids), rates.input, draws)
                gates = self._linear(below, weight_in, bias)  # (T, B, 3H)
            states, final = gru_scan(
                gates,
                index,
                hidden[layer],
                drop(weight_hh, rates.recurrent, draws),
                bias_hh[2 * units :],
                self._buffer(layer, steps, batch, units, weight_hh.dtype),
            )  # (T, B, H), (B, H)
            last.append(final)
        outputs = drop(states, rates.output, draws)
        logits = self._linear(outputs, model.dense.weight, model.dense.bias).to(model.dense.weight.dtype)
        loss = F.cross_entropy(logits.view(steps * batch, -1), targets.reshape(-1), reduction="none")
        return loss, torch.stack(last)

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = self.product_dtype
        return F.linear(rows.to(dtype), weight.to(dtype), bias.to(dtype))

    def _buffer(self, layer: int, steps: int, batch: int, units: int, dtype: torch.dtype) -> ScanBuffers:
        buffer = self._buffers.get(layer)
        if buffer is None or buffer.key != (steps, batch, units, dtype, self.product_dtype):
            buffer = self._buffers[layer] = ScanBuffers(steps, batch, units, dtype, self.product_dtype)
        return buffer


def initialise(model: GRUCharModel, seed: int) -> None:
    """Set starting weights: orthogonal recurrences keep the state's scale over many steps, and an update gate that
    begins open to the past (bias +1) lets gradients through them.
    """
    draws = generator(seed, "weights")
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


def product_dtype(precision: str) -> torch.dtype:
    """The dtype of large products: `auto` takes bfloat16 where the processor multiplies it directly."""
    if precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32

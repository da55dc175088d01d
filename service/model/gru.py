"""The network in torch, float32: the reference that every faster implementation is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.model.config import ModelConfig


class GRUCharModel(nn.Module):
    """Character -> embedding (E) -> GRU (H units, L layers) -> dense layer with the logits of all V characters.

    Each character changes the hidden state once; the state has H numbers per layer. The formula is that of Cho et al.
    2014 with the reset gate applied after the recurrent product, as in torch, and in Keras with reset_after=True:

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        reset gate: how much of the old state the candidate uses
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)        update gate: how much of the old state remains
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     candidate
        h = (1 - z) * n + z * h                           new state
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = nn.GRU(config.embedding_dim, config.num_units, config.num_layers, batch_first=True)
        self.dense = nn.Linear(config.num_units, config.vocab_size)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]]) -> GRUCharModel:
        """Return the model with these weights, which have the names and shapes of `config.tensor_shapes()`."""
        model = cls(config)
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=True)
        return model

    def initial_hidden(self, batch: int) -> Tensor:
        """Return the state before the first character: (L, B, H) zeros."""
        config = self.config
        return self.dense.weight.new_zeros(config.num_layers, batch, config.num_units)

    def forward(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) int64 ids, (L, B, H) hidden -> (B, T, V) logits of the next characters, (L, B, H) hidden after."""
        embedded = self.embedding(ids)  # (B, T, E)
        states, hidden = self.gru(embedded, hidden)  # (B, T, H), (L, B, H)
        return self.dense(states), hidden

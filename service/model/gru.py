"""The network in torch, float32: the reference that every faster form is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.model.config import ModelConfig


class GRUCharModel(nn.Module):
    """Characters -> embedding (E) -> GRU (H units, L layers) -> dense over the V characters.

    One character at a time: each is turned, with the hidden state before it, into one new hidden state of H numbers a
    layer. The gates are torch's, and Keras' with reset_after=True (Cho et al. 2014, the reset gate applied after the
    recurrent product):

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        how much of the old state the candidate sees
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)        how much of the old state stays
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     the candidate
        h = (1 - z) * n + z * h                           the new state
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = nn.GRU(config.embedding_dim, config.num_units, config.num_layers, batch_first=True)
        self.dense = nn.Linear(config.num_units, config.vocab_size)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]]) -> GRUCharModel:
        """The model with these weights, names and shapes as in `config.tensor_shapes()`."""
        model = cls(config)
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=True)
        return model

    def initial_hidden(self, batch: int) -> Tensor:
        """(L, B, H) zeros: the state before the first character."""
        config = self.config
        return self.dense.weight.new_zeros(config.num_layers, batch, config.num_units)

    def forward(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) int64 ids and (L, B, H) hidden -> (B, T, V) logits of the next character, (L, B, H) hidden after."""
        embedded = self.embedding(ids)  # (B, T, E)
        states, hidden = self.gru(embedded, hidden)  # (B, T, H), (L, B, H)
        return self.dense(states), hidden

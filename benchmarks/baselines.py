"""What a user would write instead of installing the service: forty lines of torch, float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.model.artifact import Tensors
from service.model.config import ModelConfig


class FortyLines(nn.Module):
    """Generates with torch's own modules, one text or a batch of them.

    In its favour: no gradients, no copy of a character to Python while it runs, nothing turned into text.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        if config.num_layers != 1:
            raise ValueError(f"the baseline has one GRU layer, the model has {config.num_layers}")
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = nn.GRUCell(config.embedding_dim, config.num_units)
        self.dense = nn.Linear(config.num_units, config.vocab_size)
        state = {name.removesuffix("_l0"): torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
        self.load_state_dict(state, strict=True)

    @torch.inference_mode()
    def generate(self, chars: Tensor, hidden: Tensor, num_chars: int) -> tuple[Tensor, Tensor]:
        """(B,) int64 last characters and (B, H) hidden before them -> (B, num_chars) what follows, (B, H) hidden."""
        generated = []
        for _ in range(num_chars):
            hidden = self.gru(self.embedding(chars), hidden)  # (B, H)
            probabilities = torch.softmax(self.dense(hidden), dim=-1)  # (B, V)
            chars = torch.multinomial(probabilities, 1).squeeze(1)  # (B,)
            generated.append(chars)
        return torch.stack(generated, dim=1), hidden

"""The baseline: what a user would write instead of installing the service, in forty lines of torch and float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.model.artifact import Tensors
from service.model.config import ModelConfig


class FortyLines(nn.Module):
    """Generates one text, or a batch of texts, with torch's own modules.

    It is given every advantage: it computes no gradients, copies no character to Python while it runs, and converts
    nothing to text. Raises ValueError for a model with more than one GRU layer.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        if config.num_layers != 1:
            raise ValueError(f"the baseline has one GRU layer, but the model has {config.num_layers}")
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = nn.GRUCell(config.embedding_dim, config.num_units)
        self.dense = nn.Linear(config.num_units, config.vocab_size)
        state = {name.removesuffix("_l0"): torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
        self.load_state_dict(state, strict=True)

    @torch.inference_mode()
    def generate(self, chars: Tensor, hidden: Tensor, num_chars: int) -> tuple[Tensor, Tensor]:
        """Return the next characters (B, num_chars) int64 and the hidden state (B, H) after them.

        Args:
            chars: (B,) int64, the last character of each text.
            hidden: (B, H), the state before it.
            num_chars: how many characters to generate for each text.
        """
        generated = []
        for _ in range(num_chars):
            hidden = self.gru(self.embedding(chars), hidden)  # (B, H)
            probabilities = torch.softmax(self.dense(hidden), dim=-1)  # (B, V)
            chars = torch.multinomial(probabilities, 1).squeeze(1)  # (B,)
            generated.append(chars)
        return torch.stack(generated, dim=1), hidden

"""A published version that a run begins with, instead of random weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.errors import InvalidCharset
from service.model.artifact import Artifact
from service.training.checkpoint import VersionRecord
from service.training.hyperparameters import Hyperparameters
from service.training.randomness import seeded_generator

SIZES = ("embedding_dim", "num_units", "num_layers")
# A trained model is near a minimum: the rate of a new one would first undo a part of what it has learnt.
LEARNING_RATE = 0.5 * float(Hyperparameters.model_fields["learning_rate"].default)


@dataclass(frozen=True)
class InitialVersion:
    """A version with its weights."""

    ref: str  # name@number
    artifact: Artifact

    @property
    def record(self) -> VersionRecord:
        """What a checkpoint stores about it."""
        return VersionRecord(ref=self.ref, digest=self.artifact.digest)

    @property
    def settings(self) -> dict[str, int]:
        """The sizes that a run has if it begins with this version."""
        return {name: getattr(self.artifact.config, name) for name in SIZES}

    def weights(self, charset: str, seed: int) -> dict[str, Tensor]:
        """Return the weights for a charset that begins with the version's own.

        A new character gets a random embedding of the same scale as the others, drawn with the seed. Its row of the
        dense layer is the mean of the others, so at first it is as likely as an average character.

        Raises InvalidCharset if the charset begins otherwise.
        """
        known = self.artifact.config.charset
        if not charset.startswith(known):
            raise InvalidCharset(f"the charset must begin with that of {self.ref}: leave --charset out")
        weights = {name: torch.from_numpy(np.array(tensor)) for name, tensor in self.artifact.tensors.items()}
        num_new = len(charset) - len(known)
        if num_new == 0:
            return weights
        embedding, dense, bias = (weights[name] for name in ("embedding.weight", "dense.weight", "dense.bias"))
        draws = torch.randn(num_new, embedding.shape[1], generator=seeded_generator(seed, "characters"))
        weights["embedding.weight"] = torch.cat((embedding, draws * embedding.square().mean().sqrt()))
        weights["dense.weight"] = torch.cat((dense, dense.mean(0, keepdim=True).expand(num_new, -1)))
        weights["dense.bias"] = torch.cat((bias, bias.mean().expand(num_new)))
        return weights

"""What was measured of a model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.arrays import Ids
from service.errors import InvalidCorpus


@dataclass(frozen=True)
class TextLoss:
    """Mean loss over the `num_scored` characters after the first; nothing predicts the first one of `num_chars`."""

    nats_per_char: float
    num_chars: int

    @property
    def num_scored(self) -> int:
        """All but the first."""
        return self.num_chars - 1

    @property
    def bits_per_char(self) -> float:
        """The same mean in bits."""
        return self.nats_per_char / math.log(2)


def require_two(ids: Ids) -> None:
    """Raises InvalidCorpus for a text that has nothing to predict."""
    if len(ids) < 2:
        raise InvalidCorpus(
            f"a text of {len(ids)} known characters has nothing to predict: two are needed", param="corpus"
        )

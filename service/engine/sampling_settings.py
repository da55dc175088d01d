"""The sampling settings of one text: each declared once, with its limits and its help.

May not: import numpy. The command line reads the declarations before it knows whether it will compute.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

# The API's schema and the command line take limits and help from here. The kernel's row has a field of each name.
Temperature = Annotated[
    float, Field(ge=0, le=100, description="divides the logits before drawing; 0 always takes the likeliest character")
]
TopK = Annotated[int, Field(ge=0, le=65_536, description="draw from the k likeliest characters only; 0: from all")]
TopP = Annotated[
    float,
    Field(gt=0, le=1, description="draw only from the likeliest characters that together reach this probability"),
]
MinP = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="leave out characters whose probability is below this fraction of the likeliest one's",
    ),
]
RepetitionPenalty = Annotated[
    float,
    Field(
        ge=0.01,
        le=100,
        description="above 1: characters that the prompt or the generated text contains become less likely "
        "(positive logits are divided by it, negative ones multiplied)",
    ),
]
PresencePenalty = Annotated[
    float, Field(ge=-2, le=2, description="subtracted once from the logit of a character that was generated before")
]
FrequencyPenalty = Annotated[
    float,
    Field(ge=-2, le=2, description="subtracted from a character's logit for each time that it was generated before"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
MAX_BIASES = 1024
MAX_ALLOWED = 1024
AllowedIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_ALLOWED)]


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose a character from the model's distribution. The defaults draw from it unchanged.

    The repetition penalty is that of Keskar et al. 2019; the presence and frequency penalties are OpenAI's. Creating an
    object checks nothing: `check` does, and so does pydantic wherever it reads settings from a record.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    # (id, added to its logit) pairs
    logit_bias: Annotated[tuple[tuple[Annotated[int, Field(ge=0)], Bias], ...], Field(max_length=MAX_BIASES)] = ()
    # ids of the only characters that can be drawn; None for all
    allowed: AllowedIds | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether temperature is the only setting that applies. Rows of this kind are drawn together."""
        return self.temperature > 0 and not (self.restricts or self.penalizes or self.logit_bias or self.allowed)

    @property
    def restricts(self) -> bool:
        """Whether the settings may exclude unlikely characters."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @cached_property
    def penalizes(self) -> bool:
        """Whether characters drawn before matter, so that the row needs a History."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self) -> None:
        """Raise ValueError if a number is outside its limits, or there are too many biases or allowed characters."""
        _CHECKER.validate_python({name: getattr(self, name) for name in _NAMES})


_NAMES = tuple(field.name for field in fields(SamplingSettings))
_CHECKER = TypeAdapter(SamplingSettings)
PLAIN = SamplingSettings()
NUMBERS = tuple(name for name in _NAMES if name not in ("logit_bias", "allowed"))  # one number each

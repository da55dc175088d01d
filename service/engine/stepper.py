"""The contract between the engine and what computes: advance many texts, each by up to n characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from service.arrays import Float32, Float64, Ids
from service.engine.sampling import History
from service.engine.sampling_settings import PLAIN, SamplingSettings

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Row:
    """One text while it is advanced. A stepper writes to what is marked *, and to nothing else.

    hidden*: (L, H) float32, the state after `position` characters; written in place.
    position*: characters consumed. seed and position fix each random number.
    prompt: (n,) int64 ids to be read before anything is generated. num_read*: how many of them were.
    max_chars: how many characters to generate. num_generated*: how many were.
    stops: (n,) int64 ids each, n > 0: the text ends with the character that completes one of them; only generated
    characters count.
    history*: there if `sampling.penalizes`; it knows the prompt and what was generated before.
    num_logprobs: report the log-probability of each generated character and of that many likeliest ones; None: nothing.
    score_prompt: report them for the prompt's characters too.
    checkpoint_positions: positions in rising order, all above the first one. kept*: a copy of the state, (L, H) float32, after each
    of them that was reached.
    num_next: when it is finished, report so many of the characters likeliest to follow; None: don't. next*: these.
    tail*: the last generated characters, as many as the longest stop string has.
    finished*: why nothing is left to do; None until then.
    """

    hidden: Float32
    position: int
    prompt: Ids
    max_chars: int
    seed: int
    sampling: SamplingSettings = PLAIN
    stops: tuple[Ids, ...] = ()
    history: History | None = None
    num_logprobs: int | None = None
    score_prompt: bool = False
    checkpoint_positions: tuple[int, ...] = ()
    checkpoints: list[Float32] = field(default_factory=list)
    num_next: int | None = None
    next: Distribution | None = None
    num_read: int = 0
    num_generated: int = 0
    tail: list[int] = field(default_factory=list)
    finished: FinishReason | None = None

    @property
    def is_reading(self) -> bool:
        """There are characters of the prompt left."""
        return self.num_read < len(self.prompt)

    @property
    def scores(self) -> bool:
        """The next characters need log-probabilities."""
        return self.num_logprobs is not None and (self.score_prompt or not self.is_reading)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities, in nats, of m characters under the model's own distribution, before any sampling setting.

    chosen: (m,) float64, of the characters themselves. top_ids: (m, k) int64 and top: (m, k) float64, the k likeliest
    characters in falling order; equal ones in the order of ids.
    """

    chosen: Float64
    top_ids: Ids
    top: Float64

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of characters one after the other. parts: at least one, of equal k."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("chosen", "top_ids", "top")))

    def slice(self, start: int, end: int | None) -> Scores:
        """Those of some of the characters."""
        return Scores(self.chosen[start:end], self.top_ids[start:end], self.top[start:end])


@dataclass(frozen=True)
class Distribution:
    """Of the next character: (k,) int64 ids of the likeliest, in falling order, and (k,) float64 log-probabilities."""

    ids: Ids
    logprobs: Float64


@dataclass(frozen=True)
class StepResult:
    """What one call did to one row. chars: (m,) int64, the characters generated in it.

    scores: of these characters; prompt_scores: of the prompt's characters read in it; None where not asked for.
    """

    chars: Ids
    scores: Scores | None = None
    prompt_scores: Scores | None = None

    @classmethod
    def join(cls, parts: Sequence[StepResult]) -> StepResult:
        """Several parts of one text, in their order, as one; of none: nothing generated."""
        if len(parts) == 1:
            return parts[0]
        scores = [part.scores for part in parts if part.scores is not None]
        prompt_scores = [part.prompt_scores for part in parts if part.prompt_scores is not None]
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.chars for part in parts)]),
            Scores.join(scores) if scores else None,
            Scores.join(prompt_scores) if prompt_scores else None,
        )


class Stepper(Protocol):
    """Steps one model. Each character of a row is read from its prompt or, when that is used up, drawn; then the
    network consumes it: hidden = f(hidden, character), position + 1. A character is drawn from the logits of the state
    before it. So a row's state is always the state after its whole text, the last generated character included.

    Exact: what happens to a row is a function of this row alone. Not of the rows beside it, their order or number, of
    num_chars, of how often `advance` was called, of threads or of the processor. Implementations agree to the bit:
    products of integers in int32; everything else element by element, float32 in the step and float64 in sampling,
    in the order written down in `arithmetic.py`, `sampling.py`, `scores.py`, `gates.py` and `torch_stepper.py`, without
    fused multiply-adds.

    Called from one thread at a time. It may never wait for anything, do I/O, log, keep a reference to a row or its
    arrays after it returns, or release less than it took when it raises. Without Python in the loop it should run
    without the interpreter's lock.
    """

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        """StepResult every row by `num_chars` characters, or to its end if that comes first; what each one got.

        rows: any number, each once; finished ones are left alone. A row with an empty prompt and max_chars = 0 is
        finished without a step. Raises nothing that the caller could mend: after an exception the rows are void.
        """
        ...

    def initial_hidden(self) -> Float32:
        """(L, H) float32 zeros: the state before the first character."""
        ...

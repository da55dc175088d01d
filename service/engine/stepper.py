"""The contract between the engine and the code that computes: advance many texts, each by up to n characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Literal, Protocol

import numpy as np

from service.arrays import MAX_POSITION, Float32, Ids, is_state
from service.engine.sampling import History
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.scores import Distribution, Scores
from service.errors import InvalidValue
from service.model.encoded_text import EncodedText

FinishReason = Literal["stop", "length"]

MAX_STOPS = 132  # as many as a request may have strings and ids
MAX_STOP_IDS = 8192  # of all stop strings of a text together

_COUNTED_CHARS = 8192
_MEASURED_CHARS = 2048  # characters of each text between two calls of `progress` in `mean_loss`
_MEASURED_TEXTS = 64  # texts that `mean_loss` reads side by side


@dataclass(eq=False)
class Row:
    """A text while it is advanced. A stepper writes only to the fields marked "Written"."""

    # (L, H) float32, the state after `position` characters. Written in place.
    hidden: Float32
    # Number of characters consumed. Written. The random number of a character depends on seed and position alone.
    position: int
    # (n,) int64 ids to read before anything is generated.
    prompt: Ids
    # Number of characters to generate.
    max_chars: int
    seed: int
    sampling: SamplingSettings = PLAIN
    # (n,) int64 ids each, n > 0. The text ends with the generated character that completes one of them.
    stops: tuple[Ids, ...] = ()
    # None of the first `min_chars` generated characters completes one of them.
    min_chars: int = 0
    # Characters that penalties count: the prompt's, and those generated. None unless `sampling.penalizes`. Written.
    history: History | None = None
    # Score each generated character and this many likeliest ones. None for no scores.
    num_logprobs: int | None = None
    # Score the prompt's characters too. Needs num_logprobs.
    score_prompt: bool = False
    # Positions, in rising order and above the first `position`, after which the state is copied.
    checkpoint_positions: tuple[int, ...] = ()
    # The copies, (L, H) float32, for the positions reached so far. Written.
    checkpoints: list[Float32] = field(default_factory=list)
    # Report this many likeliest next characters when the row is finished. None for no report.
    num_next: int | None = None
    # The reported characters. None until then. Written.
    next: Distribution | None = None
    # How many characters of the prompt were read. Written.
    num_read: int = 0
    # How many characters were generated. Written.
    num_generated: int = 0
    # The last generated characters, at most as many as the longest stop string has. Written.
    tail: list[int] = field(default_factory=list)
    # Why there is nothing left to do. None until then. Written.
    finished: FinishReason | None = None

    @property
    def is_reading(self) -> bool:
        """Whether characters of the prompt are left to read."""
        return self.num_read < len(self.prompt)

    @property
    def scores(self) -> bool:
        """Whether the next characters need scores."""
        return self.num_logprobs is not None and (self.score_prompt or not self.is_reading)

    @property
    def num_bytes(self) -> int:
        """Approximate memory until its end, without the prompt, which rows may share: states, counts and results.

        Of the results, as many characters count as a reader that waits for the end usually lets accumulate.
        """
        history = 0 if self.history is None else self.history.num_generated.nbytes + self.history.in_prompt.nbytes
        return (
            self.hidden.nbytes * (2 + len(self.checkpoint_positions))
            + history
            + 8 * min(self.max_chars, _COUNTED_CHARS)
            + 1000
        )

    def check(self, shape: tuple[int, ...], vocab_size: int) -> None:
        """Raise InvalidValue unless a stepper can advance this row, which was not advanced yet, to its end.

        Args:
            shape: (L, H) of the model's states.
            vocab_size: V, the characters of the model.
        """
        check_state(self.hidden, shape)
        end = self.position + len(self.prompt) + self.max_chars
        if not 0 <= self.position <= end <= MAX_POSITION or self.max_chars < 0:
            raise InvalidValue(
                f"position: a text of {self.position} characters can't get {len(self.prompt) + self.max_chars} more, "
                f"because a text has at most {MAX_POSITION}",
                param="position",
            )
        check_ids(self.prompt, vocab_size, "prompt")
        if len(self.stops) > MAX_STOPS or sum(map(len, self.stops)) > MAX_STOP_IDS or not all(map(len, self.stops)):
            raise InvalidValue(
                f"stop: at most {MAX_STOPS} strings, not empty, of together {MAX_STOP_IDS} characters", param="stop"
            )
        for stop in self.stops:
            check_ids(stop, vocab_size, "stop")
        if self.min_chars < 0:
            raise InvalidValue("min_tokens: a number of characters can't be negative", param="min_tokens")
        if self.sampling is not PLAIN:
            try:
                self.sampling.check()
            except ValueError as error:
                raise InvalidValue("a sampling setting is outside its limits") from error
            if any(char >= vocab_size for char, _ in self.sampling.logit_bias):
                raise InvalidValue("logit_bias: a character that the model doesn't have", param="logit_bias")
            if any(char >= vocab_size for char in self.sampling.allowed or ()):
                raise InvalidValue(
                    "allowed_token_ids: a character that the model doesn't have", param="allowed_token_ids"
                )
            if self.sampling.penalizes and self.history is None:
                raise InvalidValue("penalties need a history")
        if any(count is not None and count < 0 for count in (self.num_logprobs, self.num_next)):
            raise InvalidValue("logprobs: a number of characters can't be negative", param="logprobs")
        if any(a >= b for a, b in pairwise((self.position, *self.checkpoint_positions))):
            raise InvalidValue("the positions of checkpoints must rise, and be after the row's position")


def check_state(hidden: Float32, shape: tuple[int, ...]) -> None:
    """Raise InvalidValue unless an array is an (L, H) float32 state of a GRU: all its numbers are within -1 to 1."""
    if hidden.shape != shape or hidden.dtype != np.float32 or not hidden.flags.c_contiguous:
        raise InvalidValue(f"the state of a text must be {shape} float32", param="state")
    if not is_state(hidden):
        raise InvalidValue("the state of a text has a number outside -1 to 1, or not a number", param="state")


def check_ids(ids: Ids, vocab_size: int, param: str) -> None:
    """Raise InvalidValue, naming `param`, unless an array is (n,) integers from 0 to V - 1."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidValue(f"{param}: ids of characters must be (n,) integers", param=param)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise InvalidValue(f"{param}: a character that the model doesn't have", param=param)


class InvalidRows(Exception):
    """A stepper can't advance some of the rows, and has changed none: it can be called again with the others."""

    def __init__(self, causes: Mapping[Row, Exception]) -> None:
        super().__init__(f"{len(causes)} rows can't be advanced")
        self.causes = causes  # why, for each row that can't be advanced; at least one

    @classmethod
    def among(cls, rows: Iterable[Row], attempt: Callable[[Row], object]) -> InvalidRows | None:
        """Return an exception that names the rows for which `attempt` raises; None if there are none."""
        causes: dict[Row, Exception] = {}
        for row in rows:
            try:
                attempt(row)
            except Exception as error:  # noqa: BLE001 - any error says that this row can't be advanced
                causes[row] = error
        return cls(causes) if causes else None


@dataclass(frozen=True)
class StepResult:
    """What one call of `advance` did to one row."""

    chars: Ids  # (m,) int64, the characters generated in the call
    scores: Scores | None = None  # of `chars`; None if not requested
    prompt_scores: Scores | None = None  # of the prompt's characters read in the call; None if not requested

    @classmethod
    def join(cls, parts: Sequence[StepResult]) -> StepResult:
        """Concatenate consecutive results of one row. No parts give a result without characters."""
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
    """Advances texts of one model.

    A character of a row is read from its prompt or, when the prompt is used up, drawn from the logits of the row's
    state. Then the network consumes it: hidden = f(hidden, character), position + 1. So a row's state is always the
    state after its whole text, including the last generated character.

    Steps are exact: what happens to a row depends on this row alone. It doesn't depend on other rows, their order or
    number, on num_chars, on how often `advance` was called, on threads or on the processor. All implementations give
    the same bits: products of integers in int32; everything else element by element, float32 in the step and float64 in
    sampling, in the order written in `arithmetic.py`, `sampling.py`, `scores.py`, `gates.py` and `torch_stepper.py`,
    without fused multiply-adds.

    Only one thread at a time may call a stepper. A stepper must not wait for anything, do I/O, log, or keep a reference
    to a row or its arrays after it returns. When it raises, it must release everything it acquired. An implementation
    without Python code in its loop should run without the interpreter's lock.
    """

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        """Advance every row by `num_chars` characters, or to its end if that is nearer. Return a result for each row.

        Rows must be distinct; their number is arbitrary. A finished row is left unchanged. A row with an empty prompt
        and max_chars = 0 is finished without a step.

        Raises InvalidRows, before it changes any row, if it can't represent some of them. After any other exception the
        rows must not be used any more.
        """
        ...

    def initial_hidden(self) -> Float32:
        """Return (L, H) float32 zeros, the state before the first character. The array is the caller's."""
        ...


def mean_loss(stepper: Stepper, text: EncodedText, progress: Callable[[int], object] = lambda _: None) -> float:
    """Return the mean loss, in nats per character, of a stepper's model on texts with at least one scored character.

    The state starts at zero in each text. Several texts are read side by side. `progress` is called now and then with
    the number of characters scored since its last call.
    """
    total, num_scored = 0.0, 0
    spans = text.spans()
    while group := list(islice(spans, _MEASURED_TEXTS)):
        reading = [(begin, end, stepper.initial_hidden()) for begin, end in group]
        position = 0  # the number of characters that were read of each text in the group
        while reading:
            stop = position + _MEASURED_CHARS
            rows = [
                Row(hidden, position, text.ids[begin + position : min(begin + stop, end)].astype(np.int64),
                    max_chars=0, seed=0, num_logprobs=0, score_prompt=True)
                for begin, end, hidden in reading
            ]  # fmt: skip
            before = num_scored
            for (begin, _, _), result in zip(reading, stepper.advance(rows, _MEASURED_CHARS), strict=True):
                is_first_scored = position > 0 or (begin > 0 and text.scores_starts)
                scores = result.prompt_scores or Scores.none()
                chosen = scores.chosen[0 if is_first_scored else 1 :]
                total -= float(chosen.sum(dtype=np.float64))
                num_scored += len(chosen)
            progress(num_scored - before)
            position = stop
            reading = [(begin, end, hidden) for begin, end, hidden in reading if begin + position < end]
    return total / num_scored

"""The contract between the engine and the code that computes: advance many texts, each by up to n characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Ids, write_state
from service.engine.request import Request, check_state
from service.engine.sampling import History
from service.engine.scores import Distribution, Scores
from service.errors import InvalidValue
from service.model.encoded_text import EncodedText

FinishReason = Literal["stop", "length"]

_MEASURED_CHARS = 2048  # characters of each text between two calls of `progress` in `mean_loss`
_MEASURED_TEXTS = 64  # texts that `mean_loss` reads side by side


@dataclass(slots=True)
class Progress:
    """How far a stepper has come with a row."""

    position: int  # characters consumed
    num_read: int = 0  # characters of the prompt that were read
    num_generated: int = 0
    state: int = 0  # of the automaton, after all generated characters; 0 without one


@dataclass(eq=False)
class Row:
    """A text while it is advanced: what was requested, and how far a stepper has come.

    A stepper writes to every field but `request`. From the first call to the end nothing else writes to them, and all
    calls must be to the same stepper.
    """

    request: Request
    hidden: Float32  # (L, H) float32, the state after `position` characters; updated in place
    history: History | None = None  # characters that penalties count; None unless `sampling.penalizes`
    # A stepper may replace it by an object of its own with these attributes, so that it need not update every row.
    progress: Progress = field(init=False)
    checkpoints: list[Float32] = field(default_factory=list)  # (L, H) float32, for the positions reached so far
    next: Distribution | None = None  # likeliest next characters; None until the row is finished
    finished: FinishReason | None = None  # why there is nothing left to do; None until then
    packed: Any = field(default=None, init=False, repr=False)  # what the stepper stores of the row between calls

    def __post_init__(self) -> None:
        self.progress = Progress(self.request.position)

    @classmethod
    def of(cls, request: Request, initial_hidden: Float32, vocab_size: int) -> Row:
        """Return a row for a request at its beginning. It takes over the (L, H) array `initial_hidden` of zeros.

        The request is checked completely, so the row is one that a stepper can advance to its end. Raises InvalidValue.
        """
        request.check(initial_hidden.shape, vocab_size)
        if request.hidden is not None:
            write_state(initial_hidden, request.hidden)
        generated = [] if request.generated is None else request.generated.tolist()
        row = cls(request, initial_hidden)
        if request.sampling.penalizes:
            prompt = request.prompt if request.history_prompt is None else request.history_prompt
            row.history = History(vocab_size, prompt)
            for char in generated:
                row.history.add(char)
        row.progress.state = request.initial_state
        return row

    @property
    def position(self) -> int:
        """Characters consumed."""
        return self.progress.position

    @property
    def num_read(self) -> int:
        """Characters of the prompt that were read."""
        return self.progress.num_read

    @property
    def num_generated(self) -> int:
        """Characters generated."""
        return self.progress.num_generated

    @property
    def state(self) -> int:
        """The automaton's state after all generated characters; 0 without one."""
        return self.progress.state

    @property
    def is_reading(self) -> bool:
        """Whether characters of the prompt are left to read."""
        return self.num_read < len(self.request.prompt)

    @property
    def scores(self) -> bool:
        """Whether the next characters need scores."""
        return self.request.num_logprobs is not None and (self.request.score_prompt or not self.is_reading)

    @property
    def num_left(self) -> int:
        """Characters until the text has to be complete."""
        return self.request.chars_left - self.num_generated

    @property
    def first_stop(self) -> int:
        """How many more characters are drawn before one may complete a stop string."""
        return max(0, self.request.first_stop - self.num_generated)

    @property
    def num_withheld(self) -> int:
        """How many of the last generated characters may turn out to belong to a stop string."""
        automaton = self.request.automaton
        return 0 if automaton is None else automaton.withheld.item(self.state)

    @property
    def ends_empty(self) -> bool:
        """Whether the automaton ends the text before the first character is drawn, as soon as the prompt is read."""
        automaton, request = self.request.automaton, self.request
        if automaton is None or self.num_generated:
            return False
        if automaton.stop_chars[self.state] and request.num_before > request.min_chars:
            return True
        return automaton.restricts and automaton.ends(self.state, self.num_left)

    def check(self, shape: tuple[int, ...], vocab_size: int) -> None:
        """Raise InvalidValue unless a stepper can advance this row, which was not advanced yet, to its end.

        Args:
            shape: (L, H) of the model's states.
            vocab_size: V, the characters of the model.
        """
        check_state(self.hidden, shape)
        self.request.check(shape, vocab_size)
        if self.request.sampling.penalizes and self.history is None:
            raise InvalidValue("penalties need a history")


class Batch(tuple[Row, ...]):
    """Rows that several calls advance together. With it a stepper need not look at each row again in every call.

    From the first call to the last, only calls with this batch may advance its rows.
    """

    packed: Any = None  # what the stepper stores of the batch between calls


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
    # How many of the last generated characters, those of earlier calls included, may belong to a stop string.
    num_withheld: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it tells nothing: no character was generated, and none was scored."""
        return not len(self.chars) and self.prompt_scores is None

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
            next((part.num_withheld for part in reversed(parts) if not part.is_empty), 0),
        )


NOTHING = StepResult(np.empty(0, np.int64))


@dataclass(slots=True)
class Steps(Sequence[StepResult]):
    """What one call of `advance` did to all its rows, and as a sequence what it did to each.

    Rows without scores have no result of their own until one is taken from the sequence: with hundreds of rows, making
    them would take longer than anything else outside the steps.
    """

    drawn: Ids  # (B, n) int64: each row begins with its generated characters
    num_drawn: NDArray[np.int64] | None  # (B,), how many these are; None: n in every row
    num_withheld: NDArray[np.int64] | None  # (B,), see StepResult; None: 0 in every row
    results: dict[int, StepResult]  # by index, of rows for which the arrays above don't have everything
    finished: list[int]  # indices of the rows that the call has finished
    num_read: int  # characters of prompts, of all rows together
    num_generated: int  # characters, of all rows together

    @classmethod
    def of(cls, results: Sequence[StepResult], finished: list[int], num_read: int) -> Steps:
        """Return the steps with these results."""
        drawn, num_drawn = np.empty((len(results), 0), np.int64), np.zeros(len(results), np.int64)
        some = {i: one for i, one in enumerate(results) if not one.is_empty}
        return cls(drawn, num_drawn, None, some, finished, num_read, sum(len(one.chars) for one in results))

    @classmethod
    def joined(cls, calls: Sequence[Steps]) -> Steps | None:
        """Return consecutive calls with the same rows as one, or None if one of them did not draw n in every row."""
        if len(calls) < 2 or any(one.num_drawn is not None or one.results for one in calls):
            return None
        num_read, num_generated = sum(one.num_read for one in calls), sum(one.num_generated for one in calls)
        drawn = np.concatenate([one.drawn for one in calls], axis=1)
        return cls(drawn, None, calls[-1].num_withheld, {}, [], num_read, num_generated)

    def part(self, index: int) -> Ids | StepResult | None:
        """Return what the call did to a row: its (m,) int64 characters alone if that is all; None if nothing."""
        if index in self.results:
            return self.results[index]
        chars: Ids = self.drawn[index]
        if self.num_drawn is not None:
            if not (num_drawn := self.num_drawn.item(index)):
                return None
            chars = chars[:num_drawn]
        if self.num_withheld is not None and (num_withheld := self.num_withheld.item(index)):
            return StepResult(chars, None, None, num_withheld)
        return chars

    def __len__(self) -> int:
        return len(self.drawn)

    @overload
    def __getitem__(self, index: int) -> StepResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepResult]: ...
    def __getitem__(self, index: int | slice) -> StepResult | list[StepResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = self.part(range(len(self))[index])
        return NOTHING if part is None else part if isinstance(part, StepResult) else StepResult(part)


class Stepper(Protocol):
    """Advances texts of one model.

    A character of a row is read from its prompt or, when the prompt is used up, drawn from the logits of the row's
    state. Then the network consumes it: hidden = f(hidden, character), position + 1. So a row's state is always the
    state after its whole text, including the last generated character.

    Only characters are drawn that the row's automaton allows. It ends the text (`stop`) where a stop string is
    complete, and where nothing may come next: also before the first character. Otherwise the text ends at max_chars
    (`length`).

    Steps are exact: what happens to a row depends on this row alone. It doesn't depend on other rows, their order or
    number, on num_chars, on how often `advance` was called, on threads or on the processor. All implementations give
    the same bits: products of integers in int32; everything else element by element, float32 in the step and float64 in
    sampling, in the order written in `arithmetic.py`, `sampling.py`, `scores.py`, `gates.py` and `torch_stepper.py`,
    without fused multiply-adds.

    Only one thread at a time may call a stepper. A stepper must not wait for anything, do I/O, log, or keep a reference
    to a row or its arrays after it returns. What it needs in the next call it stores in `Row.packed` and
    `Batch.packed`, which are freed with the row or the batch. When it raises, it must release everything it acquired.
    An implementation without Python code in its loop should run without the interpreter's lock.
    """

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        """Advance every row by `num_chars` characters, or to its end if that is nearer. Return a result for each row.

        Rows must be distinct; their number is arbitrary. They may be a `Batch`. A finished row is left unchanged. A row
        with an empty prompt and max_chars = 0 is finished without a step.

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
                Row(_scored(text.ids[begin + position : min(begin + stop, end)].astype(np.int64), position), hidden)
                for begin, end, hidden in reading
            ]
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


def _scored(ids: Ids, position: int) -> Request:
    return Request(ids, max_chars=0, seed=0, position=position, num_logprobs=0, score_prompt=True)

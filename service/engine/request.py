"""What is asked of the engine, and the handle by which the asker gets it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from service.arrays import Float32, Ids, write_state
from service.engine.sampling import History
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.stepper import Distribution, Row, StepResult
from service.errors import EngineFailed

EndReason = Literal["stop", "length", "cancelled"]
_CHECK_S = 0.5  # how often a waiting caller looks whether the engine still steps


@dataclass(frozen=True)
class Request:
    """One text to advance: read a prompt, then generate. The fields mean what they mean in `Row`.

    hidden: (L, H) float32, the state to begin with, after `position` characters; None: the zero state. It is copied.
    history_prompt: what penalties take for the prompt, if that is more than is to be read. generated: (n,) int64 ids
    that were generated before `position` by a run that this one goes on with: penalties and stop strings count them.
    checkpoint_positions: the states after these positions, in rising order, are wanted too.
    num_next: as in `Row`.
    """

    prompt: Ids
    max_chars: int
    seed: int
    sampling: SamplingSettings = PLAIN
    stops: tuple[Ids, ...] = ()
    num_logprobs: int | None = None
    score_prompt: bool = False
    hidden: Float32 | None = None
    position: int = 0
    history_prompt: Ids | None = None
    generated: Ids | None = None
    checkpoint_positions: tuple[int, ...] = ()
    num_next: int | None = None

    def row(self, initial_hidden: Float32, vocab_size: int) -> Row:
        """A row at the beginning of the request. initial_hidden: (L, H), the row's own from now on."""
        if self.hidden is not None:
            write_state(initial_hidden, self.hidden)
        history = None
        if self.sampling.penalizes:
            history = History(vocab_size, self.prompt if self.history_prompt is None else self.history_prompt)
        before: list[int] = [] if self.generated is None else self.generated.tolist()
        if history is not None:
            for char in before:
                history.add(char)
        return Row(
            hidden=initial_hidden,
            position=self.position,
            prompt=self.prompt,
            max_chars=self.max_chars,
            seed=self.seed,
            sampling=self.sampling,
            stops=self.stops,
            history=history,
            num_logprobs=self.num_logprobs,
            score_prompt=self.score_prompt,
            checkpoint_positions=self.checkpoint_positions,
            num_next=self.num_next,
            tail=before[-max(map(len, self.stops)) :] if self.stops else [],
        )


@dataclass(frozen=True)
class End:
    """How a text stands when nothing more is done to it.

    hidden: (L, H) float32 after `position` characters, all that were read and generated. kept: of the positions whose
    states were wanted, those that were reached -> (L, H) float32. next: what may follow, if that was wanted.
    """

    reason: EndReason
    hidden: Float32
    position: int
    checkpoints: dict[int, Float32]
    next: Distribution | None = None


class Handle:
    """The asker's end of a request: characters come out, a cancellation goes in.

    The engine's thread publishes, one other thread takes. A taker is woken only for what it waits for.
    """

    def __init__(self, request: Request, check_engine: Callable[[], None]) -> None:
        self.request = request
        self.is_cancelled = False
        self.end: End | None = None
        self._check_engine = check_engine
        self._failure: EngineFailed | None = None
        self._parts: list[StepResult] = []
        self._ready = threading.Condition(threading.Lock())
        self._wants_parts = False

    def cancel(self) -> None:
        """Stop at the next tick. Harmless at any time, from any thread."""
        self.is_cancelled = True

    def read(self, flush_interval_s: float | None, timeout_s: float | None = None) -> StepResult | None:
        """What has come in since the last call, in one piece; None if there is nothing.

        Lets flush_interval_s pass, for things to come in, and then waits for the first; flush_interval_s None: waits for the end. At
        the end it returns at once, and so it does when timeout_s have passed with nothing. Raises EngineFailed.
        """
        started = time.monotonic()
        with self._ready:
            if flush_interval_s:
                self._wait(started + flush_interval_s, for_parts=False)
            self._wait(None if timeout_s is None else started + timeout_s, for_parts=flush_interval_s is not None)
            if flush_interval_s is None and self.end is None:
                return None
            parts, self._parts = self._parts, []
        return StepResult.join(parts) if parts else None

    def wait(self) -> End:
        """The end. Raises EngineFailed."""
        with self._ready:
            self._wait(None, for_parts=False)
            if self.end is None:
                raise EngineFailed("the engine ended without a word")
            return self.end

    def publish(self, part: StepResult | None, end: End | None) -> None:
        """The engine's side: hand over what a tick brought."""
        with self._ready:
            if part is not None and (len(part.chars) or part.prompt_scores is not None):
                self._parts.append(part)
            if end is not None:
                self.end = end
            if end is not None or (self._wants_parts and self._parts):
                self._ready.notify_all()

    def fail(self, failure: EngineFailed) -> None:
        """The engine's side: nothing more will come."""
        with self._ready:
            self._failure = failure
            self._ready.notify_all()

    def _wait(self, deadline: float | None, *, for_parts: bool) -> None:
        """With the lock held: wait for the end, the deadline or, if that is wanted, for something to have come in."""
        while self.end is None and not (for_parts and self._parts):
            if self._failure is not None:
                raise self._failure
            self._check_engine()
            left = _CHECK_S if deadline is None else min(_CHECK_S, deadline - time.monotonic())
            if left <= 0:
                return
            # Who waits for the end, or for a time to pass, is not to be woken by every tick.
            self._wants_parts = for_parts
            self._ready.wait(left)

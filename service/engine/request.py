"""A request to the engine, and the handle through which the caller reads its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from service.arrays import Float32, Ids, write_state
from service.engine.sampling import History
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.scores import Distribution
from service.engine.stepper import FinishReason, Row, StepResult, check_ids, check_state
from service.errors import EngineFailed
from service.shares import current_client

EndReason = FinishReason | Literal["cancelled"]
_BLOCK_PARTS = 64
_CHECK_S = 0.5  # how often a waiting reader checks that the engine is still stepping


@dataclass(frozen=True)
class Request:
    """One text to advance: read a prompt, then generate. Fields without a comment mean what they mean in `Row`."""

    prompt: Ids
    max_chars: int
    seed: int
    sampling: SamplingSettings = PLAIN
    stops: tuple[Ids, ...] = ()
    min_chars: int = 0  # of `generated` and what this request generates, together
    num_logprobs: int | None = None
    score_prompt: bool = False
    # (L, H) float32, the state after `position` characters; None for the zero state. Copied, not modified.
    hidden: Float32 | None = None
    position: int = 0  # characters consumed before this request
    history_prompt: Ids | None = None  # the prompt as penalties count it; None if that is `prompt`
    # (n,) int64 ids before `position` that an interrupted run generated. Penalties and stop strings count them, so that
    # this request continues the run exactly. None if there was no such run.
    generated: Ids | None = None
    checkpoint_positions: tuple[int, ...] = ()
    num_next: int | None = None
    # For whom the text is advanced; see `shares`. It has no effect on the text.
    client: str = field(default_factory=current_client, compare=False)

    def row(self, initial_hidden: Float32, vocab_size: int) -> Row:
        """Return a row for this request at its beginning. The row takes over the (L, H) array `initial_hidden`.

        This is the one place where a request is checked completely, so the row is one that a stepper can advance to its
        end. Raises InvalidValue.
        """
        if self.hidden is not None:
            check_state(self.hidden, initial_hidden.shape)
            write_state(initial_hidden, self.hidden)
        generated: list[int] = []
        if self.generated is not None:
            check_ids(self.generated, vocab_size, "prompt")
            generated = self.generated.tolist()
        history = None
        if self.sampling.penalizes:
            prompt = self.prompt if self.history_prompt is None else self.history_prompt
            check_ids(prompt, vocab_size, "prompt")
            history = History(vocab_size, prompt)
            for char in generated:
                history.add(char)
        row = Row(
            hidden=initial_hidden,
            position=self.position,
            prompt=self.prompt,
            max_chars=self.max_chars,
            seed=self.seed,
            sampling=self.sampling,
            stops=self.stops,
            min_chars=max(0, self.min_chars - len(generated)) if self.min_chars > 0 else self.min_chars,
            history=history,
            num_logprobs=self.num_logprobs,
            score_prompt=self.score_prompt,
            checkpoint_positions=self.checkpoint_positions,
            num_next=self.num_next,
            tail=generated[-max(map(len, self.stops)) :] if self.stops else [],
        )
        row.check(initial_hidden.shape, vocab_size)
        return row


@dataclass(frozen=True)
class End:
    """The final state of a text."""

    reason: EndReason
    hidden: Float32  # (L, H) float32, the state after `position` characters
    position: int  # characters consumed: the request's `position`, and all that were read and generated
    checkpoints: dict[int, Float32]  # (L, H) float32 by position, for the requested positions that were reached
    next: Distribution | None = None  # likeliest next characters; None if not requested


@dataclass(frozen=True)
class Snapshot:
    """The state of a text at one moment before its end."""

    hidden: Float32  # (L, H) float32, the state after `position` characters; read-only
    position: int  # characters consumed
    checkpoint_positions: tuple[int, ...]  # those that were requested, also the ones that were not yet reached
    reached: list[Float32]  # (L, H) float32, the states at the first of these positions

    @property
    def checkpoints(self) -> dict[int, Float32]:
        """The (L, H) float32 states by position, for the requested positions that were reached."""
        return dict(zip(self.checkpoint_positions, self.reached, strict=False))


@dataclass(slots=True)
class TextTimes:
    """When a text reached its stages, in seconds on the engine's clock. The engine writes, any thread may read."""

    submitted: float
    started: float | None = None  # the tick began that advanced it first
    first: float | None = None  # the tick ended that generated its first characters
    ended: float | None = None


class Handle:
    """The caller's side of a request: the caller reads characters from it, and can cancel the text.

    The engine's thread adds results; one other thread reads them, and one may request snapshots. A reader is woken only
    by what it waits for.
    """

    def __init__(self, request: Request, check_engine: Callable[[], None], submitted_at: float = 0.0) -> None:
        self.request = request
        self.times = TextTimes(submitted_at)
        self.is_cancelled = False
        self.end: End | None = None  # None while the text is running or waiting
        self.snapshot: Snapshot | None = None  # what was requested last; None until the engine has taken it
        self.wants_snapshot = False
        self._check_engine = check_engine
        self._failure: str | None = None  # why there will be no more results
        self._parts: list[StepResult] = []  # of the last ticks
        # Earlier ones, joined: the result of a tick with hundreds of texts is mostly objects, and thousands may wait.
        self._blocks: list[StepResult] = []
        self._ready = threading.Condition(threading.Lock())
        self._reader_wants_parts = False

    def cancel(self) -> None:
        """End the text at the next tick. Any thread may call this at any time, also after the end."""
        self.is_cancelled = True

    def request_snapshot(self) -> None:
        """Have the engine set `snapshot` after its next tick, unless the text has ended by then."""
        self.snapshot = None
        self.wants_snapshot = True

    def read(self, flush_interval_s: float | None, timeout_s: float | None = None) -> StepResult | None:
        """Return all results since the last call, joined into one, or None if there are none.

        Returns without further waiting as soon as the text has ended. Raises EngineFailed.

        Args:
            flush_interval_s: wait for this long, so that results accumulate, and then until there is at least one
                result. None: wait for the end of the text, and return None if it has not ended in time.
            timeout_s: wait no longer than this after the interval has passed. None: no limit.
        """
        started = time.monotonic()
        with self._ready:
            if flush_interval_s:
                self._wait(started + flush_interval_s, for_parts=False)
            self._wait(None if timeout_s is None else started + timeout_s, for_parts=flush_interval_s is not None)
            if flush_interval_s is None and self.end is None:
                return None
            parts, self._blocks, self._parts = [*self._blocks, *self._parts], [], []
        return StepResult.join(parts) if parts else None

    def wait(self) -> End:
        """Wait for the end of the text and return it. Raises EngineFailed."""
        with self._ready:
            self._wait(None, for_parts=False)
            if self.end is None:
                raise EngineFailed("the engine stopped before this text ended")
            return self.end

    def publish(self, part: StepResult | None, end: End | None) -> None:
        """Add the result of a tick, and the end if the text has ended. The engine calls this."""
        with self._ready:
            if part is not None and (len(part.chars) or part.prompt_scores is not None):
                self._parts.append(part)
                if len(self._parts) == _BLOCK_PARTS:
                    self._blocks.append(StepResult.join(self._parts))
                    self._parts = []
            if end is not None:
                self.end = end
            if end is not None or (self._reader_wants_parts and (self._parts or self._blocks)):
                self._ready.notify_all()

    def publish_snapshot(self, snapshot: Snapshot) -> None:
        """Answer `request_snapshot`. For the engine."""
        self.wants_snapshot = False  # first: as soon as there is a snapshot, the next one may be requested
        self.snapshot = snapshot

    def fail(self, failure: str) -> None:
        """Make every wait raise EngineFailed with this message: there are no more results. The engine calls this."""
        with self._ready:
            self._failure = failure
            self._ready.notify_all()

    def _wait(self, deadline: float | None, *, for_parts: bool) -> None:
        """Wait for the end, the deadline or, if `for_parts`, for a part. Needs the lock."""
        while self.end is None and not (for_parts and (self._parts or self._blocks)):
            if self._failure is not None:
                raise EngineFailed(self._failure)
            self._check_engine()
            left = _CHECK_S if deadline is None else min(_CHECK_S, deadline - time.monotonic())
            if left <= 0:
                return
            # A reader that waits for the end, or for time to pass, must not be woken by every tick.
            self._reader_wants_parts = for_parts
            self._ready.wait(left)

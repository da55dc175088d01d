"""The caller's side of a text that the engine advances: its characters, its end, and how to cancel it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from service.arrays import Float32, Ids
from service.engine.request import Request
from service.engine.scores import Distribution
from service.engine.stepper import NOTHING, FinishReason, StepResult, Steps
from service.errors import EngineFailed

EndReason = FinishReason | Literal["cancelled"]
_BLOCK_PARTS = 64
_CHECK_S = 0.5  # how often a waiting reader checks that the engine is still stepping


@dataclass(frozen=True)
class End:
    """The final state of a text."""

    reason: EndReason
    hidden: Float32  # (L, H) float32, the state after `position` characters
    position: int  # characters consumed: the request's `position`, and all that were read and generated
    checkpoints: dict[int, Float32]  # (L, H) float32 by position, for the requested positions that were reached
    next: Distribution | None = None  # likeliest next characters; None if not requested
    num_stop_chars: int = 0  # of the stop string that ended the text; 0 if none did


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


class Update(NamedTuple):
    """What a reader gets of a text at one moment."""

    result: StepResult  # since the last read; empty if there was nothing
    end: End | None  # if the text has ended; then there is no result after this one


@dataclass(slots=True)
class TextTimes:
    """When a text reached its stages, in seconds on the engine's clock. The engine writes, any thread may read."""

    submitted: float
    started: float | None = None  # the tick began that advanced it first
    first: float | None = None  # the tick ended that generated its first characters
    ended: float | None = None


class Wishes:
    """What threads that have handles want of the engine's thread. It looks here instead of at every handle."""

    def __init__(self) -> None:
        self.results: set[Handle] = set()  # readers wait for the next results of these
        self.snapshots: set[Handle] = set()
        self.any_cancelled = False  # whether an open text may have been cancelled since the engine looked


class Handle:
    """The caller's side of a request: the caller reads characters from it, and can cancel the text.

    The engine's thread adds results; one other thread reads them, and one may request snapshots. A reader is woken only
    by what it waits for.

    While a text is in a batch, its results are not added to its handle: the handle finds them in what all calls with
    this batch have done, when someone reads or the text leaves the batch.
    """

    def __init__(
        self,
        request: Request,
        check_engine: Callable[[], None],
        submitted_at: float = 0.0,
        num_withheld: int = 0,
        wishes: Wishes | None = None,
    ) -> None:
        """Called by the engine.

        Args:
            request: what was submitted.
            check_engine: raises EngineFailed if there will be no more results.
            submitted_at: seconds on the engine's clock.
            num_withheld: how many of the last characters of `generated` may turn out to belong to a stop string.
            wishes: those of the engine's handles.
        """
        self.request, self.num_withheld_before = request, num_withheld
        self.times = TextTimes(submitted_at)
        self.is_cancelled = False
        self.snapshot: Snapshot | None = None  # what was requested last; None until the engine has taken it
        self._check_engine, self._wishes = check_engine, wishes if wishes is not None else Wishes()
        self._end: End | None = None
        # What a reader gets if there is no result.
        self._nothing = replace(NOTHING, num_withheld=num_withheld) if num_withheld else NOTHING
        self._failure: str | None = None  # why there will be no more results
        self._parts: list[Ids | StepResult] = []  # results that were not read
        # Earlier ones, joined: the result of a tick with hundreds of texts is mostly objects, and thousands may wait.
        self._blocks: list[StepResult] = []
        self._batch: list[Steps] | None = None  # what calls have done to the text's batch; None if it is in none
        self._row = self._num_taken = 0  # its index in the batch; how many of the calls are in `_parts`
        self._lock = threading.Lock()  # guards the results
        self._ready = threading.Condition(self._lock)

    @property
    def end(self) -> End | None:
        """The end of the text; None while it is running or waiting. Results may be left to read after it."""
        return self._end

    def cancel(self) -> None:
        """End the text at the next tick. Any thread may call this at any time, also after the end."""
        self.is_cancelled = True
        self._wishes.any_cancelled = True

    def request_snapshot(self) -> None:
        """Have the engine set `snapshot` after its next tick, unless the text has ended by then."""
        self.snapshot = None
        with self._lock:
            if self._end is None and self._failure is None:
                self._wishes.snapshots.add(self)

    def read(self, flush_interval_s: float, timeout_s: float | None = None) -> Update:
        """Return all results since the last call, joined into one, and the end if the text has ended. For streams.

        Waits until there is a result, or the text has ended. Raises EngineFailed.

        Args:
            flush_interval_s: wait for this long at least, so that results accumulate, unless the text ends.
            timeout_s: wait no longer than this after the interval has passed. None: no limit.
        """
        started = time.monotonic()
        with self._ready:
            if flush_interval_s:
                self._wait(started + flush_interval_s, for_parts=False)
            self._wait(None if timeout_s is None else started + timeout_s, for_parts=True)
            return Update(self._take_parts(), self._end)

    def read_whole(self, timeout_s: float | None = None) -> Update:
        """Wait for the end of the text; return it, and all results since the last call, joined into one.

        timeout_s: wait no longer than this. If the text has not ended by then, there is no end and the result is empty:
        a later call returns everything. None: no limit. Raises EngineFailed.
        """
        with self._ready:
            self._wait(None if timeout_s is None else time.monotonic() + timeout_s, for_parts=False)
            return Update(self._nothing, None) if self._end is None else Update(self._take_parts(), self._end)

    def wait(self) -> End:
        """Wait for the end of the text and return it. Raises EngineFailed."""
        with self._ready:
            self._wait(None, for_parts=False)
            if self._end is None:
                raise AssertionError("without a deadline, the wait ends with the text")
            return self._end

    def publish(self, part: Ids | StepResult) -> None:
        """Add a result, which is not empty, of a text that is in no batch. The engine calls this."""
        with self._lock:
            self._add(part)
            self._ready.notify_all()

    def join_batch(self, steps: list[Steps], row: int) -> None:
        """Find results in what will be appended to `steps`: what each call does to all rows. The engine calls this."""
        self._row, self._num_taken = row, 0
        self._batch = steps  # last, because a reader doesn't look at the others without it

    def leave_batch(self, joined: Steps | None) -> None:
        """Find no more results there. The engine calls this, before the text joins another batch.

        joined: all that the calls did, as one; None if that has no simple form.
        """
        with self._lock:
            if joined is None or self._num_taken:
                self._take_from_batch()
            elif (part := joined.part(self._row)) is not None:
                self._add(part.copy() if isinstance(part, np.ndarray) else replace(part, chars=part.chars.copy()))
            self._batch = None

    def wake(self) -> None:
        """Wake the reader if there is a result. The engine calls this after a call with the text's batch."""
        with self._lock:
            if self._has_parts():
                self._ready.notify_all()

    def publish_end(self, end: End) -> None:
        """Add the end of the text, which has left its batch. The engine calls this."""
        with self._lock:
            self._end = end
            self._wishes.snapshots.discard(self)
            self._ready.notify_all()

    def publish_snapshot(self, snapshot: Snapshot) -> None:
        """Answer `request_snapshot`. For the engine."""
        self._wishes.snapshots.discard(self)  # first: as soon as there is a snapshot, the next one may be requested
        self.snapshot = snapshot

    def fail(self, failure: str) -> None:
        """Make every wait raise EngineFailed with this message: there are no more results. The engine calls this."""
        with self._ready:
            self._failure = failure
            self._wishes.snapshots.discard(self)
            self._ready.notify_all()

    def _take_parts(self) -> StepResult:
        """Return all results that were not read yet, joined. Needs the lock."""
        self._take_from_batch()
        parts = [*self._blocks, *self._parts]
        self._blocks, self._parts = [], []
        if not parts:
            return self._nothing
        result = _joined(parts)
        if result.num_withheld != self._nothing.num_withheld:
            self._nothing = replace(NOTHING, num_withheld=result.num_withheld)
        return result

    def _has_parts(self) -> bool:
        """Whether there is a result that was not read. Needs the lock."""
        self._take_from_batch()
        return bool(self._parts or self._blocks)

    def _take_from_batch(self) -> None:
        """Add what calls with the batch have done to this text. Needs the lock."""
        if self._batch is None:
            return
        for steps in self._batch[self._num_taken :]:
            self._num_taken += 1
            if (part := steps.part(self._row)) is not None:
                self._add(part)

    def _add(self, part: Ids | StepResult) -> None:
        """Add a result. Needs the lock."""
        self._parts.append(part)
        if len(self._parts) >= _BLOCK_PARTS:
            self._blocks.append(_joined(self._parts))
            self._parts = []

    def _wait(self, deadline: float | None, *, for_parts: bool) -> None:
        """Wait for the end, the deadline or, if `for_parts`, for a part. Needs the lock."""
        # A reader that waits for the end, or for time to pass, must not be woken by every tick.
        if for_parts:
            self._wishes.results.add(self)  # before it looks for parts; the engine looks here after it has added some
        try:
            while self._end is None and not (for_parts and self._has_parts()):
                if self._failure is not None:
                    raise EngineFailed(self._failure)
                self._check_engine()
                left = _CHECK_S if deadline is None else min(_CHECK_S, deadline - time.monotonic())
                if left <= 0:
                    return
                self._ready.wait(left)
        finally:
            self._wishes.results.discard(self)


def _joined(parts: Sequence[Ids | StepResult]) -> StepResult:
    """Return consecutive parts, at least one, as one result."""
    chars = [part for part in parts if not isinstance(part, StepResult)]
    if len(chars) == len(parts):
        return StepResult(np.concatenate(chars))
    return StepResult.join([part if isinstance(part, StepResult) else StepResult(part) for part in parts])

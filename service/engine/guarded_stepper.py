"""The stepper of an engine: for one thread at a time, with its time measured, and refused once it has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import structlog

from service.arrays import Float32
from service.engine.counters import Counters
from service.engine.short_text import ReadText, ShortText, ShortTextReader
from service.engine.stepper import InvalidRows, Row, Stepper, Steps
from service.errors import EngineFailed

log = structlog.get_logger(__name__)

_FAILED = "the engine has failed: restart the server"


class GuardedStepper:
    """Advances rows for the threads of an engine. A thread that calls `advance` must hold `lock`.

    Args:
        stepper: what computes.
        stall_s: seconds after which a step that has not returned counts as stuck.
        clock: returns seconds.
    """

    def __init__(self, stepper: Stepper, stall_s: float, clock: Callable[[], float]) -> None:
        self.lock = threading.Lock()
        self.counters = Counters()  # written while holding the lock, read by any thread
        # Why it has failed for good. Not an exception: one that is raised again and again gathers the tracebacks of all
        # its callers, and with them their memory.
        self.failure: str | None = None
        self._stepper, self._stall_s, self._clock = stepper, stall_s, clock
        self._started: float | None = None  # None while no step is running

    def initial_hidden(self) -> Float32:
        """Return (L, H) float32 zeros, the state before the first character."""
        return self._stepper.initial_hidden()

    def check(self) -> None:
        """Raise EngineFailed if the stepper has failed, or a step has taken longer than `stall_s`. Any thread may."""
        if self.failure is not None:
            raise EngineFailed(self.failure)
        started = self._started
        if started is not None and self._clock() - started > self._stall_s:
            raise EngineFailed(f"the engine is stuck: its step has taken more than {self._stall_s:.0f} seconds")

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        """See `Stepper`. Raises InvalidRows, and EngineFailed after any other exception: then all later calls fail."""
        if self.failure is not None:
            raise EngineFailed(self.failure)
        self._started = started = self._clock()
        try:
            steps = self._stepper.advance(rows, num_chars)
        except InvalidRows as invalid:
            # The engine accepts only rows that can be advanced, so this is a fault of ours.
            cause = next(iter(invalid.causes.values()))
            log.error(
                "texts can't be computed", num_texts=len(invalid.causes), error=type(cause).__name__, exc_info=cause
            )
            raise
        except BaseException as error:
            self.fail(error)
            raise EngineFailed(_FAILED) from error
        finally:
            self._started = None
        self.counters.ticked(len(rows), steps.num_read, steps.num_generated, self._clock() - started)
        return steps

    @property
    def reads_short_texts(self) -> bool:
        """Whether the stepper has `read`."""
        return hasattr(self._stepper, "read")

    def read(self, texts: Sequence[ShortText]) -> list[ReadText]:
        """See `ShortTextReader`. Raises EngineFailed after any exception: then all later calls fail."""
        if self.failure is not None:
            raise EngineFailed(self.failure)
        self._started = started = self._clock()
        try:
            read = cast(ShortTextReader, self._stepper).read(texts)
        except BaseException as error:
            self.fail(error)
            raise EngineFailed(_FAILED) from error
        finally:
            self._started = None
        self.counters.ticked(len(texts), sum(len(text.ids) for text in texts), 0, self._clock() - started)
        return read

    def fail(self, error: BaseException) -> str:
        """Refuse all later calls because of an error, which is logged. Return the reason that callers get."""
        if self.failure is None:
            log.error("the engine failed", error=type(error).__name__, exc_info=error)
            self.failure = _FAILED
        return self.failure

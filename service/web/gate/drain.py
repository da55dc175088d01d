"""Draining: a process that shuts down lets open requests finish for a limited time, and refuses new work at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

# The last part of the drain time: interrupted runs are saved in it, and their clients get the position to resume from.
INTERRUPT_S = 2.0


class Drain:
    """The schedule of a shutdown.

    After `begin`, new work is refused (by `guard`). Open requests may finish. When the drain time is nearly over, the
    worker interrupts those that remain: the callbacks registered with `on_interrupt` run, in the order of registration.

    Any thread may read the properties. Only the worker's main loop calls `interrupt`.
    """

    def __init__(self, drain_s: float, notice_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a drain that has not begun.

        Args:
            drain_s: Seconds from `begin` to the end, with the `INTERRUPT_S` in which callbacks run.
            notice_s: Seconds, part of `drain_s`, in which the process keeps answering although it has no open request,
                so that a balancer notices and stops sending.
            clock: Monotonic seconds.
        """
        self.has_begun = False
        self._drain_s, self._notice_s, self._clock = drain_s, notice_s, clock
        self._notice_ends_at = self._interrupt_at = math.inf
        self._callbacks: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None  # runs the callbacks

    def begin(self, *, at_once: bool = False) -> None:
        """Start to drain; repeating it changes nothing. Safe in a signal handler.

        `at_once` skips the time in which open requests may finish, also if draining has begun: for a server that is
        stopped from a terminal.
        """
        if at_once or not self.has_begun:
            now = self._clock()
            self._notice_ends_at = now if at_once else now + self._notice_s
            self._interrupt_at = now if at_once else now + max(0.0, self._drain_s - INTERRUPT_S)
        self.has_begun = True

    def on_interrupt(self, callback: Callable[[], None]) -> None:
        """Register a function that ends one kind of work that is still running."""
        self._callbacks.append(callback)

    def should_interrupt(self, num_requests: int) -> bool:
        """Return whether to call `interrupt` now: the time is over, or nothing is open and the notice time is over."""
        now = self._clock()
        return now >= self._interrupt_at or (now >= self._notice_ends_at and not num_requests)

    def interrupt(self, num_requests: int) -> None:
        """Start the callbacks, once. They save sessions, so they run in a thread and don't block the main loop."""
        if self._thread is None:
            log.info("drained" if not num_requests else "drain time is over", num_requests=num_requests)
            self._thread = threading.Thread(target=self._run_callbacks, name="drain", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the system refuses another thread; to save the sessions is more important
                self._run_callbacks()

    @property
    def is_interrupted(self) -> bool:
        """Whether all callbacks have returned."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def is_overdue(self) -> bool:
        """Whether the whole drain time is over, so that the process exits without waiting for anything."""
        return self._clock() >= self._interrupt_at + INTERRUPT_S

    def _run_callbacks(self) -> None:
        for callback in self._callbacks:
            try:
                callback()
            except Exception as error:  # the other callbacks have to run all the same
                log.error("interrupting requests failed", error=repr(error), exc_info=error)

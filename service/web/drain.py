"""How a process goes away: work that it has may finish, within a time; new work is refused at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

INTERRUPT_S = 2.0  # of the time to drain: for what is cut off to be saved, and for clients to be told where it stands


class Drain:
    """The plan of a shutdown, and how far it has come.

    From the beginning on whoever asks for work is refused. Work that is under way when the time is nearly over is cut
    off: what was registered with `on_interrupt` is called, in that order. Any thread may ask; `interrupt` is for one of them.
    """

    def __init__(self, drain_s: float, notice_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """drain_s: for everything. notice_s: of it, how long requests are answered although nothing is left to do."""
        self.has_begun = False
        self._drain_s, self._notice_s, self._clock = drain_s, notice_s, clock
        self._noticed_at = self._cut_at = math.inf
        self._at_cut: list[Callable[[], None]] = []
        self._cutting: threading.Thread | None = None

    def begin(self, *, at_once: bool = False) -> None:
        """From now on. at_once: without the time to drain, as for who waits at a terminal. Safe in a signal handler."""
        if at_once or not self.has_begun:
            now = self._clock()
            self._noticed_at = now if at_once else now + self._notice_s
            self._cut_at = now if at_once else now + max(0.0, self._drain_s - INTERRUPT_S)
        self.has_begun = True

    def on_interrupt(self, callback: Callable[[], None]) -> None:
        """Register what ends work of a kind."""
        self._at_cut.append(callback)

    def should_interrupt(self, num_working: int) -> bool:
        """Whether it is time: everybody has had time to notice, and nothing is at work, or it has to stop now."""
        now = self._clock()
        return now >= self._cut_at or (now >= self._noticed_at and not num_working)

    def interrupt(self, num_working: int) -> None:
        """End what is at work, in a thread of its own: it saves sessions, for which nobody else is to wait."""
        if self._cutting is None:
            log.info("drained" if not num_working else "draining takes too long", num_requests=num_working)
            self._cutting = threading.Thread(target=self._cut, name="drain", daemon=True)
            self._cutting.start()

    @property
    def is_interrupted(self) -> bool:
        """Whether everything was ended."""
        return self._cutting is not None and not self._cutting.is_alive()

    @property
    def is_overdue(self) -> bool:
        """Whether nobody is to be waited for any longer."""
        return self._clock() >= self._cut_at + INTERRUPT_S

    def _cut(self) -> None:
        for end in self._at_cut:
            try:
                end()
            except Exception as error:  # the rest has to be ended all the same
                log.error("could not be ended in order", error=repr(error), exc_info=error)

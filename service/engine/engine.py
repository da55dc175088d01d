"""The engine: one thread that advances every open text of one model together, a few characters at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.arrays import Float32
from service.engine.counters import Counters
from service.engine.pace import Pace
from service.engine.request import End, EndReason, Handle, Request
from service.engine.scheduler import Scheduler
from service.engine.stepper import Row, Stepper, StepResult
from service.errors import EngineFailed, Overloaded

log = structlog.get_logger(__name__)

_SHORT_CHARS = 32  # to be read at once by whoever asks, if nothing else is going on


@dataclass(eq=False)
class _Text:
    """A request in the scheduler. row: from the moment it runs."""

    handle: Handle
    row: Row | None = None


class Engine:
    """Steps texts on a thread of its own, which computes and does nothing else. A few characters to be read while it is
    idle are stepped by the thread that asks: to wake another one, and to be woken by it, takes longer.

    max_running: texts in the batch. max_waiting: texts that wait for a place; more are refused. stall_s: a tick that
    lasts longer counts as wedged. Every method may be called from any thread.
    """

    def __init__(
        self,
        stepper: Stepper,
        vocab_size: int,
        max_running: int,
        max_waiting: int,
        stall_s: float = 30.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stepper, self._vocab_size = stepper, vocab_size
        self._max_open = max_running + max_waiting
        self._stall_s, self._clock = stall_s, clock
        self._scheduler: Scheduler[_Text] = Scheduler(max_running)
        self._pace = Pace()
        self.counters = Counters()  # written with the stepper held, read by anybody
        self._stepping = threading.Lock()  # held by whoever uses the stepper
        self._changed = threading.Condition(threading.Lock())  # guards what follows
        self._inbox: list[_Text] = []
        self._num_open = 0
        self._closing = False
        self._retired = False
        self._thread: threading.Thread | None = None
        self._failure: EngineFailed | None = None
        self._tick_started: float | None = None  # None: no tick is under way

    def submit(self, requests: Sequence[Request], *, after_another: bool = False) -> list[Handle]:
        """Take in all of these texts, or none. Raises Overloaded, EngineFailed.

        after_another: they belong to a text that has just ended, and take its place even if others are refused.
        """
        handles = [Handle(request, self.check) for request in requests]
        with self._changed:
            self.check()
            if self._closing:
                raise EngineFailed("the engine is shutting down: try again elsewhere or later")
            if self._num_open + len(handles) > self._max_open and not after_another:
                raise Overloaded("the server is busy and its queue is full: try again in a second")
            is_idle = self._num_open == 0 and len(requests) == 1 and _is_short(requests[0])
            at_once = is_idle and self._stepping.acquire(blocking=False)
            if not at_once:
                self._num_open += len(handles)
                self._inbox.extend(_Text(handle) for handle in handles)
                self._start()
                self._changed.notify_all()
        if at_once:
            self._do_at_once(handles[0])
        return handles

    def check(self) -> None:
        """Raises EngineFailed if the engine has died, or is stuck in a step."""
        if self._failure is not None:
            raise self._failure
        started = self._tick_started
        if started is not None and self._clock() - started > self._stall_s:
            raise EngineFailed(f"the engine has been in one step for over {self._stall_s:.0f} seconds")

    def initial_hidden(self) -> Float32:
        """(L, H) float32 zeros: the state before the first character."""
        return self._stepper.initial_hidden()

    @property
    def num_open(self) -> int:
        """Texts that run or wait."""
        return self._num_open

    @property
    def num_running(self) -> int:
        """Texts in the batch."""
        return len(self._scheduler.running)

    def retire(self) -> None:
        """Let its thread end whenever nothing is open. Who still holds the engine may go on using it."""
        with self._changed:
            self._retired = True
            self._changed.notify_all()

    def close(self) -> None:
        """End its thread. Texts that are still open fail, so that none looks complete; no new ones are taken."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._stall_s)
        if self._stepping.acquire(timeout=self._stall_s):  # nobody is in a step any more
            self._stepping.release()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def _do_at_once(self, handle: Handle) -> None:
        """Step a short text on the caller's thread, which has taken the stepper."""
        try:
            row = handle.request.row(self._stepper.initial_hidden(), self._vocab_size)
            advance = self._advance([row], _SHORT_CHARS)[0]
        except BaseException as error:
            with self._changed:
                self._failure = _failed(error)
                self._changed.notify_all()  # the engine's thread is to end, and to fail what it has
            raise self._failure from error
        finally:
            self._stepping.release()
        handle.publish(advance, _end(row, row.finished or "length"))

    def _advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        before = sum([row.position for row in rows])
        self._tick_started = started = self._clock()
        advances = self._stepper.advance(rows, num_chars)
        self._tick_started = None
        duration_s = self._clock() - started
        num_stepped = sum([row.position for row in rows]) - before
        num_generated = sum([len(advance.chars) for advance in advances])
        self.counters.ticked(len(rows), num_stepped - num_generated, num_generated, duration_s)
        return advances

    def _run(self) -> None:
        try:
            while self._take_in():
                self._tick()
            # Only when closing: a retired engine may have a new thread by now, and new texts with it.
            if self._closing:
                self._fail_open_texts(EngineFailed("the server is shutting down: try again in a moment"))
        except BaseException as error:  # noqa: BLE001 - whatever it was, nobody may wait for a thread that is gone
            self._fail(self._failure or _failed(error))

    def _take_in(self) -> bool:
        """Wait for work, and let it in; False: the engine is to end."""
        scheduler = self._scheduler
        with self._changed:
            while not (self._inbox or scheduler.has_work or self._closing or self._retired or self._failure):
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._closing or not (self._inbox or scheduler.has_work):
                self._thread = None
                return False
            scheduler.add(self._inbox)
            self._inbox = []
        return True

    def _tick(self) -> None:
        """Schedule, advance, publish."""
        scheduler = self._scheduler
        self._end([text for text in (*scheduler.running, *scheduler.waiting) if text.handle.is_cancelled], "cancelled")
        for text in scheduler.admit():
            text.row = self._row(text)
        texts = scheduler.running
        rows = [text.row for text in texts if text.row is not None]
        if not rows:
            return
        num_chars = self._pace.num_chars(len(rows))
        with self._stepping:
            if self._failure is not None:
                raise self._failure
            started = self._clock()
            advances = self._advance(rows, num_chars)
            self._pace.measured(len(rows), num_chars, self._clock() - started)
        # AdmissionLimit are free before anybody hears of an end: who then comes back at once is not to be refused.
        self._forget([text for text, row in zip(texts, rows, strict=True) if row.finished is not None])
        for text, row, advance in zip(texts, rows, advances, strict=True):
            text.handle.publish(advance, _end(row, row.finished) if row.finished is not None else None)

    def _row(self, text: _Text) -> Row:
        return text.handle.request.row(self._stepper.initial_hidden(), self._vocab_size)

    def _end(self, texts: Sequence[_Text], reason: EndReason) -> None:
        self._forget(texts)
        for text in texts:
            row = text.row if text.row is not None else self._row(text)
            text.handle.publish(None, _end(row, reason))

    def _forget(self, texts: Sequence[_Text]) -> None:
        if texts:
            for text in texts:
                if text.handle.request.max_chars:
                    self.counters.ended(text.row.finished if text.row is not None else None)
            self._scheduler.remove(texts)
            with self._changed:
                self._num_open -= len(texts)

    def _open_texts(self) -> list[_Text]:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        return [*self._scheduler.running, *self._scheduler.waiting, *inbox]

    def _fail(self, failure: EngineFailed) -> None:
        with self._changed:
            self._failure = failure
        self._fail_open_texts(failure)

    def _fail_open_texts(self, failure: EngineFailed) -> None:
        texts = self._open_texts()
        for text in texts:
            text.handle.fail(failure)
        self._forget(texts)


def _failed(error: BaseException) -> EngineFailed:
    log.error("the engine failed", error=type(error).__name__, exc_info=error)
    return EngineFailed("the engine has failed: the server has to be restarted")


def _is_short(request: Request) -> bool:
    return request.max_chars == 0 and len(request.prompt) <= _SHORT_CHARS


def _end(row: Row, reason: EndReason) -> End:
    return End(
        reason, row.hidden, row.position, dict(zip(row.checkpoint_positions, row.checkpoints, strict=False)), row.next
    )

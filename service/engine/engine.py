"""The engine: a thread that advances all open texts of one model together, a few characters at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.arrays import Float32, read_state
from service.engine.counters import Counters, SubmittedBatch
from service.engine.pace import SHARED_TICK_S, TICK_S, Pace
from service.engine.request import End, EndReason, Handle, Request, Snapshot
from service.engine.scheduler import Scheduler
from service.engine.stepper import InvalidRows, Row, Stepper, StepResult
from service.errors import EngineFailed, InvalidValue, Overloaded
from service.shares import SharedBudget, SharedCapacity

log = structlog.get_logger(__name__)

_FAILED = "the engine has failed: restart the server"
_CLOSING = "the engine is shutting down: try again in a moment"
_NOT_COMPUTABLE = "the engine can't compute this request: the server's log has the reason"
_UNLIMITED_BYTES = 2**60
_SHORT_CHARS = 32  # texts up to this length are read on the caller's thread while the engine is idle
# For this long after a tick with several clients, ticks stay short: a client that has been here may come back, and
# would have to wait for the end of a long one.
_SHORT_TICKS_S = 10.0


@dataclass(eq=False)
class _Text:
    """A request in the scheduler."""

    handle: Handle
    row: Row
    batch: SubmittedBatch  # the texts that were submitted together
    num_bytes: int = 0  # counted in the engine's memory budget

    @property
    def client(self) -> str:
        """For whom the text is advanced."""
        return self.handle.request.client


class Engine:
    """Advances texts on its own thread, which does nothing else. Any thread may call any method.

    A short text that is only read is stepped on the caller's thread while the engine is idle: waking the engine's
    thread, and being woken by it, would take longer.

    Clients share the engine (see `Scheduler` and `SharedCapacity`): one that has filled it leaves the same number of
    places once more for the others.

    Args:
        vocab_size: characters of the stepper's model.
        max_running: texts in the batch at most.
        max_waiting: texts of one client that may wait for a place in the batch; further ones are refused.
        memory: bytes that all open texts together may take; several engines may share one.
        stall_s: seconds after which a step that has not returned counts as stuck.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self,
        stepper: Stepper,
        vocab_size: int,
        max_running: int,
        max_waiting: int,
        stall_s: float = 30.0,
        memory: SharedBudget | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stepper, self._vocab_size = stepper, vocab_size
        self._stall_s, self._clock = stall_s, clock
        self._memory = memory if memory is not None else SharedBudget(_UNLIMITED_BYTES)
        self._scheduler: Scheduler[_Text] = Scheduler(max_running)
        self._silent: set[_Text] = set()  # those in the scheduler that have generated nothing yet
        self._pace = Pace()
        self._short_ticks_until = 0.0
        self.counters = Counters()  # written while holding `_stepping`, read by any thread
        self._stepping = threading.Lock()  # held by the thread that uses the stepper
        self._changed = threading.Condition(threading.Lock())  # guards the fields below
        self._inbox: list[_Text] = []
        self._places = SharedCapacity(max_running + max_waiting, reserve=max_running + max_waiting)  # of all open texts
        self._closing = False
        self._retired = False
        self._thread: threading.Thread | None = None
        # Why the engine has failed for good. Not an exception: one that is raised again and again gathers the
        # tracebacks of all its callers, and with them their memory.
        self._failure: str | None = None
        self._tick_started: float | None = None  # None while no step is running

    def submit(self, requests: Sequence[Request], *, already_admitted: bool = False) -> list[Handle]:
        """Accept all of these requests of one client, or none. Raises InvalidValue, Overloaded and EngineFailed.

        With `already_admitted` the engine does not refuse them for lack of room. Use it for requests that continue the
        work of a text that has just ended, because they take its place.
        """
        client = requests[0].client if requests else ""  # all of them have the same
        self._require_room(client, len(requests), already_admitted)
        # On the caller's thread, so that a request that can't be computed fails alone, before it is accepted.
        batch, now = SubmittedBatch(len(requests)), self._clock()
        texts = [
            _Text(
                Handle(request, self.check, now), request.row(self._stepper.initial_hidden(), self._vocab_size), batch
            )
            for request in requests
        ]
        shared = {id(request.prompt): request.prompt.nbytes for request in requests}
        for text in texts:
            text.num_bytes = text.row.num_bytes + shared.pop(id(text.row.prompt), 0)
        num_bytes = sum(text.num_bytes for text in texts)
        if num_bytes > self._memory.max_per_client and not already_admitted:
            raise InvalidValue(
                f"this request takes {num_bytes} bytes of memory, and one client may have at most "
                f"{self._memory.max_per_client}: send a shorter text, or request fewer continuations"
            )
        if not self._memory.take(client, num_bytes, regardless=already_admitted):
            raise Overloaded("the server has as many long texts as it can, or as it can for you: try again in a second")
        try:
            return self._accept(client, texts, already_admitted)
        except BaseException:
            self._memory.give_back(client, num_bytes)
            raise

    def _accept(self, client: str, texts: list[_Text], already_admitted: bool) -> list[Handle]:
        with self._changed:
            self._require_room(client, len(texts), already_admitted)
            step_here = self._places.num_taken == 0 and len(texts) == 1 and _is_short(texts[0].handle.request)
            step_here = step_here and self._stepping.acquire(blocking=False)
            if not step_here:
                self._places.take(client, len(texts))
                self._inbox.extend(texts)
                self._start()
                self._changed.notify_all()
        if step_here:
            self._step_here(texts[0])
        return [text.handle for text in texts]

    def _require_room(self, client: str, num_texts: int, already_admitted: bool) -> None:
        self.check()
        if self._closing:
            raise EngineFailed(_CLOSING)
        if not already_admitted and not self._places.has_room(client, num_texts):
            raise Overloaded("the server is busy and its queue is full: try again in a second")

    def check(self) -> None:
        """Raise EngineFailed if the engine has failed, or a step has taken longer than `stall_s`."""
        if self._failure is not None:
            raise EngineFailed(self._failure)
        started = self._tick_started
        if started is not None and self._clock() - started > self._stall_s:
            raise EngineFailed(f"the engine is stuck: its step has taken more than {self._stall_s:.0f} seconds")

    def initial_hidden(self) -> Float32:
        """Return (L, H) float32 zeros, the state before the first character."""
        return self._stepper.initial_hidden()

    @property
    def num_open(self) -> int:
        """Number of texts that are running or waiting."""
        return self._places.num_taken

    def crowd_of(self, client: str) -> int:
        """Return the number of open texts if every client had as many as this one.

        A client's streams have to leave each other time, and the streams of the other clients as much, but need not
        wait for the many texts of another client.
        """
        return self._places.held_by(client) * self._places.num_clients

    @property
    def memory_usage(self) -> float:
        """Share, from 0 to 1, of the memory for texts that is taken; texts of other engines may share it."""
        return self._memory.num_taken / self._memory.max_amount

    @property
    def num_running(self) -> int:
        """Number of texts that are advanced, if necessary in turns."""
        return self._scheduler.num_running

    def retire(self) -> None:
        """End the thread as soon as no text is open. The engine stays usable: a new text starts a new thread."""
        with self._changed:
            self._retired = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread. Open texts fail, so that none of them looks complete, and new ones are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._stall_s)
        if self._stepping.acquire(timeout=self._stall_s):  # waits for a step on a caller's thread
            self._stepping.release()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def _step_here(self, text: _Text) -> None:
        """Step a short text on the caller's thread, which holds `_stepping`, and release it."""
        row = text.row
        try:
            result = self._advance([row], _SHORT_CHARS)[0]
        except InvalidRows as invalid:
            _log_invalid(invalid)
            raise EngineFailed(_NOT_COMPUTABLE) from invalid
        except BaseException as error:
            _log_failure(error)
            with self._changed:
                self._failure = _FAILED
                self._changed.notify_all()  # so that the engine's thread fails its texts and ends
            raise EngineFailed(_FAILED) from error
        finally:
            self._stepping.release()
        self._memory.give_back(text.client, text.num_bytes)
        text.handle.publish(result, _end(row, row.finished or "length"))

    def _advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        before = sum([row.position for row in rows])
        self._tick_started = started = self._clock()
        try:
            results = self._stepper.advance(rows, num_chars)
        finally:
            self._tick_started = None
        duration_s = self._clock() - started
        num_stepped = sum([row.position for row in rows]) - before
        num_generated = sum([len(result.chars) for result in results])
        self.counters.ticked(len(rows), num_stepped - num_generated, num_generated, duration_s)
        return results

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._tick()
            # Not if it was retired: then it may already have a new thread, with new texts.
            if self._closing:
                self._fail_open_texts(_CLOSING)
        except BaseException as error:  # noqa: BLE001 - otherwise callers would wait for a dead thread
            if self._failure is None:
                _log_failure(error)
            self._fail(_FAILED)

    def _wait_for_work(self) -> bool:
        """Wait until there is a text, and move new ones to the scheduler. Return False if the thread must end."""
        scheduler = self._scheduler
        with self._changed:
            while not (self._inbox or scheduler.has_work or self._closing or self._retired or self._failure):
                self._changed.wait()
            if self._failure is not None:
                raise EngineFailed(self._failure)
            if self._closing or not (self._inbox or scheduler.has_work):
                self._thread = None
                return False
            scheduler.add(self._inbox)
            self._silent.update(self._inbox)
            self._inbox = []
        return True

    def _tick(self) -> None:
        """Choose texts, advance them, and hand the new characters over to their handles."""
        scheduler = self._scheduler
        self._end([text for text in (*scheduler.running, *scheduler.waiting) if text.handle.is_cancelled], "cancelled")
        tick_s = self._tick_s()
        texts = scheduler.choose(self._pace.num_rows(tick_s) if tick_s < TICK_S else scheduler.max_running)
        rows = [text.row for text in texts]
        if not rows:
            return
        num_chars = self._pace.num_chars(len(rows), tick_s)
        with self._stepping:
            if self._failure is not None:
                raise EngineFailed(self._failure)
            started = self._clock()
            try:
                results = self._advance(rows, num_chars)
            except InvalidRows as invalid:
                _log_invalid(invalid)
                self._fail_texts([text for text in texts if text.row in invalid.causes], _NOT_COMPUTABLE)
                return  # the next tick advances the others
            duration_s = self._clock() - started
        self._note_times(started, started + duration_s)
        self._pace.measured(len(rows), num_chars, duration_s)
        scheduler.charge(duration_s)
        # Free the places before handing over: a caller that reads the end and submits again at once must not be
        # refused.
        self._remove([text for text, row in zip(texts, rows, strict=True) if row.finished is not None])
        for text, row, result in zip(texts, rows, results, strict=True):
            text.handle.publish(result, _end(row, row.finished) if row.finished is not None else None)
            if text.handle.wants_snapshot and row.finished is None:
                text.handle.publish_snapshot(_snapshot(row))

    def _note_times(self, started: float, ended: float) -> None:
        """Note which texts a tick has advanced for the first time, and which have generated their first character."""
        born = []
        for text in self._silent:
            times, row = text.handle.times, text.row
            if times.started is None and row.position > text.handle.request.position:
                times.started = started
            if row.num_generated:
                times.first = ended
                born.append(text)
        self._silent.difference_update(born)

    def _tick_s(self) -> float:
        """Return how long the next tick should take: less while clients share the engine."""
        now = self._clock()
        if self._scheduler.num_clients > 1:
            self._short_ticks_until = now + _SHORT_TICKS_S
        return SHARED_TICK_S if now < self._short_ticks_until else TICK_S

    def _end(self, texts: Sequence[_Text], reason: EndReason) -> None:
        self._remove(texts)
        for text in texts:
            text.handle.publish(None, _end(text.row, reason))

    def _remove(self, texts: Sequence[_Text]) -> None:
        if texts:
            self._silent.difference_update(texts)
            now = self._clock()
            for text in texts:
                text.handle.times.ended = now
                if text.handle.request.max_chars:
                    request, row = text.handle.request, text.row
                    self.counters.ended(row.finished, len(request.prompt), row.num_generated, text.handle.times)
                    if text.batch.ended(row.num_generated):
                        self.counters.longest_generated.add(text.batch.longest)
            self._scheduler.remove(texts)
            for text in texts:
                self._memory.give_back(text.client, text.num_bytes)
            with self._changed:
                for text in texts:
                    self._places.give_back(text.client)

    def _open_texts(self) -> list[_Text]:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        return [*self._scheduler.running, *self._scheduler.waiting, *inbox]

    def _fail(self, failure: str) -> None:
        with self._changed:
            self._failure = failure
        self._fail_open_texts(failure)

    def _fail_open_texts(self, failure: str) -> None:
        self._fail_texts(self._open_texts(), failure)

    def _fail_texts(self, texts: Sequence[_Text], failure: str) -> None:
        for text in texts:
            text.handle.fail(failure)
        self._remove(texts)


def _log_failure(error: BaseException) -> None:
    log.error("the engine failed", error=type(error).__name__, exc_info=error)


def _log_invalid(invalid: InvalidRows) -> None:
    """Log the first cause. The engine accepts only rows that can be advanced, so this is a fault of ours."""
    cause = next(iter(invalid.causes.values()))
    log.error("texts can't be computed", num_texts=len(invalid.causes), error=type(cause).__name__, exc_info=cause)


def _is_short(request: Request) -> bool:
    return request.max_chars == 0 and len(request.prompt) <= _SHORT_CHARS


def _end(row: Row, reason: EndReason) -> End:
    return End(
        reason, row.hidden, row.position, dict(zip(row.checkpoint_positions, row.checkpoints, strict=False)), row.next
    )


def _snapshot(row: Row) -> Snapshot:
    return Snapshot(read_state(row.hidden), row.position, row.checkpoint_positions, row.checkpoints[:])

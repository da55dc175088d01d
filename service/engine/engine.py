"""The engine: a thread that advances all open texts of one model together, a few characters at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from service.arrays import Float32
from service.engine.at_once import NOT_COMPUTABLE, AtOnce
from service.engine.counters import SubmittedBatch
from service.engine.guarded_stepper import GuardedStepper
from service.engine.handle import Handle, Wishes
from service.engine.pace import SHARED_TICK_S, TICK_S, Pace
from service.engine.request import Request
from service.engine.scheduler import Scheduler
from service.engine.short_text import ReadText, ShortText
from service.engine.stepper import InvalidRows, Row, Stepper, StepResult, Steps
from service.engine.texts import Job, JobBatch, Reading, Text, jobs_of
from service.errors import EngineFailed, InvalidValue, Overloaded
from service.shares import SharedBudget, SharedCapacity, current_client

_CLOSING = "the engine is shutting down: try again in a moment"
_NO_THREAD = (
    "the system refuses the engine a thread: raise the limit of processes (RLIMIT_NPROC, or pids of the container)"
)
_UNLIMITED_BYTES = 2**60
# For this long after a tick with several clients, ticks stay short: a client that has been here may come back, and
# would have to wait for the end of a long one.
_SHORT_TICKS_S = 10.0


class Engine:
    """Advances texts on its own thread, which does nothing else. Any thread may call any method.

    Its loop schedules, steps and publishes. Short texts don't need it while it is idle, see `AtOnce`; a prompt that
    several texts of one submission have in common is read once, see `Reading`.

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
        self._stepper = GuardedStepper(stepper, stall_s, clock)
        self.counters = self._stepper.counters  # any thread may read them
        self._vocab_size, self._stall_s, self._clock = vocab_size, stall_s, clock
        self._memory = memory if memory is not None else SharedBudget(_UNLIMITED_BYTES)
        self._at_once = AtOnce(self._stepper)
        self._scheduler: Scheduler[Job] = Scheduler(max_running)
        self._silent: set[Text] = set()  # those in the scheduler that have generated nothing yet
        self._wishes = Wishes()
        self._batch: JobBatch | None = None  # what the last tick advanced, unless one of it has ended
        self._pace = Pace()
        initial = stepper.initial_hidden()
        self._state_shape, self._state_bytes = initial.shape, initial.nbytes
        self._short_ticks_until = 0.0
        self._changed = threading.Condition(threading.Lock())  # guards the fields below
        self._inbox: list[Job] = []
        self._places = SharedCapacity(max_running + max_waiting, reserve=max_running + max_waiting)  # of all open texts
        self._closing = False
        self._retired = False
        self._thread: threading.Thread | None = None

    def submit(self, requests: Sequence[Request], *, already_admitted: bool = False) -> list[Handle]:
        """Accept all of these requests of one client, or none. Raises InvalidValue, Overloaded and EngineFailed.

        With `already_admitted` the engine does not refuse them for lack of room. Use it for requests that continue the
        work of a text that has just ended, because they take its place.
        """
        client = requests[0].client if requests else ""  # all of them have the same
        self.require_room(client, len(requests), already_admitted)
        # On the caller's thread, so that a request that can't be computed fails alone, before it is accepted.
        texts = self._texts(requests)
        jobs = jobs_of(texts, self._stepper.initial_hidden, self._num_bytes)
        num_bytes = sum(text.num_bytes for text in texts) + sum(
            job.num_bytes for job in jobs if isinstance(job, Reading)
        )
        if num_bytes > self._memory.max_per_client and not already_admitted:
            raise InvalidValue(
                f"this request takes {num_bytes} bytes of memory, and one client may have at most "
                f"{self._memory.max_per_client}: send a shorter text, or request fewer continuations"
            )
        if not self._memory.take(client, num_bytes, regardless=already_admitted):
            raise Overloaded("the server has as many long texts as it can, or as it can for you: try again in a second")
        try:
            at_once = self._accept(client, texts, jobs, already_admitted)
        except BaseException:
            self._memory.give_back(client, num_bytes)
            raise
        if at_once:
            try:
                self._at_once.step(texts)
            except EngineFailed:
                self._wake()  # so that the engine's thread fails its texts and ends
                raise
            finally:
                self._memory.give_back(client, num_bytes)
        return [text.handle for text in texts]

    def read_at_once(self, texts: Sequence[ShortText]) -> list[ReadText] | None:
        """Read texts on this thread, and return what came of each, in their order.

        Returns None if they are not few and short, the engine is not idle, has no room or a stepper that can't do this:
        then submit them. Raises InvalidValue, EngineFailed.
        """
        client, shape = current_client(), self._state_shape
        self.check()
        if self._places.num_taken or not self._places.has_room(client, len(texts)):
            return None
        for text in texts:
            text.check(shape, self._vocab_size)
        num_bytes = sum(self._state_bytes * (2 + len(text.checkpoints)) + text.ids.nbytes + 2000 for text in texts)
        if not self._memory.take(client, num_bytes):
            return None
        try:
            with self._changed:
                if self._closing or self._places.num_taken or not self._at_once.begin_reading(texts):
                    return None
            try:
                return self._at_once.read(texts)
            except EngineFailed:
                self._wake()  # so that the engine's thread fails its texts and ends
                raise
        finally:
            self._memory.give_back(client, num_bytes)

    def _texts(self, requests: Sequence[Request]) -> list[Text]:
        rows = [Row.of(request, self._stepper.initial_hidden(), self._vocab_size) for request in requests]
        # What requests share counts once.
        shared = {id(request.prompt): request.prompt.nbytes for request in requests}
        shared |= {id(one): one.num_bytes for one in (request.automaton for request in requests) if one is not None}
        batch, now, texts = SubmittedBatch(len(requests)), self._clock(), list[Text]()
        for request, row in zip(requests, rows, strict=True):
            num_bytes = self._num_bytes(request)
            num_bytes += shared.pop(id(request.prompt), 0) + shared.pop(id(request.automaton), 0)
            handle = Handle(request, self._stepper.check, now, row.num_withheld, self._wishes)
            texts.append(Text(handle, row, batch, num_bytes, len(request.prompt)))
        return texts

    def _num_bytes(self, request: Request) -> int:
        return request.num_bytes(self._state_bytes, self._vocab_size)

    def _accept(self, client: str, texts: Sequence[Text], jobs: Sequence[Job], already_admitted: bool) -> bool:
        """Give the jobs to the engine's thread; or return True if the texts must be stepped at once."""
        with self._changed:
            self.require_room(client, len(texts), already_admitted)
            if self._places.num_taken == 0 and self._at_once.begin([text.row.request for text in texts]):
                return True
            self._start()  # before anything is taken, because it may fail
            self._places.take(client, len(texts))
            self._inbox.extend(jobs)
            self._changed.notify_all()
        return False

    def require_room(self, client: str, num_texts: int = 1, already_admitted: bool = False) -> None:
        """Raise EngineFailed, or Overloaded, if the engine would refuse this many texts of a client now.

        already_admitted: see `submit`.
        """
        self.check()
        if self._closing:
            raise EngineFailed(_CLOSING)
        if not already_admitted and not self._places.has_room(client, num_texts):
            raise Overloaded("the server is busy and its queue is full: try again in a second")

    def check(self) -> None:
        """Raise EngineFailed if the engine has failed, or a step has taken longer than `stall_s`."""
        self._stepper.check()

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
        self._retired = True
        self._wake()

    def close(self) -> None:
        """End the thread. Open texts fail, so that none of them looks complete, and new ones are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._stall_s)
        if self._stepper.lock.acquire(timeout=self._stall_s):  # waits for a step on a caller's thread
            self._stepper.lock.release()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _start(self) -> None:
        """Start the thread if there is none; it waits for `_changed`. Raises EngineFailed."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="engine", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise EngineFailed(_NO_THREAD) from error
            self._thread = thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._tick()
            # Not if it was retired: then it may already have a new thread, with new texts.
            if self._closing:
                self._fail_jobs(self._open_jobs(), _CLOSING)
        except BaseException as error:  # noqa: BLE001 - otherwise callers would wait for a dead thread
            with self._changed:
                failure = self._stepper.fail(error)
            self._fail_jobs(self._open_jobs(), failure)

    def _wait_for_work(self) -> bool:
        """Wait until there is a text, and move new ones to the scheduler. Return False if the thread must end."""
        scheduler = self._scheduler
        if scheduler.has_work and not (self._inbox or self._closing or self._stepper.failure):
            return True  # most of the time; whatever changes just now is seen after the next tick
        with self._changed:
            while not (self._inbox or scheduler.has_work or self._closing or self._retired or self._stepper.failure):
                self._changed.wait()
            if self._stepper.failure is not None:
                raise EngineFailed(self._stepper.failure)
            if self._closing or not (self._inbox or scheduler.has_work):
                self._thread = None
                return False
            scheduler.add(self._inbox)
            if self._inbox:
                self._silent.update(_texts_of(self._inbox))
                self._wishes.any_cancelled = True
                self._inbox = []
        return True

    def _tick(self) -> None:
        """Choose texts, advance them, and hand the new characters over to their handles."""
        self._drop_cancelled()
        batch, num_chars = self._schedule()
        if batch is not None:
            steps = self._step(batch, num_chars)
            if steps is not None:
                self._publish(batch, steps)

    def _schedule(self) -> tuple[JobBatch | None, int]:
        """Return what to advance in this tick, if there is anything, and by how many characters."""
        tick_s = self._tick_s()
        jobs = self._scheduler.choose(self._pace.num_rows(tick_s) if tick_s < TICK_S else self._scheduler.max_running)
        if not jobs:
            return None, 0
        if self._batch is None or jobs != self._batch.jobs:
            self._dissolve_batch()
            self._batch = JobBatch(jobs)
        return self._batch, self._pace.num_chars(len(jobs), tick_s)

    def _dissolve_batch(self) -> None:
        if self._batch is not None:
            self._batch.dissolve()
            self._batch = None

    def _step(self, batch: JobBatch, num_chars: int) -> Steps | None:
        """Advance jobs, and return what that did; None if some can't be advanced: those fail."""
        with self._stepper.lock:
            started = self._clock()
            try:
                steps = self._stepper.advance(batch.rows, num_chars)
            except InvalidRows as invalid:
                self._fail_jobs([job for job in batch.jobs if job.row in invalid.causes], NOT_COMPUTABLE)
                return None  # the next tick advances the others
            ended = self._clock()
        if self._silent:
            self._note_times(batch, started, ended)
        self._pace.measured(len(batch.rows), num_chars, ended - started)
        self._scheduler.charge(ended - started)
        return steps

    def _publish(self, batch: JobBatch, steps: Steps) -> None:
        """Hand results over, and let texts leave that have ended, or begin that have their prompt read."""
        batch.add(steps)
        for i, reading in batch.readings:
            self._publish_reading(reading, steps.results.get(i))
        finished = [batch.jobs[i] for i in steps.finished]
        texts = [job for job in finished if isinstance(job, Text)]
        # Free the places before handing over: a caller that reads the end and submits again at once must not be
        # refused.
        self._remove(texts)
        for text in texts:
            text.handle.publish_end(text.end(text.row.finished or "length"))
        for handle in tuple(self._wishes.results):
            handle.wake()
        if self._wishes.snapshots:
            for job in batch.jobs:
                if isinstance(job, Text) and job.handle in self._wishes.snapshots:
                    job.handle.publish_snapshot(job.snapshot())

    def _publish_reading(self, reading: Reading, result: StepResult | None) -> None:
        is_over = reading.row.finished is not None
        for text in reading.texts:
            wants_snapshot = text.handle in self._wishes.snapshots
            if is_over or wants_snapshot:
                reading.catch_up(text)
            if result is not None:
                text.handle.publish(result)
            if wants_snapshot:
                text.handle.publish_snapshot(text.snapshot())
        if is_over:
            self._scheduler.replace(reading, reading.texts)
            self._memory.give_back(reading.client, reading.num_bytes)

    def _note_times(self, batch: JobBatch, started: float, ended: float) -> None:
        """Note which texts a tick has advanced for the first time, and which have generated their first character."""
        for _, reading in batch.readings:
            for text in reading.texts:
                if text.handle.times.started is None:
                    text.handle.times.started = started
        born = []
        for text in self._silent:
            times, row = text.handle.times, text.row
            if times.started is None and row.position > row.request.position:
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

    def _drop_cancelled(self) -> None:
        if not self._wishes.any_cancelled:
            return
        self._wishes.any_cancelled = False  # before looking, so that no later one is missed
        for job in (*self._scheduler.running, *self._scheduler.waiting):
            if cancelled := [text for text in job.texts if text.handle.is_cancelled]:
                self._drop(job, cancelled)

    def _drop(self, job: Job, cancelled: Sequence[Text]) -> None:
        """End the cancelled texts of a job."""
        if isinstance(job, Reading):
            for text in cancelled:
                job.catch_up(text)
            job.texts = [text for text in job.texts if text not in cancelled]
            if not job.texts:
                self._remove_reading(job)
        self._remove(cancelled)
        for text in cancelled:
            text.handle.publish_end(text.end("cancelled"))

    def _remove_reading(self, reading: Reading) -> None:
        self._dissolve_batch()
        self._scheduler.remove([reading])
        self._memory.give_back(reading.client, reading.num_bytes)

    def _remove(self, texts: Sequence[Text]) -> None:
        """Free what the texts have taken, and count their ends."""
        if not texts:
            return
        self._dissolve_batch()  # so that nothing of them is left in the engine
        self._silent.difference_update(texts)
        now = self._clock()
        for text in texts:
            text.handle.times.ended = now
            if text.row.request.max_chars:
                row = text.row
                self.counters.ended(row.finished, text.num_prompt, row.num_generated, text.handle.times)
                if text.batch.ended(row.num_generated):
                    self.counters.longest_generated.add(text.batch.longest)
        self._scheduler.remove(texts)
        for text in texts:
            self._memory.give_back(text.client, text.num_bytes)
        with self._changed:
            for text in texts:
                self._places.give_back(text.client)

    def _open_jobs(self) -> list[Job]:
        """Return everything that is open, and empty the inbox."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
        return [*self._scheduler.running, *self._scheduler.waiting, *inbox]

    def _fail_jobs(self, jobs: Sequence[Job], failure: str) -> None:
        for job in jobs:
            if isinstance(job, Reading):
                self._remove_reading(job)
        texts = _texts_of(jobs)
        for text in texts:
            text.handle.fail(failure)
        self._remove(texts)


def _texts_of(jobs: Iterable[Job]) -> list[Text]:
    return [text for job in jobs for text in job.texts]

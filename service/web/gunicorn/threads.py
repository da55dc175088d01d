"""The threads that answer requests."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

_IDLE_S = 10.0  # after this time without work a thread ends, down to the minimum
_LOG_INTERVAL_S = 60.0
Task = TypeVar("Task")


class Threads(Generic[Task]):
    """Threads that work on tasks.

    Unlike `ThreadPoolExecutor`, it survives that the system refuses another thread: tasks then wait for the threads
    that run. It ends threads that have nothing to do. The thread that became idle last gets the next task, so that
    the others can end.
    """

    def __init__(self, work: Callable[[Task], None], min_threads: int, max_threads: int) -> None:
        """Start `min_threads`, or as many as the system allows. Raises RuntimeError if it allows none."""
        self._work, self._min_threads, self._max_threads = work, min_threads, max_threads
        self._lock = threading.Lock()  # guards the fields below
        self._threads: set[threading.Thread] = set()
        self._idle: list[queue.SimpleQueue[Task | None]] = []  # where each idle thread waits for a task
        self._waiting: deque[Task] = deque()
        self._is_closed = False
        self._logged_at = -_LOG_INTERVAL_S
        self._start(None)
        try:
            for _ in range(min_threads - 1):
                self._start(None)
        except RuntimeError:
            self._complain()

    def submit(self, task: Task) -> None:
        """Let a thread work on the task as soon as one is free."""
        with self._lock:
            if self._idle:
                self._idle.pop().put(task)
                return
            if len(self._threads) < self._max_threads:
                try:
                    self._start(task)
                    return
                except RuntimeError:
                    self._complain()
            self._waiting.append(task)

    def close(self, timeout_s: float) -> None:
        """End the threads, and wait up to `timeout_s` for them."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            threads = list(self._threads)
            for mailbox in self._idle:
                mailbox.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, task: Task | None) -> None:
        """Start a thread, with its first task or idle. Raises RuntimeError."""
        # A daemon, so that a client that hangs doesn't keep the process from exiting.
        thread = threading.Thread(target=self._run, args=(task,), name="http", daemon=True)
        thread.start()
        self._threads.add(thread)

    def _complain(self) -> None:
        if time.monotonic() - self._logged_at < _LOG_INTERVAL_S:
            return
        self._logged_at = time.monotonic()
        log.error(
            "the system refuses another thread: requests wait for those that are running",
            num_threads=len(self._threads),
            advice="raise the limit of processes (RLIMIT_NPROC, or pids of the container), or lower "
            "GRU_SERVE_HTTP_THREADS",
        )

    def _run(self, task: Task | None) -> None:
        mailbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        if task is not None:
            self._work(task)
        while (task := self._next(mailbox)) is not None:
            self._work(task)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _next(self, mailbox: queue.SimpleQueue[Task | None]) -> Task | None:
        """Return the next task, or None if this thread has to end."""
        with self._lock:
            if self._is_closed:
                return None
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(mailbox)
        while True:
            try:
                return mailbox.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if mailbox in self._idle and len(self._threads) > self._min_threads:
                        self._idle.remove(mailbox)
                        self._threads.discard(threading.current_thread())
                        return None

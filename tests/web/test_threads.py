"""Threads that answer requests: how many there are, and what happens if no more can start."""

from __future__ import annotations

import threading

import pytest

from service.web.gunicorn import threads as threads_module
from service.web.gunicorn.threads import Threads
from tests.harness.wait import wait_until


def num_threads() -> int:
    return sum(thread.name == "http" for thread in threading.enumerate())


def test_threads__start_when_all_are_busy_and_end_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "_IDLE_S", 0.05)
    release, done = threading.Event(), []

    def work(task: int) -> None:
        release.wait(30)
        done.append(task)

    pool = Threads(work, min_threads=2, max_threads=5)
    assert num_threads() == 2
    for task in range(9):
        pool.submit(task)
    wait_until(lambda: num_threads() == 5)
    release.set()
    wait_until(lambda: len(done) == 9)
    assert sorted(done) == list(range(9))
    wait_until(lambda: num_threads() == 2)
    pool.submit(9)
    wait_until(lambda: len(done) == 10)
    pool.close(30)
    assert num_threads() == 0


def test_threads__that_can_not_start_leave_the_task_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    release, done = threading.Event(), []

    def work(task: int) -> None:
        release.wait(30)
        done.append(task)

    pool = Threads(work, min_threads=1, max_threads=5)
    wait_until(lambda: num_threads() == 1)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for task in range(3):
            pool.submit(task)
    release.set()
    wait_until(lambda: sorted(done) == [0, 1, 2])
    pool.close(30)
    assert num_threads() == 0

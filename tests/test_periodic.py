"""The periodic thread: it calls its function again and again, and ends when it is closed."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from service.periodic import PeriodicThread

NEVER_S = 3600.0


def test_periodic_thread__calls_again_at_once_while_there_is_more_to_do() -> None:
    results = iter([True, True, False])
    begun, may_return, idle = threading.Event(), threading.Event(), threading.Event()
    calls = []

    def work() -> bool:
        begun.set()
        assert may_return.wait(60)
        calls.append(threading.current_thread().name)
        has_more = next(results)
        if not has_more:
            idle.set()
        return has_more

    with closing(PeriodicThread("worker", 0.001, work)) as thread:
        assert begun.wait(60)
        thread._interval_s = NEVER_S  # from now on only the result can cause another call
        may_return.set()
        assert idle.wait(60)
    assert calls == ["worker"] * 3


def test_periodic_thread__calls_again_after_the_interval() -> None:
    calls = threading.Semaphore(0)
    with closing(PeriodicThread("worker", 0.001, calls.release)):
        for _ in range(3):
            assert calls.acquire(timeout=60)


def test_periodic_thread__closing_waits_for_the_current_call_and_makes_no_other() -> None:
    begun, finish = threading.Event(), threading.Event()
    num_finished = 0

    def work() -> bool:
        nonlocal num_finished
        begun.set()
        assert finish.wait(60)
        num_finished += 1
        return True

    thread = PeriodicThread("worker", 0.001, work)
    assert begun.wait(60)
    closer = threading.Thread(target=thread.close)
    closer.start()
    assert thread._closing.wait(60)
    assert closer.is_alive()
    finish.set()
    closer.join()
    assert num_finished == 1
    assert not any(alive.name == "worker" for alive in threading.enumerate())


def test_close__does_not_wait_for_work_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.periodic._CLOSING_S", 0.01)
    begun, ends = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        ends.wait()

    periodic = PeriodicThread("hangs", 0.001, hang)
    assert begun.wait(20)
    closing = threading.Thread(target=periodic.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    ends.set()

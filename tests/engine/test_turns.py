"""Turns: one piece of work at a time, for each client in turn, and once for all threads that want it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from service.engine.turns import Turns
from service.errors import InvalidArtifact, Overloaded
from service.shares import work_for
from tests.harness.wait import wait_until


class _Works:
    """Work that is held up until it is allowed, and the order in which it was done."""

    def __init__(self, turns: Turns, pool: ThreadPoolExecutor) -> None:
        self.turns, self._pool = turns, pool
        self.allowed = threading.Event()
        self.done: list[str] = []
        self.num_working = self.most_working = 0

    def submit(
        self, client: str, key: str, work: Callable[[], object] = lambda: None, *, always: bool = False
    ) -> Future[object]:
        """Let a thread of a client do work, and wait until it waits for its turn."""
        before = self.turns.num_waiting

        def done() -> object:
            self.num_working += 1
            self.most_working = max(self.most_working, self.num_working)
            assert self.allowed.wait(60)
            self.done.append(key)
            self.num_working -= 1
            return work() or key

        def once() -> object:
            work_for(client)
            return self.turns.once(key, done, always=always)

        future = self._pool.submit(once)
        wait_until(lambda: self.turns.num_waiting > before or future.done())
        return future


@contextmanager
def works(max_waiting: int = 8, wait_s: float = 20.0) -> Iterator[_Works]:
    with ThreadPoolExecutor(40) as pool:
        found = _Works(Turns(max_waiting, wait_s, "too much"), pool)
        try:
            yield found
        finally:
            found.allowed.set()


def test_turns__of_clients_follow_each_other_however_much_work_one_has() -> None:
    with works() as found:
        wanted = [found.submit("greedy", f"greedy{number}") for number in range(6)]
        wanted += [found.submit("a", "a0"), found.submit("b", "b0"), found.submit("a", "a1")]
        found.allowed.set()
        assert [future.result(60) for future in wanted] == [*(f"greedy{n}" for n in range(6)), "a0", "b0", "a1"]
        assert found.done[:3] == ["greedy0", "a0", "b0"]
        assert found.done.index("a1") < found.done.index("greedy2")
        greedy = [key for key in found.done if key.startswith("greedy")]
        assert greedy == sorted(greedy)  # the order of each client
        assert (found.most_working, found.turns.num_waiting) == (1, 0)


def test_turns__same_work_is_done_once_for_all_that_wait() -> None:
    with works() as found:
        wanted = [found.submit(client, "same") for client in ("a", "a", "b", "a", "c")]
        other = found.submit("a", "other")
        found.allowed.set()
        assert [future.result(60) for future in (*wanted, other)] == ["same"] * 5 + ["other"]
        assert sorted(found.done) == ["other", "same"]
        assert found.submit("a", "same").result(60) == "same"  # it is not remembered
        assert sorted(found.done) == ["other", "same", "same"]


def test_turns__an_error_is_a_new_one_for_each_that_waits() -> None:
    def fails() -> None:
        raise InvalidArtifact("damaged")

    with works() as found:
        wanted = [found.submit(client, "same", fails) for client in "aab"]
        found.allowed.set()
        errors = [future.exception(20) for future in wanted]
        assert found.done == ["same"]
        assert {str(error) for error in errors} == {"damaged"}
        assert len(set(map(id, errors))) == 3


def test_turns__work_that_failed_unexpectedly_is_tried_by_the_next_that_waits() -> None:
    failures = [MemoryError()]

    def fails_once() -> object:
        if failures:
            raise failures.pop()
        return None

    with works() as found:
        wanted = [found.submit(client, "same", fails_once) for client in "aaab"]
        found.allowed.set()
        outcomes = [future.exception(20) for future in wanted]
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [MemoryError]
        assert 2 <= len(found.done) <= 4
        assert found.submit("a", "other").result(60) == "other"


def test_turns__a_client_waits_for_few_pieces_and_joins_those_of_others() -> None:
    with works(max_waiting=3) as found:
        wanted = [found.submit("greedy", f"greedy{number}") for number in range(3)]
        assert isinstance(found.submit("greedy", "more").exception(20), Overloaded)
        wanted += [found.submit("greedy", "greedy1")]
        wanted += [found.submit("other", "more"), found.submit("greedy", "more")]
        wanted += [found.submit("greedy", "needed", always=True)]
        found.allowed.set()
        assert [future.result(60) for future in wanted[3:]] == ["greedy1", "more", "more", "needed"]
        assert len(found.done) == 5
    with works(max_waiting=3) as found:
        found.allowed.set()
        assert [found.submit("greedy", str(number)).result(60) for number in range(9)] == [*map(str, range(9))]


def test_turns__are_waited_for_in_a_limited_time() -> None:
    with works(wait_s=0.02) as found:
        first = found.submit("a", "first")
        always = found.submit("a", "always", always=True)
        assert [type(found.submit(client, "late").exception(20)) for client in "ab"] == [Overloaded] * 2
        late = found.submit("b", "first")
        found.allowed.set()
        assert (first.result(60), always.result(60)) == ("first", "always")
        assert type(late.exception(20)) in (Overloaded, type(None))
        assert set(found.done) == {"first", "always"}
        assert found.turns.num_waiting == 0


@pytest.mark.parametrize("seed", range(3))
def test_turns__of_many_threads_do_all_work(seed: int) -> None:
    turns, done = Turns(40, 20.0, "too much"), list[int]()

    def once(number: int) -> int:
        def work() -> int:
            done.append(number % 20)
            return number % 20

        work_for("abc"[(number + seed) % 3])
        return turns.once(number % 20, work)

    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(once, range(300))] == [number % 20 for number in range(300)]
    assert set(done) == set(range(20))
    assert turns.num_waiting == 0

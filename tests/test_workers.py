"""How tests are divided among workers: each runs once, and those that wait run beside one that computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.workers import _LONGEST, FileScheduling

ROOT = Path(__file__).parents[1]
COMPUTING = [f"tests/engine/test_{name}.py::test_{number}" for name in "abc" for number in range(4)]
WAITING = [f"tests/process/test_{name}.py::test_{number}" for name in "abc" for number in range(4)]
PAGE = [f"tests/page/test_{name}.py::test_{number}" for name in "ab" for number in range(4)]
COLLECTED = [*COMPUTING, *PAGE, *WAITING]


class Worker:
    """What the scheduler sees of a worker."""

    shutting_down = False

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.waiting: list[int] = []  # indices of tests that it was told to run
        self.ran: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers__run_each_test_once_and_files_that_wait_beside_one_that_computes(num_workers: int) -> None:
    config: Any = SimpleNamespace(
        option=SimpleNamespace(loadscopereorder=True), getvalue=lambda _: [f"{num_workers}*popen"]
    )
    scheduler = FileScheduling(config)
    workers = [Worker(number) for number in range(num_workers)]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, COLLECTED)
    scheduler.schedule()
    while not all(worker.shutting_down and not worker.waiting for worker in workers):
        current = [COLLECTED[worker.waiting[0]] for worker in workers if worker.waiting]
        left = set(COLLECTED).difference(*(worker.ran for worker in workers)) - set(current)
        if num_workers > 1 and left & set(COMPUTING) and left & {*WAITING, *PAGE}:
            assert len(set(COMPUTING).intersection(current)) == 1
        for worker in workers:
            if worker.waiting:
                index = worker.waiting.pop(0)
                worker.ran.append(COLLECTED[index])
                scheduler.mark_test_complete(worker, index)
    assert sorted(name for worker in workers for name in worker.ran) == sorted(COLLECTED)
    assert [len(set(PAGE).intersection(worker.ran)) for worker in workers if set(PAGE).intersection(worker.ran)] == [8]


def test_workers__begin_with_the_longest_files() -> None:
    """The others follow by their number of tests, so a file of one long test would be the last otherwise."""
    longest = [scope for scope in _LONGEST if scope.endswith(".py")]
    assert all((ROOT / scope).exists() for scope in _LONGEST)
    collected = COLLECTED + [f"{scope}::test_one" for scope in longest]
    config: Any = SimpleNamespace(option=SimpleNamespace(loadscopereorder=True), getvalue=lambda _: ["2*popen"])
    scheduler = FileScheduling(config)
    workers = [Worker(number) for number in range(2)]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, collected)
    scheduler.schedule()
    begun = [collected[index].partition("::")[0] for worker in workers for index in worker.waiting]
    assert all(scope in longest or scope.startswith("tests/page/") for scope in begun), begun

"""How `make test` divides the tests among the workers of pytest-xdist, which are processes.

A worker runs a whole file, so what the tests of a file share is made once. While something is left to compute, one
worker computes. The others run the files that wait for real servers, leases and a browser, and leave it the cores.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

from service.cores import available_cores

_MOST_WORKERS = 8
# What shares a browser and a server is one unit, as a file is elsewhere.
_PAGE = "tests/page/"
_WAITING = (_PAGE, "tests/process/", "tests/generation/", "tests/sessions/")
# The longest files of both kinds. They are begun first, so that no worker runs one alone at the end.
_LONGEST = (
    _PAGE,
    "tests/process/test_hung_replica.py",
    "tests/process/test_balancer.py",
    "tests/process/test_survival.py",
    "tests/sessions/test_redis_topologies.py",
    "tests/sessions/test_store_machine.py",
    "tests/generation/test_session_machine.py",
    "tests/test_package.py",
    "tests/engine/test_build.py",
    "tests/engine/test_emulated.py",
    "tests/commands/test_train.py",
    "tests/commands/test_train_mistakes.py",
    "tests/commands/test_commands.py",
    "tests/training/test_trainer.py",
)


def num_workers() -> int:
    """The number of workers of `pytest -n auto`: one more than there are cores, because many tests wait."""
    return min(available_cores() + 1, _MOST_WORKERS)


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker the next file to compute if no other worker computes, else the next one that waits.

    Of both kinds the longest are the first, and after them those with the most tests.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _PAGE if nodeid.startswith(_PAGE) else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        another_computes = any(
            not scope.startswith(_WAITING) and not all(unit.values())
            for other, units in self.assigned_work.items()
            for scope, unit in units.items()
            if other is not node
        )
        fitting = [scope for scope in self.workqueue if scope.startswith(_WAITING) == another_computes]
        # The queue is in the order of the numbers of tests, and `min` returns the first of equal ones.
        rest = len(_LONGEST)
        ranks = {scope: _LONGEST.index(scope) if scope in _LONGEST else rest for scope in fitting or self.workqueue}
        self.workqueue.move_to_end(min(ranks, key=ranks.__getitem__), last=False)
        super()._assign_work_unit(node)
